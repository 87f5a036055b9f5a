"""Batches made beside the training, by processes of their own.

A batch of some twenty thousand tokens takes a core a thirtieth of a second to draw, and a GPU about
as long to learn from: made in turn, either would wait for the other half of the time.
"""

from __future__ import annotations

import itertools
import multiprocessing as mp
import os
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from trainer.pretraining.mixture import Batch, Mixture

_MOST = 8  # processes by default
_AHEAD = 4  # batches that each has ready

# (step, share of the run that is done) -> the batch of this process
Source = Callable[[int, float], Batch]


def usual_loaders(device: torch.device) -> int:
    """How many processes make batches: none on a CPU, whose cores have enough to do, and on a GPU
    as many as there are cores beside the one that drives it, at most eight."""
    if device.type == "cpu":
        return 0
    return max(1, min(_MOST, len(os.sched_getaffinity(0)) - 1))


class _Drawn(Dataset[Batch]):
    """Batch number `step` by `draw`.

    done: step -> share of the run that is done; None where time decides and the training process
    says so in `now`."""

    def __init__(self, draw: Source, done: Callable[[int], float] | None) -> None:
        self.draw, self.done = draw, done
        self.now = mp.get_context("fork").Value("d", 0.0, lock=False)

    def __getitem__(self, step: int) -> Batch:
        return self.draw(step, self.now.value if self.done is None else self.done(step))


def source(mixture: Mixture, shares: Callable[[float], dict[str, float]], *, first: int,
           rank: int = 0, count: int = 1, loaders: int = 0,
           done: Callable[[int], float] | None = None) -> Source:  # fmt: skip
    """The batches of one process of training, from step `first` on.

    Args:
        mixture: draws them; shares: kinds of batches by the share of the run that is done.
        rank, count: this process among those that train.
        loaders: processes that make batches ahead; 0: the caller makes them itself.
        done: step -> share of the run that is done, where the number of steps decides it: batches
            are then the same with and without loaders. None where time does: a batch made ahead
            follows the share of a moment before.

    Returns:
        A function that is to be called with first, first + 1, ... in this order.
    """

    def draw(step: int, share: float) -> Batch:
        return mixture.batch(step * count + rank, shares(share))

    if not loaders:
        return draw
    drawn = _Drawn(draw, done)
    batches: Any = iter(DataLoader(
        drawn, batch_size=None, sampler=itertools.count(first), num_workers=loaders,
        prefetch_factor=_AHEAD, multiprocessing_context="fork",
    ))  # fmt: skip
    expected = first

    def take(step: int, share: float) -> Batch:
        nonlocal expected
        if step != expected:
            raise ValueError(f"step {step} was asked for, but {expected} is next")
        expected += 1
        drawn.now.value = share
        return next(batches)

    return take
