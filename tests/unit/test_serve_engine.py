"""Sessions: threads for the machine, providers, and failures in one line."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import serve_toy as toy

from serve.classifier import Classifier
from serve.engine import (
    CPU,
    CUDA,
    Engine,
    choose_providers,
    has_cuda_driver,
    load_cuda_libraries,
    on_device,
    physical_cores,
    share_cores,
)
from serve.errors import Failure, UserError
from serve.readout import read_out


def machine(root: Path, siblings: dict[int, str], quota: str | None = None) -> Path:
    for cpu, text in siblings.items():
        folder = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(text)
    if quota is not None:
        (root / "sys/fs/cgroup").mkdir(parents=True)
        (root / "sys/fs/cgroup/cpu.max").write_text(quota)
    return root


@pytest.mark.parametrize(
    ("allowed", "quota", "cores"),
    [
        ({0, 1, 2, 3}, None, 2),  # two threads on each of two cores
        ({0, 1, 2, 3}, "max 100000", 2),
        ({0, 2}, None, 1),
        ({0, 1, 2, 3}, "150000 100000", 1),
        ({0, 1, 2, 3}, "400000 100000", 2),
        ({0}, "50000 100000", 1),  # half a core is still a thread
    ],
)
def test_threads_are_the_cores_that_may_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: set[int], quota: str, cores: int
) -> None:
    root = machine(tmp_path, {0: "0,2", 2: "0,2", 1: "1,3", 3: "1,3"}, quota)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: allowed)
    assert physical_cores(root) == cores


def test_a_machine_that_tells_nothing_counts_every_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 5})
    assert physical_cores(tmp_path) == 3


@pytest.mark.parametrize(
    ("available", "driver", "wanted", "chosen"),
    [
        ([CPU], True, None, [CPU]),
        ([CUDA, CPU], True, None, [CUDA, CPU]),
        ([CUDA, CPU], False, None, [CPU]),  # onnxruntime-gpu on a machine without a GPU
        ([CUDA, CPU], True, [CPU], [CPU]),
        ([CUDA, CPU], False, [CUDA], [CUDA, CPU]),  # which then fails, and says why
    ],
)
def test_cuda_is_chosen_where_it_is(
    monkeypatch: pytest.MonkeyPatch,
    available: list[str],
    driver: bool,
    wanted: list[str],
    chosen: list[str],
) -> None:
    monkeypatch.setattr("serve.engine.ort.get_available_providers", lambda: available)
    monkeypatch.setattr("serve.engine.has_cuda_driver", lambda: driver)
    assert choose_providers(wanted) == chosen


def test_a_driver_is_there_if_its_library_is(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def load(name: str) -> None:
        asked.append(name)
        if len(asked) == 1:
            raise OSError(name)

    monkeypatch.setattr("serve.engine.ctypes.CDLL", load)
    answers = []
    for _ in range(2):
        has_cuda_driver.cache_clear()
        answers.append(has_cuda_driver())
    has_cuda_driver.cache_clear()
    assert answers == [False, True] and asked[0] == asked[1] == "libcuda.so.1"


def test_a_provider_that_is_not_there_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.engine.ort.get_available_providers", lambda: [CPU])
    with pytest.raises(UserError, match="onnxruntime-gpu"):
        choose_providers([CUDA])


@pytest.mark.parametrize(
    ("built", "wanted", "calls"),
    [("13.0", None, 1), ("13.0", [CUDA], 1), ("13.0", [CPU], 0), ("", None, 0)],
)
def test_libraries_are_looked_for_once_and_where_cuda_may_be_used(
    monkeypatch: pytest.MonkeyPatch, built: str, wanted: list[str] | None, calls: int
) -> None:
    done: list[int] = []
    monkeypatch.setattr("serve.engine.ort.cuda_version", built, raising=False)
    monkeypatch.setattr("serve.engine.ort.preload_dlls", lambda: done.append(1), raising=False)
    monkeypatch.setattr("serve.engine.ort.get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr("serve.engine.has_cuda_driver", lambda: True)
    load_cuda_libraries.cache_clear()
    choose_providers(wanted)
    choose_providers(wanted)
    load_cuda_libraries.cache_clear()
    assert len(done) == calls


def test_libraries_that_are_not_there_are_told_of_in_the_log_alone(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    def preload() -> None:
        sys.stdout.write("Failed to load libcublas.so.13\n")
        raise RuntimeError("no such directory")

    monkeypatch.setattr("serve.engine.ort.cuda_version", "13.0", raising=False)
    monkeypatch.setattr("serve.engine.ort.preload_dlls", preload, raising=False)
    load_cuda_libraries.cache_clear()
    with caplog.at_level("DEBUG", "serve.engine"):
        load_cuda_libraries()
    load_cuda_libraries.cache_clear()
    assert capsys.readouterr().out == ""
    assert "libcublas.so.13" in caplog.text and "no such directory" in caplog.text
    assert {entry.levelname for entry in caplog.records} == {"DEBUG"}
    monkeypatch.delattr("serve.engine.ort.preload_dlls")  # before onnxruntime 1.21
    load_cuda_libraries()
    load_cuda_libraries.cache_clear()


class Session:
    """A session as on a GPU: it notes what it was made of and what its runs were given."""

    made: list[Session] = []
    real = onnxruntime.InferenceSession

    def __init__(self, path: str, options: Any, providers: Any) -> None:
        self.spins = options.get_session_config_entry("session.intra_op.allow_spinning")
        self.providers, self.runs, self.falls_back = providers, list[Any](), True
        if CUDA in self.get_providers():
            sys.stdout.write("*************** EP Error ***************\n")
        self._session = self.real(path, providers=[CPU])
        self.made.append(self)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def get_providers(self) -> list[str]:
        return [name for name, _ in self.providers]

    def disable_fallback(self) -> None:
        self.falls_back = False

    def run_with_ort_values(self, outputs: Any, feed: Any, options: Any = None) -> Any:
        self.runs.append(options)
        return self._session.run_with_ort_values(outputs, feed, options)


def test_on_a_gpu_fp32_is_fp32_and_threads_do_not_spin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = toy.make_bundle(tmp_path / "b")
    given: list[str] = []

    def placed(array: np.ndarray, device: str) -> onnxruntime.OrtValue:
        given.append(device)
        return on_device(array, "cpu")

    monkeypatch.setattr(Session, "made", [])
    monkeypatch.setattr("serve.engine.has_cuda_driver", lambda: True)
    monkeypatch.setattr("serve.engine.ort.get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr("serve.bank.on_device", placed)
    monkeypatch.setattr("serve.engine.ort.InferenceSession", Session)
    classifier = Classifier(folder, threads=12)
    assert classifier.limits.run_cost == 1400  # whatever the threads
    assert (classifier.limits.tokens, classifier.limits.rows) == (16384, 256)
    assert classifier.limits.scores is None
    monkeypatch.setattr("serve.classifier._LARGE", 0)
    assert classifier.classify(["good"], "film")[0].label == "positive"
    model = Session.made[0]
    assert model.providers == [
        (CUDA, {"use_tf32": "0", "arena_extend_strategy": "kSameAsRequested"}), (CPU, {})
    ]  # fmt: skip
    assert (model.spins, model.falls_back) == ("0", False)
    assert model.runs == [None]  # its memory is kept
    assert set(given) == {"cuda"}  # the bank, not the text
    said = capsys.readouterr()
    assert said.out == "" and "EP Error" in said.err


def test_a_provider_that_was_asked_for_and_does_not_start_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = toy.make_bundle(tmp_path / "b")
    if CUDA in onnxruntime.get_available_providers():
        pytest.skip("CUDA may well start here")
    # As with onnxruntime-gpu on a machine without a GPU: it is listed, and then left out silently.
    monkeypatch.setattr("serve.engine.ort.get_available_providers", lambda: [CUDA, CPU])
    with pytest.raises(Failure, match=f"cannot start {CUDA} on this machine"):
        Classifier(folder, threads=1, providers=[CUDA])
    chosen = Classifier(folder, threads=1)  # nobody asked for CUDA
    assert chosen._engine.device == "cpu"
    assert chosen.classify(["good"], "film")[0].label == "positive"


def test_what_is_no_graph_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"not a graph")
    with pytest.raises(Failure, match=r"model\.onnx") as caught:
        Engine(tmp_path / "model.onnx", threads=1, providers=[CPU])
    assert "\n" not in str(caught.value)


def test_a_run_that_fails_is_a_failure(tmp_path: Path) -> None:
    folder = toy.make_bundle(tmp_path / "b")
    engine = Engine(folder / "prefix.onnx", threads=1, providers=[CPU])
    wrong = {"prompt": on_device(np.zeros((2, 3), np.float32), "cpu"),
             "length": on_device(np.array(2, np.int64), "cpu")}  # fmt: skip
    with pytest.raises(Failure, match=r"prefix\.onnx failed"):
        engine.run(wrong)


def test_logits_that_overflow_are_a_failure_and_no_answer(tmp_path: Path) -> None:
    classifier = Classifier(toy.make_bundle(tmp_path / "b"), threads=1)
    batch = classifier.encoder.encode(["good"], [classifier.tasks["film"]])
    with pytest.raises(Failure, match="--precision"):
        read_out(batch, np.array([[np.nan, 1.0]], np.float32))


def resident() -> float:
    """This process's memory in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def test_a_large_run_gives_its_memory_back_when_asked(tmp_path: Path) -> None:
    node = onnx.helper.make_node
    info = onnx.helper.make_tensor_value_info
    one = onnx.helper.make_tensor("one", onnx.TensorProto.FLOAT, [1], [1.0])
    graph = onnx.helper.make_graph(
        [
            node("ConstantOfShape", ["shape"], ["ones"], value=one),
            node("Exp", ["ones"], ["powers"]),
            node("ReduceMax", ["powers"], ["largest"], keepdims=0),
        ],
        "g",
        [info("shape", onnx.TensorProto.INT64, [1])],
        [info("largest", onnx.TensorProto.FLOAT, [])],
    )
    opset = [onnx.helper.make_opsetid("", 20)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=10), tmp_path / "g")
    engine = Engine(tmp_path / "g", threads=1, providers=[CPU])
    engine.run({"shape": on_device(np.array([16], np.int64), "cpu")})  # what it takes first stays
    feed = {"shape": on_device(np.array([2**25], np.int64), "cpu")}  # 128 MiB for each tensor
    before = resident()
    engine.run(feed)
    assert resident() - before > 100  # kept for the next run
    assert engine.run(feed, give_back=True)[0] == pytest.approx(np.e)
    assert resident() - before < 50


