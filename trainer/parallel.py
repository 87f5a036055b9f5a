"""Several processes on one run, through accelerate: `accelerate launch -m trainer meta ...`.

The rows of a step (for MetaPT its tasks) are divided over the processes and their gradients are
summed, so every process takes the step that one process alone would have taken. Evaluation runs in
all of them on the same rows, and the main process's figures decide (best, patience): machines of
other makes round otherwise. They need not share a disk: only the main process reads and writes
checkpoints.

A backbone that does not fit on one device is divided instead (tensor parallelism): then all
processes take all rows, each with its part of the weights (`trainer.sharding`).

What accelerate is configured with arrives in the environment: the processes, the precision, and the
tensor parallelism. FSDP and DeepSpeed are refused: every method here reads the backbone's weights
outside of the modules' own forward, which is where those gather them.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from serve.errors import Failure, UserError
from trainer.modes import Params
from trainer.sharding import WHOLE, Shards

logger = logging.getLogger(__name__)

T = TypeVar("T")

SILENCE = 30  # seconds after which a machine that does not answer counts as lost
_GONE = (
    "another process of this run died: start the same command again, and it goes on from the last "
    "checkpoint"
)
_DIVIDE = (
    "to divide the backbone over all processes add --use_fsdp --fsdp_version 2 "
    "--use_parallelism_config --parallelism_config_tp_size N, N as --num_processes"
)
_SHARDED = {"FSDP": "FSDP", "DEEPSPEED": "DeepSpeed", "MEGATRON_LM": "Megatron-LM"}


class Workers:
    """The processes of a run; one process alone needs neither accelerate nor messages.

    Attributes:
        rank: number of this process, from 0; count: how many there are.
        precision: accelerate's mixed precision, "no" or "bf16".
        shards: which part of the backbone's weights is this process's.

    Raises:
        UserError: accelerate is not installed, or configured for what is not supported.
    """

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self.precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        self._accelerator: Any = None
        divided = _tensor_parallelism() > 1
        self.shards = Shards(self.rank, self.count, self.sum) if divided else WHOLE
        for flag, name in _SHARDED.items():
            # Its launcher lets tensor parallelism through with FSDP 2 only, which is then not used.
            if os.environ.get(f"ACCELERATE_USE_{flag}", "false").lower() in ("true", "1") and not (
                divided and flag == "FSDP"
            ):
                raise UserError(
                    f"accelerate is configured for {name}, which gathers weights where this "
                    f"trainer cannot use them: {_DIVIDE}"
                )
        if self.precision not in ("no", "bf16"):
            raise UserError(
                f"accelerate's mixed precision {self.precision} overflows in a T5 "
                "(transformers#5651): choose bf16 or no"
            )
        if "MASTER_PORT" in os.environ and "WORLD_SIZE" not in os.environ:
            logger.warning(
                "accelerate started one process only: with --cpu it never starts more; pass "
                "--multi_gpu and set ACCELERATE_USE_CPU=1"
            )
        if self.count > 1:
            try:
                from accelerate import Accelerator
            except ImportError:
                raise UserError(
                    "several processes need accelerate: pip install '.[trainer]' in the checkout"
                ) from None
            # The launcher ends the processes that are left; the run is to be saved before that.
            signal.signal(signal.SIGTERM, _ended)
            if divided:
                # The mesh and the wrapping that these ask for are for models given to accelerate.
                os.environ.pop("ACCELERATE_USE_PARALLELISM_CONFIG")
                os.environ.pop("ACCELERATE_USE_FSDP", None)
            _choose_interface()
            try:
                self._accelerator = Accelerator(cpu=not torch.cuda.is_available())
            except RuntimeError as error:
                raise Failure(
                    f"the processes of this run do not reach each other ({_first_line(error)}): "
                    "check that all were started, that every port is open between the machines, "
                    "and name the network's interface in GLOO_SOCKET_IFNAME (NCCL_SOCKET_IFNAME "
                    "on GPUs)"
                ) from error
            _notice_lost_machines()
            # An interpreter that ends with gloo's threads alive is aborted now and then.
            atexit.register(_leave)
            if self.main:
                logger.info(
                    "%d processes of accelerate, precision %s, first on %s%s",
                    self.count, "fp32" if self.precision == "no" else self.precision, self.device,
                    ", each with a part of the backbone" if divided else "",
                )  # fmt: skip

    @property
    def main(self) -> bool:
        """Whether this process writes and reports."""
        return self.rank == 0

    @property
    def device(self) -> torch.device | None:
        """The device that accelerate gave this process; None where it is alone."""
        return None if self._accelerator is None else self._accelerator.device

    def check_whole(self, what: str) -> None:
        """Refuse to divide weights that are trained.

        Raises:
            UserError: accelerate is configured for tensor parallelism.
        """
        if self.shards.count > 1:
            raise UserError(
                f"{what} trains the backbone's weights, which cannot be divided over processes: "
                "start it without --use_parallelism_config"
            )

    def share(self, size: int) -> np.ndarray:
        """The numbers, of `size` rows or tasks, that are this process's: int [size / count].

        All of them where the weights are divided instead.
        """
        if self.shards.count > 1:
            return np.arange(size)
        return np.array_split(np.arange(size), self.count)[self.rank]

    def sum_gradients(self, params: Params) -> None:
        """Replace each gradient by its sum over the processes; a missing one counts as zero."""
        if self._accelerator is None:
            return
        for value in params.values():
            gradient = torch.zeros_like(value) if value.grad is None else value.grad
            value.grad = self._of_rows(self.sum(gradient))

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over the processes.

        Raises:
            Failure: a process of the run is gone.
        """
        if self._accelerator is None:
            return tensor
        with _others_alive():
            return self._accelerator.reduce(tensor, reduction="sum")

    def of_main(self, ask: Callable[[], T]) -> T:
        """What `ask` returns in the main process, where alone it is called, in all of them.

        Raises:
            UserError, Failure: `ask` raised it. Failure: a process of the run is gone.
        """
        if self._accelerator is None:
            return ask()
        answer: list[Any] = [None, None]
        if self.main:
            try:
                answer[0] = ask()
            except (UserError, Failure) as error:
                answer[1] = error
        with _others_alive():
            torch.distributed.broadcast_object_list(answer, device=self.device)
        if answer[1] is not None:
            raise answer[1]
        return answer[0]

    def copy_main(self, tensor: Tensor) -> None:
        """Make a tensor that all processes have what it is in the main one, in place."""
        if self._accelerator is None:
            return
        sent = tensor.detach().to(self._accelerator.device).contiguous()
        with _others_alive():
            torch.distributed.broadcast(sent, 0)
        with torch.no_grad():
            tensor.copy_(sent)

    def check_equal(self, values: dict[str, Any]) -> None:
        """Raises: UserError in every process, unless all have the same values."""
        theirs = self.of_main(lambda: values)
        if self._accelerator is None or not theirs:
            return
        others = {name: float(values.get(name) != value) for name, value in theirs.items()}
        if named := [name for name, count in self.sum_values(others).items() if count]:
            raise UserError(
                f"the processes of this run differ in {', '.join(named)}: give every machine the "
                "same command, data and backbone"
            )

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of forward passes: bf16 where accelerate is configured so."""
        if self.precision == "no":
            return nullcontext()
        return torch.autocast("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16)

    def sum_values(self, values: dict[str, float]) -> dict[str, float]:
        """The sum of each number over the processes."""
        if self._accelerator is None:
            return values
        numbers = torch.tensor(list(values.values()), dtype=torch.float64)
        numbers = self._of_rows(self.sum(numbers.to(self._accelerator.device)))
        return dict(zip(values, numbers.tolist(), strict=True))

    def _of_rows(self, total: Tensor) -> Tensor:
        # With divided weights every process has the whole gradient already; the mean of equal
        # numbers keeps them equal to the last bit.
        return total / self.shards.count

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Ignore the launcher's SIGTERM: a broken connection is often noticed before it comes."""
        if self._accelerator is None:
            yield
            return
        before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def wait(self) -> None:
        """Let all processes arrive here before any goes on."""
        if self._accelerator is not None:
            self._accelerator.wait_for_everyone()


