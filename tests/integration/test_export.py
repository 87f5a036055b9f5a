"""Bundles on tiny T5s: what is written answers as the trainer does, or is not written."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from conftest import make_tiny_t5
from safetensors.torch import save_file

import exporter.export as export_module
from exporter import edit, verify
from exporter.__main__ import BundleConfig, run_bundle
from exporter.export import export_bundle, prepare
from exporter.single import export_single
from serve import bundle as bundles
from serve.classifier import Classifier
from serve.errors import Failure, UserError
from trainer.backbone import Backbone, load_backbone
from trainer.modes import deepen
from trainer.prompt import Prompt, TaskRecord, save_prompt
from trainer.readout import class_scores, collate, compile_template, encode_texts, word_ids

TEXTS = ["the food was good", "a film", "", "is this plot not very bad , it was " * 9, "a room ."]
WORDS = {"film": ["great", "terrible"], "food": ["bad", "okay", "good"]}


def make_prompts(backbone: Backbone, mode: str) -> dict[str, Prompt]:
    generator = torch.Generator().manual_seed(5)
    prompts = {}
    for name, tokens in (("film", 6), ("food", 4)):
        params = {"prompt_embeddings": torch.randn(tokens, 32, generator=generator)}
        if mode == "deep":
            params = {key: value * 1.1 for key, value in deepen(backbone.t5, params).items()}
        labels = [word.upper() for word in WORDS[name]]
        prompts[name] = Prompt(params, TaskRecord(name, labels, WORDS[name], mode=mode))
    return prompts


def expected(backbone: Backbone, prompt: Prompt, text: str) -> np.ndarray:
    """Probabilities by the trainer's own functions, one text at a time."""
    template = compile_template(backbone.tokenizer, prompt.task.template)
    batch = collate(encode_texts(backbone.tokenizer, template, [text], 512))
    words = torch.tensor(word_ids(backbone.tokenizer, prompt.task.words))
    params = {key: value[None] for key, value in prompt.params.items()}
    with torch.no_grad():
        scores = class_scores(
            backbone.t5, prompt.task.mode, params, batch, words, backbone.decoder_ids
        )
    return scores[0].softmax(-1).numpy()


class Exported:
    """A bundle with what it was made of."""

    def __init__(self, folder: Path, kind: str, mode: str, layers: int, **options: Any) -> None:
        self.backbone = load_backbone(
            str(make_tiny_t5(folder / "t5", kind=kind, layers=layers, seed=layers))
        )
        self.prompts = make_prompts(self.backbone, mode)
        self.folder = folder / "bundle"
        prompts = list(self.prompts.values())
        self.bundle = export_bundle(prompts, self.backbone, self.folder, **options)


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("prefix")
    (folder / "v.csv").write_text(
        "text,label\nthe food was good,GREAT\nthis film is bad,TERRIBLE\n"
    )
    return Exported(
        folder, "v1.0", "prefix", 2, precisions=("fp32", "int8", "fp16"),
        validation=str(folder / "v.csv"), task="film", force=True,
    )  # fmt: skip


@pytest.fixture(scope="module", params=["prefix", "full", "deep"])
def exported(
    request: pytest.FixtureRequest, prefix: Exported, tmp_path_factory: pytest.TempPathFactory
) -> Exported:
    if request.param == "prefix":
        return prefix
    folder = tmp_path_factory.mktemp(request.param)
    # One layer in `full`: the first decoder layer, with its constants, is then the last as well.
    return Exported(folder, "v1.1", request.param, 1 if request.param == "full" else 2)


def test_the_bundle_answers_as_the_trainer_does(exported: Exported) -> None:
    classifier = Classifier(exported.folder, threads=1, max_rows=4)
    names = ["film", "food", "food", "film", "food"]
    for text, name, result in zip(TEXTS, names, classifier.classify(TEXTS, names), strict=True):
        want = expected(exported.backbone, exported.prompts[name], text)
        got = np.array(list(result.probabilities.values()))
        np.testing.assert_allclose(got, want, atol=1e-5)
        alone = classifier.classify([text], name)[0]
        np.testing.assert_allclose(list(alone.probabilities.values()), want, atol=1e-5)
    assert exported.bundle.header["precisions"]["fp32"]["max_logit_difference"] < 1e-4


def test_graphs_share_one_weights_file_and_name_no_source(prefix: Exported) -> None:
    graphs = [prefix.folder / name for name in ("model.onnx", "prefix.onnx")]
    held: list[dict[str, int]] = []
    for path in graphs:
        model = onnx.load(path, load_external_data=False)
        files = [{e.key: e.value for e in t.external_data} for t in model.graph.initializer]
        assert {entry["location"] for entry in files if entry} == {"weights.data"}
        held.append(
            {
                tensor.name: int(entry["offset"])
                for tensor, entry in zip(model.graph.initializer, files, strict=True)
                if entry
            }
        )
        assert ".py" not in path.read_bytes().decode("latin-1")
    shared = set(held[0]) & set(held[1])
    assert {"encoder.attention.0.w_qkv", "encoder.feed.1.w_out"} <= shared
    assert all(held[0][name] == held[1][name] for name in shared)


