"""The trainer's commands as a user runs them, and what they say to bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import trainer.tune as trainer_tune
from serve.cli import run
from trainer.__main__ import commands
from trainer.backbone import load_backbone
from trainer.data import load_examples
from trainer.few_shot import draw_few_shot
from trainer.modes import add_group
from trainer.prompt import load_prompt
from trainer.readout import class_scores, collate, compile_template, encode_texts, word_ids

Trainer = Callable[..., tuple[int, str, str]]


@pytest.fixture
def trainer(capsys: pytest.CaptureFixture[str]) -> Trainer:
    def call(*args: object) -> tuple[int, str, str]:
        argv = [str(arg) for arg in args]
        capsys.readouterr()
        code = run("python -m trainer", "", commands(argv), argv)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture(scope="session")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 made-up sentences whose last word tells the class."""
    generator = np.random.default_rng(0)
    nouns, words = ["film", "food", "story", "room"], [["bad", "awful"], ["good", "great"]]
    lines = ["text,label"]
    for _ in range(400):
        label = int(generator.integers(2))
        word = generator.choice(words[label])
        lines.append(f"the {generator.choice(nouns)} was {word},{label}")
    path = tmp_path_factory.mktemp("data") / "reviews.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def tune_flags(tiny_t5: Path, reviews: Path, tmp_path: Path) -> list[object]:
    return [
        "tune", "--data", reviews, "--labels", "negative", "positive", "--words", "bad", "good",
        "--backbone", tiny_t5, "--prompt-tokens", 4, "--rate", 0.03, "--out", tmp_path / "prompt",
    ]  # fmt: skip


def test_tune_then_evaluate(trainer: Trainer, tune_flags: list[object], tmp_path: Path) -> None:
    code, _, err = trainer(*tune_flags)
    assert code == 0, err
    assert sorted(f.name for f in (tmp_path / "prompt").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "metrics.jsonl", "run.json", "task.json"
    ]  # fmt: skip
    assert not (tmp_path / "prompt.checkpoint").exists()
    task = json.loads((tmp_path / "prompt" / "task.json").read_text())
    assert task["labels"] == ["negative", "positive"] and task["mode"] == "prefix"
    code, out, err = trainer(
        "evaluate", tmp_path / "prompt", "--data", tune_flags[2], "--json", tmp_path / "e.json"
    )
    assert code == 0, err
    figures = json.loads((tmp_path / "e.json").read_text())
    confusion = np.array(figures["confusion"])
    assert figures["accuracy"] == pytest.approx(np.trace(confusion) / confusion.sum())
    assert "macro-F1" in out and "calibration error" in out
    # The same accuracy, one text at a time and without the trainer's batches.
    backbone = load_backbone(str(tune_flags[10]))
    prompt = load_prompt(tmp_path / "prompt")
    rows = load_examples(str(tune_flags[2]), labels=["negative", "positive"], split="test")
    template = compile_template(backbone.tokenizer, "{text} It was <extra_id_0>.")
    words = torch.tensor(word_ids(backbone.tokenizer, ["bad", "good"]))

    def scores(texts: list[str]) -> torch.Tensor:
        params = add_group(prompt.params)
        found = [
            class_scores(
                backbone.t5, "prefix", params,
                collate(encode_texts(backbone.tokenizer, template, [text], 64)), words,
                backbone.decoder_ids,
            )
            for text in texts
        ]  # fmt: skip
        return torch.cat(found).detach().double()

    def loss(logits: torch.Tensor, labels: np.ndarray, temperature: float) -> float:
        chosen = torch.log_softmax(logits / temperature, 1)[range(len(labels)), labels]
        return -float(chosen.mean())

    logits = scores(rows.texts)
    hits = (logits.argmax(1).numpy() == rows.labels).sum()
    assert figures["accuracy"] == pytest.approx(hits / len(rows))
    # The confidences are those at the temperature that fits the validation samples best.
    assert figures["loss"] == pytest.approx(
        loss(logits, rows.labels, task["temperature"]), abs=1e-4
    )
    pool = load_examples(str(tune_flags[2]), labels=["negative", "positive"], split="train")
    chosen = pool.take(draw_few_shot(pool, seed=1)[1])
    held = scores(chosen.texts)
    grid = [loss(held, chosen.labels, t) for t in np.geomspace(0.1, 10, 400)]
    assert loss(held, chosen.labels, task["temperature"]) == pytest.approx(min(grid), abs=1e-3)
    assert abs(np.log(task["temperature"])) > 0.05


