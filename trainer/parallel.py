"""Several processes on one run, through accelerate: `accelerate launch -m trainer meta ...`.

The rows of a step (for MetaPT its tasks) are divided over the processes and their gradients are
summed, so every process takes the step that one process alone would have taken. Evaluation runs in
all of them on the same rows, which keeps their decisions (best, patience) equal without messages.

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
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from serve.errors import Failure, UserError
from trainer.modes import Params
from trainer.sharding import WHOLE, Shards

logger = logging.getLogger(__name__)

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
            self._accelerator = Accelerator(cpu=not torch.cuda.is_available())
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
        try:
            return self._accelerator.reduce(tensor, reduction="sum")
        except RuntimeError as error:  # gloo and nccl say which connection broke, not why
            raise Failure(f"{_GONE} ({str(error).splitlines()[0][:120]})") from error

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
