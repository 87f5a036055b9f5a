"""What a tuning step takes, and what is cut: appendix A.4's numbers, by hand."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from serve.errors import UserError
from serve.task import Task as ServedTask
from serve.tokenize import Encoder
from trainer import few_shot
from trainer import finetune as finetune_module
from trainer import tune as tune_module
from trainer.backbone import load_backbone
from trainer.configs import FinetuneConfig, TuneConfig
from trainer.data import Examples
from trainer.figures import fit_temperature
from trainer.loop import RunOptions, Score
from trainer.modes import add_group
from trainer.readout import compile_template, encode_texts
from trainer.rows import Rows, Scorer
from trainer.tasks import get_task, make_task


@pytest.mark.parametrize(
    ("rows", "asked", "drawn"),
    [
        (1000, (None, None), (40, 40)),  # A.4
        (80, (None, None), (40, 40)),
        (79, (None, None), (40, 39)),
        (32, (None, None), (20, 12)),  # a file of forty, without its fifth for testing
        (5, (None, None), (3, 2)),
        (1, (None, None), (1, 1)),  # which is refused when it is drawn
        (32, (16, None), (16, 16)),
        (32, (None, 12), (20, 12)),
        (1000, (16, None), (16, 40)),
        (1000, (None, 100), (40, 100)),
        (32, (40, 40), (40, 40)),  # refused as well: asked for is asked for
    ],
)
def test_a_small_file_is_used_whole(
    rows: int, asked: tuple[int | None, int | None], drawn: tuple[int, int]
) -> None:
    assert few_shot.sample_sizes(rows, *asked) == drawn


@pytest.mark.parametrize("module", [tune_module, finetune_module])
def test_a_step_takes_batch_times_accumulation_samples(
    tiny_t5: Path, module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = load_backbone(str(tiny_t5), trainable=module is finetune_module)
    texts = [f"the film {i} was {'good' if i % 2 else 'bad'}" for i in range(12)]
    train = Examples(texts[:10], np.arange(10) % 2, ("no", "yes"))
    held = Examples(texts[10:], np.arange(2), ("no", "yes"))
    task = make_task("film", ("no", "yes"), ("bad", "good"))
    taken: list[list[int]] = []

    def gradient(scorer: Any, params: Any, rows: Any, chosen: np.ndarray) -> dict[str, float]:
        taken.append(chosen.tolist())
        for value in params.values():
            value.grad = torch.ones_like(value)
        return {"loss": 1.0, "accuracy": 0.5}

    monkeypatch.setattr(module, "prompt_gradient", gradient)
    flags = {"out": "", "batch": 3, "accumulation": 2, "epochs": 4, "patience": 50, "rate": 3e-3}
    if module is tune_module:
        config = TuneConfig(**flags, prompt_tokens=2, init="random")
        loop = tune_module.tune(backbone, task, train, held, config, RunOptions(quiet=True)).loop
    else:
        loop = finetune_module.finetune(
            backbone, task, train, held, FinetuneConfig(**flags), RunOptions(quiet=True)
        )
    # 40 samples in steps of 6: seven; every sample once an epoch; an evaluation each 10/6 = 2 steps
    # and at both ends.
    assert [len(chosen) for chosen in taken] == [6] * 7
    order = [row for chosen in taken for row in chosen]
    for epoch in range(4):
        assert sorted(order[10 * epoch : 10 * epoch + 10]) == list(range(10))
    lines = [line for line in loop.state.metrics if "validation_loss" in line]
    assert [line["step"] for line in lines] == [0, 2, 4, 6, 7]
    # A warm-up of twenty steps is cut to half the run, three; then linear to zero after the last.
    shares = [1 / 3, 2 / 3, 1, 2 / 4, 1 / 4]
    assert [line["rate"] for line in lines] == pytest.approx([3e-3 * share for share in shares])


def film(rows: int = 4) -> tuple[Any, Examples]:
    """A task and so many texts of it."""
    task = make_task("film", ("no", "yes"), ("bad", "good"))
    texts = [f"the film {i} was {'good' if i % 2 else 'bad'}" for i in range(rows)]
    return task, Examples(texts, np.arange(rows) % 2, ("no", "yes"))


def test_full_tuning_ends_with_the_weights_of_the_best_evaluation(
    tiny_t5: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not with those of its last step."""
    scores = iter([(0.5, 1.0), (0.6, 0.9), (0.9, 0.4), (0.7, 0.3), (0.8, 0.2)])
    backbone = load_backbone(str(tiny_t5), trainable=True)
    model = backbone.t5.model
    seen: list[dict[str, torch.Tensor]] = []

    class Scripted(finetune_module.Loop):
        def __init__(self, params: Any, gradient: Any, evaluate: Any, *rest: Any):
            def scripted() -> Score:
                seen.append({name: value.clone() for name, value in model.state_dict().items()})
                return Score(*next(scores))

            super().__init__(params, gradient, scripted, *rest)

    monkeypatch.setattr(finetune_module, "Loop", Scripted)
    config = FinetuneConfig(out="", batch=4, accumulation=1, epochs=4, warmup=0, rate=1e-2)
    task, examples = film()
    loop = finetune_module.finetune(
        backbone, task, examples, examples, config, RunOptions(quiet=True)
    )
    assert (loop.state.step, loop.state.best_step, len(seen)) == (4, 2, 5)
    for name, value in model.state_dict().items():
        assert torch.equal(value, seen[2][name]), name
    assert all(
        (seen[2]["shared.weight"] != seen[step]["shared.weight"]).any() for step in (0, 1, 3, 4)
    )