@pytest.mark.parametrize("command", ["tune", "finetune"])
def test_what_was_not_learned_is_told_of(
    trainer: Trainer, tiny_t5: Path, tmp_path: Path, command: str,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    path = tmp_path / "reviews.csv"
    path.write_text("text,label\n" + "".join(f"film {i} was here,{i % 2}\n" for i in range(200)))
    more = ["--prompt-tokens", 4, "--rate", 0.03] if command == "tune" else ["--rate", 1e-4]
    code, _, err = trainer(
        command, "--data", path, "--labels", "no", "yes", "--words", "bad", "good", "--epochs", 1,
        "--backbone", tiny_t5, "--out", tmp_path / "out", *more,
    )  # fmt: skip
    assert code == 0, err
    assert "hardly more than one answer" in caplog.text and "--backbone" in caplog.text


def test_config_repeats_a_run(trainer: Trainer, tune_flags: list[object], tmp_path: Path) -> None:
    assert trainer(*tune_flags, "--epochs", 20)[0] == 0
    first = load_file(tmp_path / "prompt" / "adapter_model.safetensors")
    again = tmp_path / "again"
    code, _, err = trainer("tune", "--config", tmp_path / "prompt" / "run.json", "--out", again)
    assert code == 0, err
    second = load_file(again / "adapter_model.safetensors")
    assert torch.equal(first["prompt_embeddings"], second["prompt_embeddings"])
    assert (again / "metrics.jsonl").read_text() == (
        tmp_path / "prompt" / "metrics.jsonl"
    ).read_text()


def test_a_killed_run_resumes_to_the_same_bits(
    trainer: Trainer, tune_flags: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert trainer(*tune_flags, "--epochs", 30)[0] == 0
    whole = load_file(tmp_path / "prompt" / "adapter_model.safetensors")
    metrics = (tmp_path / "prompt" / "metrics.jsonl").read_bytes()

    real = trainer_tune.prompt_gradient
    calls = iter(range(100))

    def killed(*args: object) -> dict[str, float]:
        if next(calls) == 11:
            raise KeyboardInterrupt
        return real(*args)

    resumed = [*tune_flags[:-1], tmp_path / "resumed", "--epochs", 30]
    monkeypatch.setattr(trainer_tune, "prompt_gradient", killed)
    code, _, err = trainer(*resumed)
    assert code == 130 and "interrupted" in err
    assert not (tmp_path / "resumed").exists() and (tmp_path / "resumed.checkpoint").is_dir()
    monkeypatch.setattr(trainer_tune, "prompt_gradient", real)
    assert trainer(*resumed)[0] == 0
    again = load_file(tmp_path / "resumed" / "adapter_model.safetensors")
    assert torch.equal(whole["prompt_embeddings"], again["prompt_embeddings"])
    assert (tmp_path / "resumed" / "metrics.jsonl").read_bytes() == metrics


@pytest.fixture(scope="session")
def clusters(tmp_path_factory: pytest.TempPathFactory, reviews: Path) -> Path:
    import pandas as pd

    frame = pd.read_csv(reviews)
    frame["cluster"] = np.arange(len(frame)) % 3
    path = tmp_path_factory.mktemp("clusters") / "clusters.parquet"
    frame.to_parquet(path)
    return path


@pytest.mark.parametrize("mode", ["full", "prefix", "deep"])
@pytest.mark.parametrize("command", ["meta", "pretrain"])
def test_source_training_improves_on_its_start(
    trainer: Trainer, tiny_t5: Path, clusters: Path, tmp_path: Path, command: str, mode: str
) -> None:
    code, _, err = trainer(
        command, "--data", clusters, "--backbone", tiny_t5, "--mode", mode, "--prompt-tokens", 4,
        "--steps", 40, "--evaluate-every", 10, "--out", tmp_path / "p",
    )  # fmt: skip
    assert code == 0, err
    metrics = [json.loads(line) for line in (tmp_path / "p" / "metrics.jsonl").open()]
    assert [line["step"] for line in metrics] == [0, 10, 20, 30, 40][: len(metrics)]
    assert min(m["validation_loss"] for m in metrics) < metrics[0]["validation_loss"]
    record = json.loads((tmp_path / "p" / "task.json").read_text())
    assert record["method"] == ("metapt" if command == "meta" else "ppt")
    assert record["words"] == ["bad", "good"]


def test_finetune_then_evaluate(
    trainer: Trainer, tune_flags: list[object], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data, backbone = tune_flags[2], tune_flags[10]
    code, _, err = trainer(
        "finetune", "--data", data, "--labels", "negative", "positive", "--words", "bad", "good",
        "--backbone", backbone, "--out", tmp_path / "full", "--rate", 1e-3, "--epochs", 40,
    )  # fmt: skip
    assert code == 0, err
    assert "hardly more" not in caplog.text
    code, out, err = trainer("evaluate", tmp_path / "full", "--data", data, "--json", "-")
    assert code == 0, err
    assert json.loads(out)["accuracy"] > 0.9


# -- bad input -----------------------------------------------------------------------------------


def one_line(err: str) -> str:
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in err, err
    return lines[0]


def replaced(flags: list[object], name: str, *values: object) -> list[object]:
    """The flags with another value (or values) of one of them."""
    start = flags.index(name)
    stop = start + 1
    while stop < len(flags) and not str(flags[stop]).startswith("--"):
        stop += 1
    return [*flags[:start], name, *values, *flags[stop:]]


@pytest.mark.parametrize(
    ("flag", "values", "says"),
    [
        ("--words", ["bad", "goodness"], "label word 'goodness' is"),
        ("--words", ["bad", "bad"], "bad"),
        ("--words", ["bad"], "label"),
        ("--backbone", ["./nowhere"], "./nowhere does not exist"),
        ("--data", ["nowhere.csv"], "nowhere.csv"),
        ("--rate", [1e-9], "would stay where it starts"),
        ("--rate", ["fast"], "--rate takes a number"),
        ("--prompt-tokens", [0], "--prompt-tokens must be at least 1"),
        ("--labels", ["negative"], "label '1' is not one of negative"),
    ],
)
def test_wrong_flags(
    trainer: Trainer, tune_flags: list[object], tmp_path: Path, flag: str, values: list[object],
    says: str,
) -> None:  # fmt: skip
    code, _, err = trainer(*replaced(tune_flags, flag, *values))
    assert code == 2 and says in one_line(err)
    assert not (tmp_path / "prompt").exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "reviews.csv is empty"),
        (b"text,label\n", "has no rows"),
        (b"words,label\na,0\n", "has no column 'text': it has words, label"),
        (b"text,label\nthe film,7\nthe food,0\n", "label '7' is not one of negative, positive"),
        (b"text,label\nthe \xe9t\xe9,1\n", "is not UTF-8"),
        (b"text,label\n" + b"the film was good,1\n" * 100, "no sample of class 'negative'"),
    ],
)
def test_wrong_files(
    trainer: Trainer, tune_flags: list[object], tmp_path: Path, content: bytes, says: str
) -> None:
    path = tmp_path / "reviews.csv"
    path.write_bytes(content)
    code, _, err = trainer(*replaced(tune_flags, "--data", path))
    line = one_line(err)
    assert code == 2 and says in line.replace(str(tmp_path), "") and "reviews.csv" in line
    assert not (tmp_path / "prompt").exists()


