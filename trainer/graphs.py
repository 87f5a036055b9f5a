"""MetaPT's outer step as CUDA graphs: recorded once for each shape, then replayed.

A step launches thousands of small kernels; starting them one by one takes a GPU longer than running
them. A graph starts them all at once (https://pytorch.org/docs/stable/notes/cuda.html#cuda-graphs).
It computes on the addresses and shapes that it was recorded with, so

- texts are padded up to a multiple of `MULTIPLE` tokens, support and query alike, and a handful of
  graphs serve a run; padding is masked, so it changes gradients by rounding only;
- rows are not packed (`trainer.t5.unpacked`): how many tokens there are is not known beforehand;
- a step's rows go into the graph's own tensors, in one copy, and gradients come out in tensors that
  all graphs share;
- the graphs share one pool of memory: they never run at the same time, and what leaves a graph is
  kept outside of the pool;
- a graph's first replay is compared with a plain step on the same rows, and where they differ, or
  where recording fails, steps are plain from then on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from trainer.modes import Params
from trainer.readout import Batch
from trainer.t5 import unpacked

log = logging.getLogger(__name__)

MULTIPLE = 16  # tokens: texts of up to 128 take at most eight graphs
_WARM_UPS = 2  # before a recording: libraries choose and load their kernels, which none may hold
_ROUNDING = 0.01  # by how much of its norm a first replay may miss the plain step's gradient

# `trainer.meta.outer_losses` of support and query, all else given
Losses = Callable[[Batch, Batch], tuple[Tensor, Tensor]]


def padded(batch: Batch, length: int) -> Batch:
    """The same rows, padded on the right to `length` tokens with 0, T5's pad token."""
    more = length - batch.ids.shape[1]
    ids, mask = (torch.nn.functional.pad(part, (0, more)) for part in (batch.ids, batch.mask))
    return Batch(ids, mask, batch.labels)


def bucket(support: Batch, query: Batch) -> int:
    """The tokens that both are padded to: the longer one's, up to a multiple of `MULTIPLE`."""
    longest = max(support.ids.shape[1], query.ids.shape[1])
    return -(-longest // MULTIPLE) * MULTIPLE


class _Rows:
    """Support and query at fixed addresses: int64 [B, 2 * S + 1], ids, mask and label of a row."""

    def __init__(self, rows: tuple[int, int], length: int, device: torch.device):
        self.rows, self.length = rows, length
        shape, cuda = (sum(rows), 2 * length + 1), device.type == "cuda"
        # From pinned memory a copy needs no waiting.
        self.host = torch.zeros(shape, dtype=torch.long, pin_memory=cuda)
        self.device = torch.zeros(shape, dtype=torch.long, device=device)
        self.copied = torch.cuda.Event() if cuda else None

    def fill(self, support: Batch, query: Batch) -> None:
        if self.copied is not None:
            self.copied.synchronize()  # the last copy may still read what is written now
        for part, batch in zip(self.host.split(self.rows), (support, query), strict=True):
            assert batch.labels is not None
            own = padded(batch, self.length)
            part[:, : self.length] = own.ids
            part[:, self.length : -1] = own.mask
            part[:, -1] = batch.labels
        self.device.copy_(self.host, non_blocking=True)
        if self.copied is not None:
            self.copied.record(torch.cuda.current_stream(self.device.device))

    def batches(self) -> list[Batch]:
        ids, mask, labels = self.device.split((self.length, self.length, 1), dim=1)
        parts = (part.split(self.rows) for part in (ids, mask.bool(), labels[:, 0].contiguous()))
        return [Batch(*row) for row in zip(*parts, strict=True)]


class _Recording:
    """A CUDA graph of `work`, which must not wait for the device.

    Args:
        stream: warm-up and recording run here, so that what libraries allocate for a stream is
            there before. pool: the memory that all recordings share.
    """

    def __init__(self, work: Callable[[], None], stream: Any, pool: Any):
        self.work = work  # and with it all tensors that it reads: their addresses are recorded
        before = torch.cuda.current_stream(stream.device)
        stream.wait_stream(before)
        try:
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UPS):
                    work()
            before.wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(
                self.graph, pool=pool, stream=stream, capture_error_mode="thread_local"
            ):
                work()
        finally:
            torch.cuda.set_stream(before)  # a recording that fails leaves its own behind

    def replay(self) -> None:
        self.graph.replay()