def test_batches_with_large_attention_give_their_memory_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier = Classifier(toy.make_bundle(tmp_path / "b"), threads=1)
    asked: list[bool] = []
    run = Engine.run

    def noting(self: Engine, feed: Any, *, give_back: bool = False) -> Any:
        asked.append(give_back)
        return run(self, feed, give_back=give_back)

    monkeypatch.setattr(Engine, "run", noting)
    # Two rows of 3 and 3 + 10 tokens with the template: 4 bytes x heads x 2 x S x (P + S).
    monkeypatch.setattr("serve.classifier._LARGE", 4 * toy.H * 2 * 13 * (toy.P + 13) - 1)
    classifier.warm()
    asked.clear()
    classifier.classify(["", ""], "film")
    classifier.classify(["", "good " * 9], "film")
    classifier.classify(["", "good " * 10], "film")
    assert asked == [False, False, True]


def test_warming_fills_the_bank_as_far_as_it_goes(tmp_path: Path) -> None:
    folder = toy.make_bundle(tmp_path / "b")
    for number in range(20):
        toy.add(folder, f"t{number}", ["n", "p"], ["bad", "good"], toy.prompt_of(number))
    classifier = Classifier(folder, threads=1)
    classifier.warm()
    assert len(classifier.bank) == 22 and classifier.bank.evictions == 0
    small = Classifier(folder, threads=1, bank_memory=5 * classifier.bank.slot_bytes)
    small.warm()
    assert len(small.bank) == 5 and small.bank.evictions == 0


def test_warming_names_a_damaged_prompt(tmp_path: Path) -> None:
    folder = toy.make_bundle(tmp_path / "b")
    classifier = Classifier(folder, threads=1)
    path = folder / classifier.tasks["food"].prompt
    path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(Failure, match=path.name):
        classifier.warm()


@pytest.mark.parametrize(
    ("threads", "workers", "cores", "wanted"),
    [
        (None, None, 1, (1, 1)),
        (None, None, 2, (1, 2)),
        (None, None, 12, (1, 8)),
        (None, None, 64, (8, 8)),
        (None, 1, 6, (6, 1)),
        (None, 3, 2, (1, 3)),
        (4, None, 12, (4, 3)),
        (2, None, 1, (2, 1)),
        (3, 5, 2, (3, 5)),
    ],
)
def test_cores_are_shared_by_what_is_not_given(
    threads: int | None, workers: int | None, cores: int, wanted: tuple[int, int],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    assert share_cores(threads, workers, cores) == wanted
    # What is far too much is done, and said.
    assert ("wait for one another" in caplog.text) == (wanted == (3, 5))