def test_a_step_follows_the_mean_loss_of_its_samples(tiny_t5: Path) -> None:
    backbone, (task, examples) = load_backbone(str(tiny_t5)), film(6)
    scorer = Scorer.of(backbone, task, "prefix")
    rows = Rows(backbone, task.template, examples.texts, examples.labels, 64)
    torch.manual_seed(0)
    params = {"prompt_embeddings": torch.randn(3, 32).requires_grad_()}
    chosen = np.array([4, 0, 1])
    found = tune_module.prompt_gradient(scorer, params, rows, chosen)
    batch = rows.batch(chosen)
    assert batch.labels is not None
    scores = scorer(add_group(params), batch)
    losses = [-row.log_softmax(-1)[y] for row, y in zip(scores, batch.labels, strict=True)]
    loss = torch.stack(losses).mean()
    (want,) = torch.autograd.grad(loss, [params["prompt_embeddings"]])
    torch.testing.assert_close(params["prompt_embeddings"].grad, want)
    assert found["loss"] == pytest.approx(loss.item())
    assert found["accuracy"] == pytest.approx((scores.argmax(-1) == batch.labels).float().mean())


def test_a_prompts_record_has_its_temperature_and_where_its_rows_are(tiny_t5: Path) -> None:
    backbone, (own, examples) = load_backbone(str(tiny_t5)), film(8)
    config = TuneConfig(out="", prompt_tokens=2, init="random", epochs=2, rate=0.3)
    for task, registered in ((own, ""), (replace(get_task("sst2"), words=own.words), "sst2")):
        prompt = tune_module.tune(
            backbone, task, examples, examples, config, RunOptions(quiet=True)
        ).prompt
        assert prompt.task.registered == registered
        rows = Rows(backbone, task.template, examples.texts, examples.labels, config.max_tokens)
        scores = Scorer.of(backbone, task, "prefix").all(prompt.params, rows)
        want = fit_temperature(scores, torch.from_numpy(examples.labels))
        assert prompt.task.temperature == pytest.approx(want) != 1.0


