"""Several processes on one run, through accelerate: `accelerate launch -m trainer meta ...`.

The rows of a step (for MetaPT its tasks) are divided over the processes and their gradients are
summed, so every process takes the step that one process alone would have taken. Evaluation runs in
all of them on the same rows, which keeps their decisions (best, patience) equal without messages.

What accelerate is configured with arrives in the environment: the processes, and the precision.
Sharded weights (FSDP, DeepSpeed) are refused: every method here reads the backbone's weights
outside of the modules' own forward, which is where those gather them.
"""

from __future__ import annotations

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

logger = logging.getLogger(__name__)

_GONE = (
    "another process of this run died: start the same command again, and it goes on from the last "
    "checkpoint"
)
_SHARDED = {"FSDP": "FSDP", "DEEPSPEED": "DeepSpeed", "MEGATRON_LM": "Megatron-LM"}


class Workers:
    """The processes of a run; one process alone needs neither accelerate nor messages.

    Attributes:
        rank: number of this process, from 0; count: how many there are.
        precision: accelerate's mixed precision, "no" or "bf16".

    Raises:
        UserError: accelerate is not installed, or configured for what is not supported.
    """

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self.precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        self._accelerator: Any = None
        for flag, name in _SHARDED.items():
            if os.environ.get(f"ACCELERATE_USE_{flag}", "false").lower() in ("true", "1"):
                raise UserError(
                    f"accelerate is configured for {name}, which shards the backbone's weights: "
                    "that is not supported; choose MULTI_GPU or MULTI_CPU in `accelerate config`"
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
                    "several processes need accelerate: pip install 'metapt[trainer]'"
                ) from None
            # The launcher ends the processes that are left; the run is to be saved before that.
            signal.signal(signal.SIGTERM, _ended)
            self._accelerator = Accelerator(cpu=not torch.cuda.is_available())
            if self.main:
                logger.info(
                    "%d processes of accelerate, precision %s, first on %s",
                    self.count, "fp32" if self.precision == "no" else self.precision, self.device,
                )  # fmt: skip

    @property
    def main(self) -> bool:
        """Whether this process writes and reports."""
        return self.rank == 0

    @property
    def device(self) -> torch.device | None:
        """The device that accelerate gave this process; None where it is alone."""
        return None if self._accelerator is None else self._accelerator.device

    def share(self, size: int) -> np.ndarray:
        """The numbers, of `size` rows or tasks, that are this process's: int [size / count]."""
        return np.array_split(np.arange(size), self.count)[self.rank]

    def sum_gradients(self, params: Params) -> None:
        """Replace each gradient by its sum over the processes; a missing one counts as zero."""
        if self._accelerator is None:
            return
        for value in params.values():
            gradient = torch.zeros_like(value) if value.grad is None else value.grad
            value.grad = self.sum(gradient)

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
        numbers = self.sum(numbers.to(self._accelerator.device))
        return dict(zip(values, numbers.tolist(), strict=True))

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


def _ended(_signal: int, _frame: Any) -> None:
    raise Failure(_GONE)


@cache
def workers() -> Workers:
    """The processes of this run."""
    return Workers()
