"""Continuous batching: texts that wait are merged, across requests and tasks, into one batch.

A free worker takes the next batch as soon as the token budget is full or the oldest text has
waited `max_wait`; while all workers are busy, texts gather by themselves. When requests come so
rarely that none is to be expected within `max_wait`, or all from one client who waits for each
answer, a free worker does not wait at all.

Every batch contains the oldest text, so none starves. The queue is bounded in texts, a request has
a deadline, and the texts of a request that failed, expired or lost its client leave the queue at
once.

A worker's thread runs its batches and, as long as there is a next one, takes that itself: the
loop, which may be busy with requests for milliseconds, only delivers the answers. All else runs on
the event loop's thread; a lock guards the queue between them.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from time import perf_counter  # uvloop's own clock ticks in milliseconds
from typing import Protocol

from serve.errors import Failure
from serve.plan import BatchLimits, company
from serve.readout import NotFinite, Result
from serve.tokenize import Encoded

log = logging.getLogger(__name__)

THREADS = "metapt-"  # how the names of a server's threads begin
_LEAST = 8  # texts that a batch may always have, few though they may be for several workers
_WINDOW = 4  # times `max_rows`: how many of the oldest texts are looked at for a batch


class QueueFull(Exception):
    """No room for the request's texts; `retry_after` is in whole seconds."""

    def __init__(self, retry_after: int) -> None:
        super().__init__("the queue is full")
        self.retry_after = retry_after


class TooManyTexts(Exception):
    """The request alone has more texts than the queue holds."""


class DeadlinePassed(Exception):
    """The request was not answered in time."""


class ClientGone(Exception):
    """The client closed its connection."""


class Observer(Protocol):
    """What wants to know how the queue does; seconds and counts."""

    def batch(self, rows: int, tokens: int, padded: int, seconds: float) -> None:
        """A batch has run."""

    def waited(self, seconds: float) -> None:
        """A text left the queue for a batch."""


@dataclass(eq=False, slots=True)
class Request:
    """The texts of one request on their way through the queue.

    Attributes:
        future: its results in order, or the exception that ended it.
        counted: texts that still count against the queue's bound.
        alone: no other request was open when it came.
    """

    future: asyncio.Future[list[Result]]
    counted: int
    results: list[Result | None]
    left: int
    alone: bool
    timer: asyncio.TimerHandle | None = None
    rows: list[int] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class _Row:
    encoded: Encoded
    request: Request
    index: int
    arrived: float