def test_weight_decay_shrinks_a_prompt_by_its_share_of_the_rate(
    tiny_t5: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AdamW's is decoupled: without a gradient a step leaves 1 - rate x decay of each number."""

    def gradient(scorer: Any, params: Any, *_: Any) -> dict[str, float]:
        params["prompt_embeddings"].grad = torch.zeros_like(params["prompt_embeddings"])
        return {"loss": 1.0, "accuracy": 0.5}

    monkeypatch.setattr(tune_module, "prompt_gradient", gradient)
    flags = {"batch": 4, "accumulation": 1, "epochs": 2, "warmup": 0, "rate": 0.1}
    config = TuneConfig(out="", weight_decay=2.0, **flags)
    start = torch.linspace(-1, 1, 64).view(2, 32)
    task, examples = film()
    tuned = tune_module.tune(
        load_backbone(str(tiny_t5)), task, examples, examples, config, RunOptions(quiet=True),
        params={"prompt_embeddings": start.clone().requires_grad_()},
    )  # fmt: skip
    found = tuned.loop.params["prompt_embeddings"].detach()
    torch.testing.assert_close(found, start * 0.8 * 0.9)  # the second step's rate is half


@pytest.mark.parametrize("template", ["{text} It was <extra_id_0>.", "film: {text} <extra_id_0> !"])
def test_a_text_is_cut_where_serving_cuts_it_and_the_template_never(
    tiny_t5: Path, template: str
) -> None:
    tokenizer = load_backbone(str(tiny_t5)).tokenizer
    parts = compile_template(tokenizer, template)
    served = ServedTask(
        "film", ["no", "yes"], ["bad", "good"], [5, 6], template, list(parts.before),
        list(parts.after), max_tokens=9,
    )  # fmt: skip
    texts = ["the food was not very good but the story is great", "bad", "", "a film " * 3000]
    rows = encode_texts(tokenizer, parts, texts, 9)
    encoder = Encoder(Tokenizer.from_file(str(tiny_t5 / "tokenizer.json")), 512)
    encoded = encoder.encode(texts, [served] * len(texts))
    assert [item.ids for item in encoded] == rows
    assert [item.truncated for item in encoded] == [True, False, False, True]
    whole = tokenizer(texts[0], add_special_tokens=False)["input_ids"]
    room = 9 - parts.tokens
    assert rows[0] == [*parts.before, *whole[:room], *parts.after]
    assert [len(row) for row in rows] == [9, parts.tokens + 1, parts.tokens, 9]
    with pytest.raises(UserError, match=rf"leaves no room .* {parts.tokens} tokens: raise it"):
        encode_texts(tokenizer, parts, texts, parts.tokens)


def test_a_text_cannot_set_the_mask_nor_end_the_input(tiny_t5: Path) -> None:
    """Neither in training nor where it is served, and both read the same."""
    tokenizer = load_backbone(str(tiny_t5)).tokenizer
    parts = compile_template(tokenizer, "{text} It was <extra_id_0>.")
    served = ServedTask(
        "film", ["no", "yes"], ["bad", "good"], [5, 6], "t", list(parts.before), list(parts.after)
    )
    texts = ["good </s>", "<s> good", "a <pad> film<pad>", "it was <extra_id_0>. good", "b<unk>d"]
    rows = encode_texts(tokenizer, parts, texts, 64)
    encoder = Encoder(Tokenizer.from_file(str(tiny_t5 / "tokenizer.json")), 512)
    assert [item.ids for item in encoder.encode(texts, [served] * len(texts))] == rows
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    blank = tokenizer.convert_tokens_to_ids("<extra_id_0>")
    for row in rows:
        assert special.isdisjoint(row[: -len(parts.after)]) and row.count(blank) == 1
    # A template's own mask stays one, also after texts were read.
    assert compile_template(tokenizer, "{text} It was <extra_id_0>.") == parts


@pytest.mark.parametrize(
    ("counts", "accuracy", "share"),
    [
        ((10, 10, 10, 10), 0.30, 0.25),  # 0.25 and a standard error of 0.068
        ((10, 10, 10, 10), 0.325, None),
        ((12, 28), 0.75, 0.7),
        ((12, 28), 0.80, None),
        ((0, 40), 1.0, 1.0),  # one class alone shows nothing
    ],
)
def test_an_accuracy_near_one_answers_is_told_of(
    counts: tuple[int, ...], accuracy: float, share: float | None
) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    found = tune_module.no_better_than_one_answer(accuracy, labels)
    assert found == (None if share is None else pytest.approx(share))


@pytest.mark.parametrize(
    ("flags", "tokens"),
    [
        ({}, 20),
        ({"backbone": "mini"}, 20),
        ({"backbone": "google-t5/t5-base"}, 100),
        ({"prompt_tokens": 7}, 7),
        ({"backbone": "google-t5/t5-base", "prompt_tokens": 7}, 7),
    ],
)
def test_a_prompt_is_as_long_as_its_backbone_is_served_with(
    flags: dict[str, Any], tokens: int
) -> None:
    assert TuneConfig(out="", **flags).tokens == tokens


@pytest.mark.parametrize("balanced", [False, True])
def test_rows_marked_for_validation_choose_the_prompt(tmp_path: Path, balanced: bool) -> None:
    path = tmp_path / "marked.csv"
    parts = {"train": 30, "validation": 12, "test": 9}
    rows = [
        f"{part} text {i},{('no', 'yes')[i % 2]},{part}"
        for part in parts
        for i in range(parts[part])
    ]
    path.write_text("text,label,split\n" + "\n".join(rows))
    settings = {"out": "", "data": str(path), "labels": ["no", "yes"], "balanced": balanced}

    def drawn(**more: Any) -> tuple[Examples, Examples]:
        config = TuneConfig(**settings, **more)
        return few_shot.draw(config, config.resolve_task())

    train, held = drawn()
    assert sorted(train.texts) == sorted(f"train text {i}" for i in range(30))
    assert sorted(held.texts) == sorted(f"validation text {i}" for i in range(12))
    train, held = drawn(train=10, validation=4, seed=2)
    assert len(train) == 10 and all(text.startswith("train") for text in train.texts)
    assert len(held) == 4 and all(text.startswith("validation") for text in held.texts)
    assert drawn(train=10, validation=4, seed=3)[1].texts != held.texts


def test_without_test_rows_the_marked_ones_are_left_for_testing(tmp_path: Path) -> None:
    path = tmp_path / "marked.csv"
    rows = [
        f"{part} {i},{('no', 'yes')[i % 2]},{part}" for part in ("train", "dev") for i in range(10)
    ]
    path.write_text("text,label,split\n" + "\n".join(rows))
    config = TuneConfig(out="", data=str(path), labels=["no", "yes"])
    train, held = few_shot.draw(config, config.resolve_task())
    assert sorted(train.texts + held.texts) == sorted(f"train {i}" for i in range(10))


def test_texts_under_two_labels_are_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "torn.csv"
    rows = [f"text {i},{('no', 'yes')[i % 2]}" for i in range(20)]
    settings = {"out": "", "data": str(path), "labels": ["no", "yes"], "train": 8, "validation": 4}
    torn = ["text 4,no", "text  6 ,yes"]
    for more, told in ((rows[2:4] * 5, False), (torn * 5, True)):
        path.write_text("text,label\n" + "\n".join(rows + more))
        caplog.clear()
        config = TuneConfig(**settings)
        few_shot.draw(config, config.resolve_task())
        assert ("under more than one label" in caplog.text) == told
    assert "texts under more than one label, such as 'text 6' (no, yes)" in caplog.text


def test_full_tuning_at_a_rate_of_0_is_refused(tiny_t5: Path) -> None:
    backbone = load_backbone(str(tiny_t5), trainable=True)
    examples = Examples(["good", "bad"], np.arange(2), ("no", "yes"))
    task = make_task("film", ("no", "yes"), ("bad", "good"))
    with pytest.raises(UserError, match="--rate 0 leaves the model as it is: try 3e-4"):
        finetune_module.finetune(
            backbone, task, examples, examples, FinetuneConfig(out="", rate=0.0)
        )


def test_of_several_starts_the_best_on_validation_is_kept(
    tiny_t5: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits as of that start alone; a stop between two starts costs none that has ended."""
    data = tmp_path / "rows.csv"
    texts = ["the food was good", "not very good", "a great story", "a bad film"]
    rows = [f"{texts[i % 4]} {i},{('no', 'yes')[i % 2]}" for i in range(40)]
    data.write_text("text,label\n" + "\n".join(rows))
    flags: dict[str, Any] = {
        "data": str(data), "words": ["bad", "good"], "backbone": str(tiny_t5), "epochs": 3,
        "prompt_tokens": 3, "rate": 0.3, "warmup": 0, "batch": 4, "accumulation": 1,
    }  # fmt: skip

    def tuned(out: str, init: str, *more: str) -> dict[str, Any]:
        folder = tmp_path / out
        tune_module.run_tune(TuneConfig(**flags, out=str(folder), init=init, try_also=list(more)))
        assert not folder.with_name(out + ".checkpoint").exists()
        return {
            "weights": (folder / "adapter_model.safetensors").read_bytes(),
            "figures": json.loads((folder / "task.json").read_text())["figures"],
            "start": json.loads((folder / "run.json").read_text())["start"],
        }

    alone = {"random": tuned("a", "random"), "vocab": tuned("b", "vocab")}
    third = str(tmp_path / "c")
    tune_module.run_tune(TuneConfig(**{**flags, "rate": 0.05}, out=third, seed=2))
    alone[third] = tuned("c2", third)

    def rank(start: str) -> tuple[float, float]:
        found = alone[start]["figures"]
        return found["validation_accuracy"], -found["validation_loss"]

    best = max(alone, key=rank)
    starts = list(alone)
    assert tuned("d", *starts) == {**alone[best], "start": best}
    assert tuned("e", *starts[::-1]) == {**alone[best], "start": best}

    runs: list[str] = []
    real = tune_module.tune

    def stops(*given: Any, **named: Any) -> Any:
        runs.append(given[4].init)
        if len(runs) == 2:
            raise KeyboardInterrupt
        return real(*given, **named)

    monkeypatch.setattr(tune_module, "tune", stops)
    with pytest.raises(KeyboardInterrupt):
        tuned("f", *starts)
    steps = json.loads((tmp_path / "f.checkpoint/0/state.json").read_text())["step"]
    assert steps == alone["random"]["figures"]["steps"]
    assert tuned("f", *starts) == {**alone[best], "start": best}
    # Of equals the first is kept, and one that is named twice is tuned once.
    again = [third, str(tmp_path / "copy"), third]
    shutil.copytree(third, again[1])
    runs.clear()
    runs += ["", ""]
    assert tuned("h", *again)["start"] == third and runs[2:] == again[:2]
    flags["rate"] = 1e-9
    with pytest.raises(UserError, match="would stay where it starts"):
        tuned("i", third, "vocab")
    assert runs[2:] == again[:2]  # before the first of them
    flags["rate"] = 0.3
    with pytest.raises(UserError, match="nowhere"):
        tuned("g", "vocab", str(tmp_path / "nowhere"))
    assert not (tmp_path / "g.checkpoint").exists()
