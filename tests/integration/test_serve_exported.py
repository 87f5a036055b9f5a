"""A bundle that the exporter wrote, in the runtime: the answers that the trainer's model gives."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from exporter.export import export_bundle
from exporter.record import bundle_arrays
from serve import bundle as bundles
from serve.classifier import Classifier
from serve.errors import Failure
from trainer.backbone import Backbone, load_backbone
from trainer.modes import Params
from trainer.prompt import Prompt, TaskRecord
from trainer.readout import class_scores, collate, compile_template, encode_texts, word_ids

TEXTS = [
    "the film was great", "", "It is not very good , but the plot was okay .", "awful",
    "this service is a mixed story " * 9, "zzz QX 42 ' !", "the food and the room was terrible ?",
]  # fmt: skip
TASKS = {
    "film": (["negative", "positive"], ["terrible", "great"], 5),
    "food": (["bad", "so-so", "good"], ["bad", "okay", "good"], 3),
    "room": (["no", "yes"], ["awful", "good"], 5),
}


def prompt_for(backbone: Backbone, mode: str, name: str, seed: int) -> Prompt:
    labels, words, tokens = TASKS[name]
    generator = torch.Generator().manual_seed(seed)
    soft = torch.randn(tokens, backbone.t5.width, generator=generator)
    params: Params = {"prompt_embeddings": soft}
    if mode == "deep":
        kv, states = backbone.t5.prefix(soft[None])
        params = {"kv": kv[0].detach(), "states": states[0].detach()}
    record = TaskRecord(
        name, labels, words, mode=mode, temperature=1.5 if name == "food" else 1.0,
        backbone=backbone.name, backbone_sha256=backbone.sha256,
    )  # fmt: skip
    return Prompt(params, record)


def oracle(backbone: Backbone, prompt: Prompt, text: str) -> list[float]:
    """The probabilities by the trainer's own read-out, one text at a time, without padding."""
    task = prompt.task
    template = compile_template(backbone.tokenizer, task.template)
    rows = encode_texts(backbone.tokenizer, template, [text], 512)
    words = torch.tensor(word_ids(backbone.tokenizer, task.words))
    params = {key: value[None] for key, value in prompt.params.items()}
    with torch.no_grad():
        scores = class_scores(
            backbone.t5, task.mode, params, collate(rows), words, backbone.decoder_ids
        )
    return torch.softmax(scores[0] / task.temperature, 0).tolist()


class Exported:
    """One bundle of a mode with all tasks but `room`, made once for all tests."""

    def __init__(self, backbone: Backbone, mode: str, folder: Path) -> None:
        self.backbone = backbone
        self.prompts = {n: prompt_for(backbone, mode, n, seed) for seed, n in enumerate(TASKS)}
        self.folder = folder
        export_bundle([self.prompts["film"], self.prompts["food"]], backbone, folder)


@pytest.fixture(scope="module", params=["prefix", "deep"])
def exported(
    request: pytest.FixtureRequest, tiny_t5: Path, tmp_path_factory: pytest.TempPathFactory
) -> Exported:
    folder = tmp_path_factory.mktemp(request.param) / "b"
    return Exported(load_backbone(str(tiny_t5)), request.param, folder)


def test_mixed_tasks_give_what_the_trainer_computes(exported: Exported) -> None:
    classifier = Classifier(exported.folder, threads=1, token_budget=200)
    names = list(classifier.tasks)
    texts = [text for text in TEXTS for _ in names]
    tasks = names * len(TEXTS)
    for text, name, result in zip(texts, tasks, classifier.classify(texts, tasks), strict=True):
        wanted = oracle(exported.backbone, exported.prompts[name], text)
        assert list(result.probabilities.values()) == pytest.approx(wanted, abs=2e-5)
        assert result.label == TASKS[name][0][int(np.argmax(wanted))]


@pytest.mark.parametrize("names", ["film", "film food", "food film film food", "film food film"])
def test_a_batch_of_any_mix_is_answered_in_its_order(exported: Exported, names: str) -> None:
    """One task, a group of rows each, and tasks of which some have more rows than others."""
    classifier = Classifier(exported.folder, threads=1)
    texts = TEXTS[:4]
    tasks = (names.split() * 4)[:4]
    encoded = classifier.encoder.encode(texts, [classifier.tasks[name] for name in tasks])
    results = classifier.run(encoded)
    for text, name, result in zip(texts, tasks, results, strict=True):
        wanted = oracle(exported.backbone, exported.prompts[name], text)
        assert list(result.probabilities.values()) == pytest.approx(wanted, abs=2e-5)


def test_a_task_added_without_torch_serves_at_once(exported: Exported, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported.folder, tmp_path / "b"))
    prompt = exported.prompts["room"]
    classifier = Classifier(folder, threads=1)
    film = classifier.tasks["film"]
    record = {
        "labels": prompt.task.labels,
        "words": prompt.task.words,
        "word_ids": word_ids(exported.backbone.tokenizer, prompt.task.words),
        "template": prompt.task.template,
        "prefix_ids": film.prefix_ids,
        "suffix_ids": film.suffix_ids,
    }
    arrays = {key: value.numpy() for key, value in prompt.params.items()}
    bundles.add_task(folder, "room", record, bundle_arrays(arrays))
    classifier.add_task("room")
    for text, result in zip(TEXTS, classifier.classify(TEXTS, "room"), strict=True):
        wanted = oracle(exported.backbone, prompt, text)
        assert list(result.probabilities.values()) == pytest.approx(wanted, abs=2e-5)


@pytest.mark.parametrize("name", ["model.onnx", "weights.data", "tokenizer.json"])
def test_damage_to_a_real_bundle_is_named(exported: Exported, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(exported.folder, tmp_path / "b"))
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 16
    (folder / name).write_bytes(bytes(data))
    with pytest.raises(Failure, match=name):
        Classifier(folder, threads=1)