def test_lower_precisions_keep_a_task_in_half_the_memory(prefix: Exported) -> None:
    whole, *others = (Classifier(prefix.folder, name, threads=1).bank.slot_bytes
                      for name in ("fp32", "int8", "fp16"))  # fmt: skip
    assert [2 * other for other in others] == [whole, whole]


def test_every_precision_is_measured(prefix: Exported) -> None:
    figures = prefix.bundle.header["precisions"]
    # 4 in each of 2 encoder layers. Of the first decoder layer, whose self-attention and question
    # to the encoder are constants, cross-attention's output and the feed-forward's two; of the
    # second also the self-attention's two and the question.
    assert figures["int8"]["quantized_products"] == 2 * 4 + 3 + 6 + 3  # the last: per head
    assert figures["fp16"]["wide_products"] == 4  # the feed-forward outputs
    for name in ("int8", "fp16"):
        measured = figures[name]["validation"]
        assert measured["texts"] == 2 and measured["task"] == "film"
        assert 0 < measured["max_logit_difference"] < 0.5
    low = Classifier(prefix.folder, "int8", threads=1).classify(TEXTS, "food")
    plain = Classifier(prefix.folder, threads=1).classify(TEXTS, "food")
    for one, other in zip(low, plain, strict=True):
        assert one.score == pytest.approx(other.score, abs=0.05)
        assert one.probabilities != other.probabilities


