"""The runtime on a GPU: what the CPU answers, with the bank on the device."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch

from exporter.export import export_bundle
from serve.classifier import Classifier
from serve.engine import CPU, CUDA
from serve.tokenize import Encoded
from trainer.backbone import load_backbone
from trainer.prompt import Prompt, TaskRecord

if CUDA not in ort.get_available_providers():
    pytest.skip(f"onnxruntime has no {CUDA} here: it is not onnxruntime-gpu",
                allow_module_level=True)  # fmt: skip

TEXTS = [
    "the film was great", "", "It is not very good , but the plot was okay .", "awful",
    "this service is a mixed story " * 9, "zzz QX 42 ' !", "the food and the room was terrible ?",
]  # fmt: skip
WORDS = {"film": ["terrible", "great"], "food": ["bad", "okay", "good"], "room": ["awful", "good"]}
TASKS = {"film": 5, "food": 3, "room": 5}  # tokens of the prompt


@pytest.fixture(scope="module")
def folder(tiny_t5: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with three tasks in fp32 and fp16."""
    backbone, prompts = load_backbone(str(tiny_t5)), []
    for seed, (name, tokens) in enumerate(TASKS.items()):
        soft = torch.randn(tokens, backbone.t5.width, generator=torch.Generator().manual_seed(seed))
        record = TaskRecord(name, WORDS[name], WORDS[name], mode="prefix")
        prompts.append(Prompt({"prompt_embeddings": soft}, record))
    out = tmp_path_factory.mktemp("cuda") / "b"
    export_bundle(prompts, backbone, out, precisions=("fp32", "fp16"))
    return out


def on(provider: str, folder: Path, precision: str = "fp32", **more: int) -> Classifier:
    made = Classifier(folder, precision, threads=1, providers=[provider], **more)
    assert made._engine.device == ("cuda" if provider == CUDA else "cpu")
    return made


def mixed(classifier: Classifier, names: list[str]) -> list[Encoded]:
    tasks = [classifier.tasks[names[i % len(names)]] for i in range(len(TEXTS))]
    return classifier.encoder.encode(TEXTS, tasks)


def assert_close(found: np.ndarray, wanted: np.ndarray, within: float) -> None:
    real = wanted > -5e3  # the classes that a task has
    assert ((found > -5e3) == real).all()
    np.testing.assert_allclose(found[real], wanted[real], rtol=0, atol=within)


@pytest.mark.parametrize(("precision", "within"), [("fp32", 1e-4), ("fp16", 0.05)])
@pytest.mark.parametrize("names", [["film"], ["film", "food", "room"], ["room", "room", "food"]])
def test_a_gpu_answers_as_the_cpu(
    folder: Path, precision: str, within: float, names: list[str]
) -> None:
    exact, there = on(CPU, folder), on(CUDA, folder, precision)
    wanted = exact.logits(mixed(exact, names))
    for _ in range(3):  # a run must not change what the next one reads
        assert_close(there.logits(mixed(there, names)), wanted, within)


def test_the_bank_lies_on_the_device_and_is_copied_only_when_it_changes(folder: Path) -> None:
    classifier = on(CUDA, folder)
    with classifier.bank.lend(list(classifier.tasks.values())) as view:
        first = view.inputs
    assert {value.device_name() for value in first.values()} == {"cuda"}
    classifier.classify(TEXTS, "film")
    with classifier.bank.lend([classifier.tasks["food"]]) as view:
        assert view.inputs is first


def test_tasks_come_and_go_while_it_runs(folder: Path) -> None:
    exact, there = on(CPU, folder), on(CUDA, folder)
    wanted = {name: exact.classify(TEXTS, name) for name in TASKS}

    def assert_right(name: str) -> None:
        for a, b in zip(there.classify(TEXTS, name), wanted[name], strict=True):
            assert a.probabilities == pytest.approx(b.probabilities, abs=1e-4)

    there.remove_task("room")
    assert_right("film")
    there.add_task("room")
    for name in ("room", "food", "film"):
        assert_right(name)


def test_a_task_that_gave_way_is_computed_again(folder: Path) -> None:
    exact = on(CPU, folder)
    there = on(CUDA, folder, bank_memory=exact.bank.slot_bytes * 2)
    for name in ("film", "food", "room", "film", "room"):
        got, wanted = there.classify(TEXTS, name), exact.classify(TEXTS, name)
        for a, b in zip(got, wanted, strict=True):
            assert a.probabilities == pytest.approx(b.probabilities, abs=1e-4)
    assert there.bank.evictions >= 2


def test_batches_side_by_side_give_the_same_answers(folder: Path) -> None:
    names = [list(TASKS)[i % 3] for i in range(8 * len(TEXTS))]
    wanted = on(CPU, folder).classify(TEXTS * 8, names)
    beside = on(CUDA, folder, workers=3, max_rows=4)
    for a, b in zip(beside.classify(TEXTS * 8, names), wanted, strict=True):
        assert (a.label, a.task) == (b.label, b.task)
        assert a.probabilities == pytest.approx(b.probabilities, abs=1e-4)


def test_cuda_is_the_default_and_the_log_says_so(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "serve"):
        chosen = Classifier(folder)
    assert "fp32 on cuda" in caplog.text and "cannot start" not in caplog.text
    assert (chosen._engine.device, chosen.workers) == ("cuda", 1)
    assert chosen._engine._session.get_provider_options()[CUDA]["use_tf32"] == "0"


@pytest.mark.parametrize(("providers", "device"), [([], "cuda"), ([CPU], "cpu"), ([CUDA], "cuda")])
def test_the_command_finds_the_libraries_without_torch(
    folder: Path, providers: list[str], device: str
) -> None:
    """In a process of its own, where nothing has loaded CUDA's libraries before."""
    code = (
        "import sys; from serve.classifier import Classifier\n"
        f"c = Classifier({str(folder)!r}, providers={providers or None!r})\n"
        "print(c.classify(['the film was great'], 'film')[0].label, c._engine.device)\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[1:] == [device], done.stderr


def test_the_providers_flag_still_takes_the_cpu(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "serve", "classify", str(folder), "--task", "film",
         "--providers", CPU],
        input="the film was great\n", capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