@contextmanager
def _others_alive() -> Iterator[None]:
    """Raises: Failure when a process of the run is gone."""
    try:
        yield
    except RuntimeError as error:  # gloo and nccl say which connection broke, not why
        raise Failure(f"{_GONE} ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]


def _choose_interface() -> None:
    """Let gloo listen where the main process is reached from.

    It would take the address that this machine's own name has, which is 127.0.1.1 on many (Debian's
    /etc/hosts), where no other machine finds it.
    """
    main = os.environ.get("MASTER_ADDR", "")
    if "GLOO_SOCKET_IFNAME" in os.environ or not main:
        return
    import psutil  # accelerate needs it too

    try:
        kind, _, _, _, target = socket.getaddrinfo(main, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(kind, socket.SOCK_DGRAM) as probe:
            probe.connect(target)  # sends nothing
            mine = probe.getsockname()[0]
    except OSError:
        return  # what is wrong with the address is said when it is used
    for name, addresses in psutil.net_if_addrs().items():
        if mine in (address.address.split("%")[0] for address in addresses):
            os.environ["GLOO_SOCKET_IFNAME"] = name


def _notice_lost_machines() -> None:
    """Have the kernel break connections to machines that have fallen silent.

    One that loses its power or its network closes nothing: gloo, which only waits for what comes,
    would for half an hour.
    """
    for entry in Path("/proc/self/fd").glob("*"):  # gloo's own connections are told nowhere
        try:
            if not os.readlink(entry).startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(entry.name))) as found:
                if found.type != socket.SOCK_STREAM or found.family == socket.AF_UNIX:
                    continue
                found.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                found.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, SILENCE // 2))
                found.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, SILENCE // 6))
                found.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
                found.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * SILENCE)
        except OSError:
            continue  # closed meanwhile


def _leave() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _ended(_signal: int, _frame: Any) -> None:
    raise Failure(_GONE)


def _tensor_parallelism() -> int:
    if os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() != "true":
        return 1
    sizes = {
        name: int(os.environ.get(f"PARALLELISM_CONFIG_{name}_SIZE", "1"))
        for name in ("TP", "DP_REPLICATE", "DP_SHARD", "CP", "SP")
    }
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if sizes.pop("TP") != count or max(sizes.values()) > 1:
        raise UserError(
            f"the backbone is divided over all {count} processes or over none: pass "
            f"--parallelism_config_tp_size {count} and leave the configuration's other sizes at 1"
        )
    return count


@cache
def workers() -> Workers:
    """The processes of this run."""
    return Workers()