def test_a_precision_that_loses_too_much_is_refused(
    prefix: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the graphs of the bundle at hand, so that nothing is traced again."""
    source = prefix.folder
    graphs = onnx.load(source / "model.onnx"), onnx.load(source / "prefix.onnx")
    monkeypatch.setattr(export_module, "served_graphs", lambda served, backbone: graphs)
    wrong = lambda plain, other, texts: {  # noqa: E731
        "accuracy_change": -0.02, "max_logit_difference": 1.0, "texts": 100, "task": "film"
    }  # fmt: skip
    monkeypatch.setattr(export_module, "compare", wrong)
    data = tmp_path / "v.csv"
    data.write_text("text,label\nthe food was good,GREAT\nthis film is bad,TERRIBLE\n")
    with pytest.raises(Failure, match=r"int8 loses 2\.0 points .* --force"):
        export_bundle(
            list(prefix.prompts.values()), prefix.backbone, tmp_path / "bundle",
            precisions=["int8"], validation=str(data), task="film",
        )  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["v.csv"]


def test_a_graph_that_differs_from_torch_is_not_written(
    prefix: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = onnx.load(prefix.folder / "model.onnx")
    for tensor in model.graph.initializer:
        if tensor.name == "encoder.final.weight":
            values = onnx.numpy_helper.to_array(tensor) * np.float32(1.01)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    graphs = model, onnx.load(prefix.folder / "prefix.onnx")
    monkeypatch.setattr(export_module, "served_graphs", lambda served, backbone: graphs)
    (tmp_path / "bundle").mkdir()
    with pytest.raises(Failure, match=r"differs from torch by .* nothing was written"):
        export_bundle(list(prefix.prompts.values()), prefix.backbone, tmp_path / "bundle")
    assert list((tmp_path / "bundle").iterdir()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def single_rows(exported: Exported, task: dict[str, Any], text: str) -> dict[str, np.ndarray]:
    """What a caller in another language would give to the file, from what the file says."""
    pieces = exported.backbone.tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = np.array([[*task["prefix_ids"], *pieces, *task["suffix_ids"]]])
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def softmax(logits: np.ndarray) -> np.ndarray:
    odds = np.exp(logits - logits.max(-1, keepdims=True))
    return odds / odds.sum(-1, keepdims=True)


def test_one_file_carries_the_task(prefix: Exported, tmp_path: Path) -> None:
    for kind, name in (("onnx", "food.onnx"), ("torchscript", "food.pt")):
        worst = export_single(prefix.prompts["food"], prefix.backbone, tmp_path / name, kind=kind)
        assert worst < 1e-4
    graph = verify.session(tmp_path / "food.onnx")
    task = json.loads(graph.get_modelmeta().custom_metadata_map["task"])
    assert task["labels"] == ["BAD", "OKAY", "GOOD"]
    feed = single_rows(prefix, task, "the food was good")
    logits = graph.run(None, feed)[0]
    want = expected(prefix.backbone, prefix.prompts["food"], "the food was good")
    np.testing.assert_allclose(softmax(logits)[0], want, atol=1e-5)
    extra = {"task": ""}
    script = torch.jit.load(str(tmp_path / "food.pt"), _extra_files=extra)
    with torch.no_grad():
        same = script(*(torch.tensor(feed[key]) for key in ("input_ids", "attention_mask")))
    np.testing.assert_allclose(logits, same.numpy(), atol=1e-5)
    assert json.loads(extra["task"]) == task


def test_prompts_that_do_not_go_together_are_refused(prefix: Exported, tmp_path: Path) -> None:
    film, food = prefix.prompts.values()
    cases: list[tuple[list[Any], dict[str, Any], str]] = [
        ([], {}, "pass at least one prompt"),
        ([film, film], {}, "two prompts are named 'film'"),
        ([film, food], {"names": ["a"]}, "1 names for 2 prompts"),
        ([film], {"prompt_tokens": 3}, "--prompt-tokens 3 is less than a prompt's 6"),
        ([film, *make_prompts(prefix.backbone, "full").values()], {"names": list("abc")}, "modes"),
        ([Prompt({"prompt_embeddings": torch.ones(2, 7)}, film.task)], {}, "32 wide"),
    ]
    for prompts, options, message in cases:
        with pytest.raises(UserError, match=message):
            prepare(prompts, prefix.backbone, **options)
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty and not a bundle"):
        export_bundle([film], prefix.backbone, tmp_path)
    with pytest.raises(UserError, match="--precision 'int4' is unknown"):
        export_bundle([film], prefix.backbone, tmp_path / "b", precisions=["int4"])
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_what_is_no_part_of_a_bundle_is_not_replaced(prefix: Exported, tmp_path: Path) -> None:
    film, before = prefix.prompts["film"], (prefix.folder / "bundle.json").read_bytes()
    for name in ("letter.txt", "prompts/notes.md", "bert.onnx"):
        (prefix.folder / name).write_text("mine")
        with pytest.raises(UserError, match=f"holds {name}, which is no part of a bundle"):
            export_bundle([film], prefix.backbone, prefix.folder)
        assert (prefix.folder / name).read_text() == "mine"
        (prefix.folder / name).unlink()
    assert (prefix.folder / "bundle.json").read_bytes() == before
    # All that a bundle has, and a writer that was killed leaves, may go: the next check is reached.
    for name in (".bundle.json.12.ab.tmp", "bonnet.json"):
        (prefix.folder / name).write_text("")
    with pytest.raises(UserError, match="'int4' is unknown"):
        export_bundle([film], prefix.backbone, prefix.folder, precisions=["int4"])
    for name in (".bundle.json.12.ab.tmp", "bonnet.json"):
        (prefix.folder / name).unlink()


def test_a_single_file_takes_the_name_and_the_target_of_int8(
    prefix: Exported, tmp_path: Path
) -> None:
    save_prompt(prefix.prompts["food"], tmp_path / "food", prefix.backbone)
    given = {"prompts": [str(tmp_path / "food")], "backbone": prefix.backbone.name}
    file = str(tmp_path / "x.onnx")
    run_bundle(
        BundleConfig(
            **given, single_file=file, names=["My food"], precision=["int8"], int8_target="avx2"
        )
    )
    graph = verify.session(tmp_path / "x.onnx")
    task = json.loads(graph.get_modelmeta().custom_metadata_map["task"])
    assert task["name"] == "my-food"
    for text in ("the food was good", "is this plot not very bad , it was"):
        odds = softmax(graph.run(None, single_rows(prefix, task, text))[0])[0]
        want = expected(prefix.backbone, prefix.prompts["food"], text)
        np.testing.assert_allclose(odds, want, atol=0.05)
        assert odds.argmax() == want.argmax()
    weights = {
        tensor.data_type
        for tensor in onnx.load(file).graph.initializer
        if tensor.name.endswith("_quantized")
    }
    assert weights == {onnx.TensorProto.UINT8}  # `any`, the default, has signed ones


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_tokens": 9}, "--prompt-tokens is of a bundle"),
        ({"validation": "v.csv"}, "--validation is of a bundle"),
        ({"task": "film"}, "--task is of a bundle"),
        ({"text_column": "body"}, "--text-column is of a bundle"),
        ({"label_column": "stars"}, "--label-column is of a bundle"),
        ({"force": True}, "--force is of a bundle"),
        ({"names": ["a", "b"]}, "one of --names"),
        ({"precision": ["fp32", "int8"]}, "one --precision"),
    ],
)
def test_a_single_file_refuses_what_only_a_bundle_can(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        run_bundle(BundleConfig(prompts=["p"], single_file="x.onnx", **options))


def command(*argv: str | Path) -> subprocess.CompletedProcess[str]:
    code = (
        "import sys; from exporter.__main__ import COMMANDS; from serve.cli import run; "
        "code = run('exporter', '', COMMANDS, sys.argv[1:]); "
        "heavy = {'torch', 'transformers', 'onnx'} & set(sys.modules); "
        "assert not heavy, heavy; sys.exit(code)"
    )
    argv = tuple(str(word) for word in argv)
    return subprocess.run(
        [sys.executable, "-c", code, *argv], capture_output=True, text=True, check=False
    )


def test_a_folder_that_may_not_be_replaced_is_said_before_torch_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("mine")
    done = command("bundle", "p", "--out", tmp_path, "--backbone", "none")
    assert done.returncode == 2 and "is not empty and not a bundle" in done.stderr


@pytest.mark.parametrize(("given", "wanted"), [(20, 20), (512, 32)])
def test_a_single_file_says_how_long_its_texts_may_be(
    prefix: Exported, tmp_path: Path, given: int, wanted: int
) -> None:
    film = prefix.prompts["film"]
    tuned = replace(film, task=replace(film.task, max_tokens=32))
    file = tmp_path / "x.onnx"
    export_single(tuned, prefix.backbone, file, max_tokens=given)
    task = json.loads(verify.session(file).get_modelmeta().custom_metadata_map["task"])
    assert task["max_tokens"] == wanted
    with pytest.raises(UserError, match="--max-tokens 3 leaves no room for a text"):
        export_single(tuned, prefix.backbone, file, max_tokens=3)


def test_tasks_come_and_go_without_torch(prefix: Exported, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    folder.mkdir()
    header = prefix.bundle.header
    for path in prefix.folder.iterdir():
        if path.is_file() and path.name not in ("bundle.json", ".lock"):
            (folder / path.name).write_bytes(path.read_bytes())
    bundles.create(folder, header)
    for name, prompt in prefix.prompts.items():
        save_prompt(prompt, tmp_path / name, prefix.backbone)
        done = command("add", folder, tmp_path / name)
        assert done.returncode == 0, done.stderr
    listed = command("list", folder)
    assert "GREAT, TERRIBLE" in listed.stdout and "BAD, OKAY, GOOD" in listed.stdout
    got = Classifier(folder, threads=1).classify(TEXTS[:2], ["food", "film"])
    for name, text, result in zip(("food", "film"), TEXTS, got, strict=False):
        want = expected(prefix.backbone, prefix.prompts[name], text)
        np.testing.assert_allclose(list(result.probabilities.values()), want, atol=1e-5)
    assert command("remove", folder, "food").returncode == 0
    again = command("remove", folder, "food")
    assert again.returncode == 2 and "no task 'food': it has film" in again.stderr
    assert list(bundles.load(folder).tasks) == ["film"]


def test_add_refuses_what_the_bundle_cannot_serve(prefix: Exported, tmp_path: Path) -> None:
    film = prefix.prompts["film"]
    cases = [
        (make_prompts(prefix.backbone, "full")["film"], {}, "trained in mode 'full'"),
        (film, {"backbone_sha256": "0" * 64}, "was trained on backbone"),
        (Prompt({"prompt_embeddings": torch.ones(7, 32)}, film.task), {}, "1 to 6 prompt tokens"),
        (film, {"words": ["great", "abysmal"]}, "'abysmal' is 7 tokens"),
        (film, {"backbone_sha256": True}, "'backbone_sha256' must be text"),
    ]
    save_prompt(film, tmp_path / "named", prefix.backbone)
    before = (prefix.folder / "bundle.json").read_bytes()
    for index, (prompt, changed, message) in enumerate(cases):
        source = tmp_path / str(index)
        save_prompt(prompt, source, prefix.backbone)
        task = json.loads((source / "task.json").read_text()) | changed
        (source / "task.json").write_text(json.dumps(task))
        with pytest.raises(UserError, match=message) as caught:
            edit.add(prefix.folder, source)
        assert str(source) in str(caught.value) and "\n" not in str(caught.value)
    save_file({"lora": torch.ones(2, 32)}, tmp_path / "1" / "adapter_model.safetensors")
    task = json.loads((tmp_path / "named" / "task.json").read_text())
    (tmp_path / "1" / "task.json").write_text(json.dumps(task))
    with pytest.raises(UserError, match=rf"{tmp_path}/1: the prompt has no 'prompt_embeddings'"):
        edit.add(prefix.folder, tmp_path / "1")
    with pytest.raises(UserError, match=r"'!!!' cannot be made a task's name.* --name$"):
        edit.add(prefix.folder, tmp_path / "named", "!!!")
    assert (prefix.folder / "bundle.json").read_bytes() == before