class Batcher:
    """The queue and its workers.

    Attributes:
        waiting: texts in the queue, those that are being tokenized included.
        running_since: when, by `perf_counter`, each busy worker began its batch.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Encoded]], list[Result]],
        *,
        limits: BatchLimits,
        max_wait: float,
        max_queue: int,
        deadline: float,
        workers: int = 1,
        observer: Observer | None = None,
    ) -> None:
        """Args:
        run: classifies one batch; called in a worker's thread.
        limits: of a batch.
        max_wait: seconds that the oldest text waits for others that are likely.
        max_queue: texts that may wait.
        deadline: seconds from `admit` to the answer.
        workers: batches that run at the same time.
        observer: is told about batches and waiting times.
        """
        self._run = run
        self._limits = limits
        self._max_wait, self._max_queue, self._deadline = max_wait, max_queue, deadline
        self._workers = workers
        self._observer = observer
        # Of what workers change too: `_rows`, `_tokens`, `waiting` and `Request.counted`.
        self._lock = threading.Lock()
        self._rows: dict[int, _Row] = {}  # oldest first
        self._tokens = 0  # of the rows, without padding
        self._numbers = itertools.count()
        self._open: set[Request] = set()
        self._rate = 0.0  # texts per second, a moving average
        self._gap = 0.0  # seconds between two requests, a moving average
        self._latest = 0.0
        self._alone = False  # the latest request was
        self.waiting = 0
        self.running_since: dict[int, float] = {}
        self.draining = False

    async def start(self) -> None:
        """Start the workers; must be called on the loop that will serve."""
        self._loop = asyncio.get_running_loop()
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._pool = ThreadPoolExecutor(self._workers, thread_name_prefix=f"{THREADS}batch")
        self._tasks = [asyncio.create_task(self._work(n)) for n in range(self._workers)]

    async def stop(self, seconds: float) -> bool:
        """Answer what was accepted, for at most `seconds`, and end the workers.

        Returns:
            Whether every accepted request was answered.
        """
        self.drain()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), seconds)
        if self._open:
            log.warning("%d requests were not answered before the end", len(self._open))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._pool.shutdown(wait=False, cancel_futures=True)
        answered = not self._open
        for request in list(self._open):
            self.fail(request, DeadlinePassed())
        return answered

    def drain(self) -> None:
        """From now on nothing waits for company."""
        self.draining = True
        self._wake.set()

    def alive(self) -> bool:
        """Whether every worker runs, and none has been at one batch for longer than a request may
        take (a batch whose answers nobody waits for any more)."""
        late = perf_counter() - self._deadline
        return not any(task.done() for task in self._tasks) and not any(
            since < late for since in self.running_since.values()
        )

    # ---- requests ----------------------------------------------------------------------------

    def admit(self, texts: int) -> Request:
        """Reserve room for a request's texts, before any work is spent on them.

        Raises:
            TooManyTexts: they would never fit.
            QueueFull: they do not fit now.
        """
        if texts > self._max_queue:
            raise TooManyTexts(
                f"{texts} texts in one request, but the server takes {self._max_queue}: send "
                "them in several requests"
            )
        with self._lock:
            if self.waiting + texts > self._max_queue:
                seconds = self.waiting / self._rate if self._rate else 1.0
                raise QueueFull(max(1, min(60, math.ceil(seconds))))
            self.waiting += texts
        request = Request(
            self._loop.create_future(), texts, [None] * texts, texts, alone=not self._open
        )
        self._open.add(request)
        self._idle.clear()
        request.timer = self._loop.call_later(self._deadline, self.fail, request, DeadlinePassed())
        return request

    def enqueue(self, request: Request, encoded: Sequence[Encoded]) -> None:
        """Put an admitted request's texts into the queue; its `future` gets the answer."""
        if request.future.done():  # it expired, or its client went, while it was tokenized
            return
        now = perf_counter()
        # Cut off, so that the pause between two bursts does not hide that they are bursts. Between
        # two that were alone there was an answer: a client's own pace says nothing of company.
        most = 4 * self._max_wait
        gap = most if request.alone and self._alone else min(now - self._latest, most)
        self._gap += 0.2 * (gap - self._gap)
        self._latest, self._alone = now, request.alone
        with self._lock:
            was_empty = not self._rows
            for index, item in enumerate(encoded):
                number = next(self._numbers)
                self._rows[number] = _Row(item, request, index, now)
                request.rows.append(number)
                self._tokens += len(item.ids)
            if was_empty or self._full():
                self._wake.set()

    def fail(self, request: Request, error: Exception) -> None:
        """End a request: its texts leave the queue, its future raises `error`."""
        with self._lock:
            for number in request.rows:
                row = self._rows.pop(number, None)
                if row is not None:
                    self._tokens -= len(row.encoded.ids)
            self.waiting -= request.counted
            request.counted = 0
        if not request.future.done():
            request.future.set_exception(error)
            request.future.exception()  # marked as seen: the client may be gone already
        self._close(request)

    def _close(self, request: Request) -> None:
        if request.timer is not None:
            request.timer.cancel()
        self._open.discard(request)
        if not self._open:
            self._idle.set()

    # ---- batches -----------------------------------------------------------------------------

    def _full(self) -> bool:
        return self._tokens >= self._limits.tokens or len(self._rows) >= self._limits.rows

    def _due(self) -> bool:
        """Whether there is a batch worth running now; the lock is held."""
        if not self._rows:
            return False
        lonely = self._gap > self._max_wait
        return lonely or self.draining or self._full() or self._patience() <= 0

    def _patience(self) -> float:
        """Seconds that the oldest text still waits for company; the lock is held."""
        return next(iter(self._rows.values())).arrived + self._max_wait - perf_counter()

    def _take(self) -> list[_Row]:
        """The next batch, or nothing where none is due."""
        with self._lock:
            return self._pick() if self._due() else []

    async def _work(self, number: int) -> None:
        while True:
            if batch := self._take():
                # Keys come and go here only: the loop may be counting them.
                self.running_since[number] = perf_counter()
                await self._loop.run_in_executor(self._pool, self._run_batches, number, batch)
                del self.running_since[number]
            else:
                await self._until_due()

    async def _until_due(self) -> None:
        """Wait until a batch may be due."""
        with self._lock:
            self._wake.clear()
            if self._due():
                return
            patience = self._patience() if self._rows else None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience):
                await self._wake.wait()

    def _run_batches(self, number: int, batch: list[_Row]) -> None:
        """Run a batch, and those that are due after it, in a worker's thread."""
        try:
            while batch:
                begun = self.running_since[number] = perf_counter()
                self._loop.call_soon_threadsafe(self._began, batch, begun)
                answers = self._answers([row.encoded for row in batch])
                seconds = perf_counter() - begun
                self._loop.call_soon_threadsafe(self._finish, batch, answers, seconds)
                batch = self._take()
        except RuntimeError:
            if not self._loop.is_closed():  # otherwise nobody waits for answers any more
                raise

    def _began(self, batch: Sequence[_Row], begun: float) -> None:
        if self._observer is not None:
            for row in batch:
                self._observer.waited(begun - row.arrived)

    def _finish(
        self, batch: Sequence[_Row], answers: Sequence[Result | Exception], seconds: float
    ) -> None:
        """Deliver a batch's answers, and tell who observes."""
        self._deliver(batch, answers)
        rate = len(batch) / max(seconds, 1e-6) * self._workers
        self._rate = 0.8 * self._rate + 0.2 * rate if self._rate else rate
        if self._observer is not None:
            lengths = [len(row.encoded.ids) for row in batch]
            self._observer.batch(len(batch), sum(lengths), len(batch) * max(lengths), seconds)

    def _pick(self) -> list[_Row]:
        """Take the oldest text and its best company; the lock is held.

        No more than a worker's share of what waits, so that the next one that is free finds work
        (guided self-scheduling, Polychronopoulos and Kuck 1987).
        """
        share = max(_LEAST, math.ceil(len(self._rows) / self._workers))
        numbers = list(itertools.islice(self._rows, self._limits.rows * _WINDOW))
        found = company([self._rows[number].encoded for number in numbers], self._limits, share)
        batch = [self._rows.pop(numbers[place]) for place in found]
        for row in batch:
            self._tokens -= len(row.encoded.ids)
            self.waiting -= 1
            row.request.counted -= 1
        return batch

    def _answers(self, encoded: Sequence[Encoded]) -> list[Result | Exception]:
        """Run a batch in a worker's thread; what fails, fails for the rows of its task only, and
        what is not finite for its own row."""
        try:
            return list(self._run(encoded))
        except Exception as error:  # delivered to the requests that it concerns
            groups: dict[int, list[int]] = {}
            for index, item in enumerate(encoded):
                groups.setdefault(id(item.task), []).append(index)
            if len(groups) == 1 and isinstance(error, NotFinite) and len(encoded) > 1:
                groups = {index: [index] for index in range(len(encoded))}  # not all rows are so
            elif len(groups) == 1:
                if isinstance(error, Failure):
                    log.error("task '%s': %s", encoded[0].task.name, error)
                else:
                    log.exception("task '%s' failed", encoded[0].task.name)
                return [error] * len(encoded)
        answers: list[Result | Exception | None] = [None] * len(encoded)
        for indices in groups.values():
            part = self._answers([encoded[i] for i in indices])
            for index, answer in zip(indices, part, strict=True):
                answers[index] = answer
        return [answer for answer in answers if answer is not None]

    def _deliver(self, batch: Sequence[_Row], answers: Sequence[Result | Exception]) -> None:
        for row, answer in zip(batch, answers, strict=True):
            request = row.request
            if request.future.done():
                continue
            if isinstance(answer, Exception):
                self.fail(request, answer)
                continue
            request.results[row.index] = answer
            request.left -= 1
            if not request.left:
                request.future.set_result([item for item in request.results if item is not None])
                self._close(request)
