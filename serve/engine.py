"""onnxruntime sessions: which device, how many threads, and one-line errors for what fails."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import io
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

from serve.errors import Failure, UserError

log = logging.getLogger(__name__)

_MOST_WORKERS = 8  # by default: each keeps the memory of its largest batch
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
# Against the defaults: TF32 keeps 10 of the 23 bits of a product's factors, but fp32 is what export
# compared with torch; and an arena that grows by doubling takes what others on the GPU could use.
PROVIDER_OPTIONS = {CUDA: {"use_tf32": "0", "arena_extend_strategy": "kSameAsRequested"}}
DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
}


def physical_cores(root: Path = Path("/")) -> int:
    """The cores that this process may use: hyper-threads counted once, CPU affinity and the
    container's CPU quota (cgroup v2) respected. A second thread on a core slows a matrix product.

    Args:
        root: where /sys is found; the tests have their own.
    """
    allowed = os.sched_getaffinity(0)
    siblings = set()
    for cpu in allowed:
        path = root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
        siblings.add(path.read_text() if path.is_file() else str(cpu))
    cores = len(siblings)
    quota = root / "sys/fs/cgroup/cpu.max"
    if quota.is_file():
        limit, period = quota.read_text().split()
        if limit != "max":
            cores = min(cores, max(1, int(limit) // int(period)))
    return cores


def share_cores(threads: int | None, workers: int | None, cores: int) -> tuple[int, int]:
    """Threads of a batch and batches at a time, so that together they fill the cores.

    Batches side by side on one thread each do more than one batch on all cores: nothing waits for
    the slowest part of an operator, and what onnxruntime runs on one thread anyway (joining,
    transposing) leaves no core idle. A lonely text is answered later, though.

    Args:
        threads, workers: what is given already; None for what fits.
        cores: the physical cores.
    """
    if workers is None:
        workers = min(_MOST_WORKERS, max(1, cores // (threads or 1)))
    threads = threads or max(1, cores // workers)
    if threads * workers > 2 * cores:  # twice: cores that are counted without their hyper-threads
        log.warning(
            "%d threads on %d cores wait for one another, and answers come late or never: lower "
            "--threads and --workers, or leave them out", threads * workers, cores,
        )  # fmt: skip
    return threads, workers


@functools.cache
def has_cuda_driver() -> bool:
    """Whether NVIDIA's driver is installed. `onnxruntime-gpu` offers CUDA on every machine, and a
    session then starts on the CPU with the threads and workers that were meant to wait for a GPU.
    """
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True


@functools.cache
def load_cuda_libraries() -> None:
    """Let the CUDA provider find the libraries that pip installed (`nvidia-cublas` and others).

    They are on no path of the loader. A process that imported torch has loaded them; this package
    never imports it. Without a CUDA build of onnxruntime nothing happens; of a library that is not
    there the provider complains itself.
    """
    preload = getattr(ort, "preload_dlls", None)  # since 1.21
    if preload is None or not getattr(ort, "cuda_version", ""):
        return
    said = io.StringIO()  # it prints, but standard output may be a command's answer
    try:
        with contextlib.redirect_stdout(said):
            preload()
    except Exception as error:  # what it raises is written nowhere
        log.debug("onnxruntime.preload_dlls failed: %s", error)
    for line in said.getvalue().splitlines():
        log.debug("onnxruntime.preload_dlls: %s", line)


def choose_providers(wanted: Sequence[str] | None) -> list[str]:
    """The execution providers to use: `wanted`, or CUDA where it is there and has a driver, and the
    CPU after it.

    Raises:
        UserError: a provider is wanted that this onnxruntime does not have.
    """
    available = ort.get_available_providers()
    if wanted is None:
        wanted = [CUDA] if CUDA in available and has_cuda_driver() else []
    for name in wanted:
        if name not in available:
            raise UserError(
                f"onnxruntime has no provider '{name}' here: it has {', '.join(available)}; "
                'for CUDA, pip install "onnxruntime-gpu[cuda,cudnn]" in place of "onnxruntime"'
            )
    if CUDA in wanted:
        load_cuda_libraries()
    return [*wanted, CPU] if CPU not in wanted else list(wanted)


class Engine:
    """One graph that can be run from any number of threads.

    Attributes:
        inputs: the graph's input names, with their numpy type.
        device: `cuda` or `cpu`, where the graph runs and where the bank should lie.
    """

    def __init__(
        self,
        graph: Path,
        *,
        threads: int,
        providers: Sequence[str],
        spin: bool = True,
        fallback: bool = True,
    ) -> None:
        """Args:
            graph: the .onnx file; its weights are found beside it.
            threads: threads inside an operator.
            providers: in the order of preference.
            spin: let idle threads spin for the next operator. Fastest for a process that only
                classifies; a server has better use for the cores between two batches.
            fallback: whether a provider that does not start may be left out, as onnxruntime does
                without an error. False for those that the user asked for by name.

        Raises:
            Failure: onnxruntime does not load the graph, or leaves a provider out.
        """
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        # Beside a GPU the threads have next to nothing to do.
        spins = "1" if spin and CUDA not in providers else "0"
        options.add_session_config_entry("session.intra_op.allow_spinning", spins)
        options.log_severity_level = 3  # errors; they also come as exceptions
        chosen = [(name, PROVIDER_OPTIONS.get(name, {})) for name in providers]
        # A provider that fails is reported by print, but standard output may be a command's answer.
        apart = contextlib.redirect_stdout(sys.stderr) if CUDA in providers else None
        try:
            with apart or contextlib.nullcontext():
                self._session = ort.InferenceSession(str(graph), options, providers=chosen)
        except Exception as error:  # onnxruntime's errors share no base class
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise Failure(f"onnxruntime cannot load {graph} ({first}): export it again") from error
        missing = [name for name in providers if name not in self._session.get_providers()]
        if missing and not fallback:
            raise Failure(
                f"onnxruntime cannot start {', '.join(missing)} on this machine: check its device, "
                'driver and libraries (CUDA: "onnxruntime-gpu[cuda,cudnn]" brings them), or leave '
                "it out of --providers"
            )
        if missing:
            log.warning("onnxruntime cannot start %s here: going on without", ", ".join(missing))
        # A run that fails on a GPU would else be tried again on the CPU, there and ever after.
        self._session.disable_fallback()
        self.graph = graph
        self._shrinking = ort.RunOptions()
        self._shrinking.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        self.device = "cuda" if CUDA in self._session.get_providers() else "cpu"
        self.inputs = {item.name: DTYPES.get(item.type) for item in self._session.get_inputs()}
        self.outputs = [item.name for item in self._session.get_outputs()]

    def run(self, feed: Mapping[str, ort.OrtValue], *, give_back: bool = False) -> list[np.ndarray]:
        """Run the graph.

        Args:
            feed: its inputs, on the CPU or on the device; those that it does not have are left out.
            give_back: on a CPU, return memory to the system after the run. onnxruntime otherwise
                keeps what its largest run took; asking for it anew costs a short run up to a tenth
                of its time, so this is for runs that are rare and large.

        Raises:
            Failure: onnxruntime fails, for example for want of memory.
        """
        given = {name: value for name, value in feed.items() if name in self.inputs}
        try:
            outputs = self._session.run_with_ort_values(
                self.outputs, given, self._shrinking if give_back and self.device == "cpu" else None
            )
        except Exception as error:  # as above
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise Failure(f"running {self.graph} failed: {first}") from error
        return [value.numpy() for value in outputs]


def on_device(array: np.ndarray, device: str) -> ort.OrtValue:
    """`array` as a graph's input: the same memory on the CPU, a copy on a GPU."""
    return ort.OrtValue.ortvalue_from_numpy(array, device, 0)