def test_more_samples_than_rows(trainer: Trainer, tune_flags: list[object], tmp_path: Path) -> None:
    path = tmp_path / "reviews.csv"
    path.write_text("text,label\n" + "".join(f"film {i} was fine,{i % 2}\n" for i in range(20)))
    code, _, err = trainer(*replaced(tune_flags, "--data", path), "--train", 40)
    assert code == 2 and "40 + 1 are to be drawn: pass --train" in one_line(err)


def test_unknown_task_lists_the_known(trainer: Trainer, tmp_path: Path) -> None:
    code, _, err = trainer("tune", "--task", "sst3", "--out", tmp_path / "p")
    assert code == 2 and "sst2" in one_line(err)


def test_a_prompt_of_another_backbone(
    trainer: Trainer, tune_flags: list[object], tiny_t5_v11: Path, tmp_path: Path
) -> None:
    assert trainer(*tune_flags, "--epochs", 5)[0] == 0
    code, _, err = trainer(
        "evaluate", tmp_path / "prompt", "--data", tune_flags[2], "--backbone", tiny_t5_v11
    )
    assert code == 2 and "other weights" in one_line(err)


def test_a_damaged_prompt(trainer: Trainer, tune_flags: list[object], tmp_path: Path) -> None:
    assert trainer(*tune_flags, "--epochs", 5)[0] == 0
    weights = tmp_path / "prompt" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    code, _, err = trainer("evaluate", tmp_path / "prompt", "--data", tune_flags[2])
    assert code == 1 and "adapter_model.safetensors is damaged" in one_line(err)


def test_a_disk_that_takes_no_more(tune_flags: list[object], tmp_path: Path) -> None:
    """A limit on the size of files stands in for a full disk: writes fail in the same place."""
    script = (
        "import resource, signal, sys\n"
        "from serve.cli import run\nfrom trainer.__main__ import commands\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))\n"
        "sys.exit(run('t', '', commands(sys.argv[1:]), sys.argv[1:]))\n"
    )
    argv = [sys.executable, "-c", script, *map(str, tune_flags), "--epochs", "5"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1, done.stderr
    assert "adapter_model.safetensors" in one_line(done.stderr)
    assert [entry.name for entry in tmp_path.iterdir()] == []