class OuterGraphs:
    """Takes outer steps by graphs on a GPU, and plainly elsewhere or where recording fails.

    Args:
        trained: leaf tensors; they must stay where they are, as an optimizer leaves them.
        enabled: whether to use graphs, if the tensors are on a GPU.

    Attributes:
        reason: why steps are plain, None where they are not.
    """

    def __init__(self, trained: Params, *, enabled: bool = True):
        self.trained = trained
        self.device = next(iter(trained.values())).device
        self.reason = None if enabled and self.device.type == "cuda" else "not asked for"
        self._known: dict[Hashable, tuple[_Rows, Any]] = {}
        if self.reason is None:
            self._prepare()

    def _prepare(self) -> None:
        self._gradients = {name: torch.zeros_like(value) for name, value in self.trained.items()}
        self._figures = torch.zeros(3, dtype=torch.float64, device=self.device)
        cuda = self.device.type == "cuda"
        self._stream = torch.cuda.Stream(self.device) if cuda else None
        self._pool = torch.cuda.graph_pool_handle() if cuda else None

    def step(
        self, losses: Losses, support: Batch, query: Batch, *, kind: Hashable = None
    ) -> Tensor:
        """Set `.grad` of the trained tensors to the gradient of the summed query losses.

        A graph's `.grad` is the same tensor after every step: use it before the next one.

        Args:
            losses: recorded once for each shape and kind; what it reads besides must stay in place.
            support, query: T x M rows each, on any device, best on the CPU.
            kind: what else decides about the computation (first or second order, say).

        Returns:
            The figures [3] of `outer_losses`, on the device: reading them waits for the step.
        """
        if self.reason is not None:
            return self._plainly(losses, support.to(self.device), query.to(self.device))
        length, rows = bucket(support, query), (len(support.ids), len(query.ids))
        key = (length, rows, kind)
        if key not in self._known:
            inputs = _Rows(rows, length, self.device)
            inputs.fill(support, query)
            try:
                self._known[key] = inputs, self._record(losses, inputs)
            except RuntimeError as error:
                # Ending a recording that failed fails as well; what came first says why.
                self.reason = str(error.__context__ or error).partition("\n")[0]
                log.info("no CUDA graphs, steps are launched kernel by kernel: %s", self.reason)
                self._known.clear()  # their memory may be what was missing
            # Not in the handler, which holds what it had allocated.
            if self.reason is None and self._replays_differently(self._known[key][1]):
                self.reason = "a recorded step differs from a plain one"
                log.warning("no CUDA graphs: %s", self.reason)
                self._known.clear()
            if self.reason is not None:
                return self.step(losses, support, query, kind=kind)
        else:
            inputs, recording = self._known[key]
            inputs.fill(support, query)
            recording.replay()
        for name, value in self.trained.items():
            value.grad = self._gradients[name]
        return self._figures.clone()  # the next step writes over them

    def _replays_differently(self, recording: _Recording) -> bool:
        """Replay for the first time; whether that misses the gradients of the warm-up, which ran on
        the same rows and are still there: recording computes nothing. NaN is equal to nothing."""
        before = [gradient.clone() for gradient in self._gradients.values()]
        for gradient in self._gradients.values():
            gradient.zero_()
        recording.replay()
        return not all(
            bool((gradient - old).norm() <= _ROUNDING * old.norm())
            for gradient, old in zip(self._gradients.values(), before, strict=True)
        )

    def _record(self, losses: Losses, inputs: _Rows) -> _Recording:
        kind = self.device.type

        def work() -> None:
            # Autocast keeps what it has cast, but a graph must cast anew in every replay.
            with (
                unpacked(),
                torch.autocast(
                    kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), False
                ),
            ):
                total, figures = losses(*inputs.batches())
            # To `.grad` directly it would be added, on the stream that the leaf was first used on.
            gradients = torch.autograd.grad(total, list(self.trained.values()))
            for kept, gradient in zip(self._gradients.values(), gradients, strict=True):
                kept.copy_(gradient)
            self._figures.copy_(figures)

        return _Recording(work, self._stream, self._pool)

    def _plainly(self, losses: Losses, support: Batch, query: Batch) -> Tensor:
        total, figures = losses(support, query)
        for value in self.trained.values():
            value.grad = None
        total.backward()
        return figures
