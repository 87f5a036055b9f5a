"""Several processes on one run, through accelerate: `accelerate launch -m trainer meta ...`.

The rows of a step (for MetaPT its tasks) are divided over the processes and their gradients are
summed, so every process takes the step that one process alone would have taken. Evaluation runs in
all of them on the same rows, which keeps their decisions (best, patience) equal without messages.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import numpy as np
import torch

from serve.errors import UserError
from trainer.modes import Params


class Workers:
    """The processes of a run; one process alone needs neither accelerate nor messages.

    Attributes:
        rank: number of this process, from 0; count: how many there are.
    """

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self._accelerator: Any = None
        if self.count > 1:
            try:
                from accelerate import Accelerator
            except ImportError:
                raise UserError(
                    "several processes need accelerate: pip install 'metapt[trainer]'"
                ) from None
            self._accelerator = Accelerator(cpu=not torch.cuda.is_available())

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
            value.grad = self._accelerator.reduce(gradient, reduction="sum")

    def sum_values(self, values: dict[str, float]) -> dict[str, float]:
        """The sum of each number over the processes."""
        if self._accelerator is None:
            return values
        numbers = torch.tensor(list(values.values()), dtype=torch.float64)
        numbers = self._accelerator.reduce(numbers.to(self._accelerator.device), reduction="sum")
        return dict(zip(values, numbers.tolist(), strict=True))

    def wait(self) -> None:
        """Let all processes arrive here before any goes on."""
        if self._accelerator is not None:
            self._accelerator.wait_for_everyone()


@cache
def workers() -> Workers:
    """The processes of this run."""
    return Workers()
