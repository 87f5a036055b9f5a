"""What the queue tells of its times: to an observer, and to who is turned away."""

from __future__ import annotations

import asyncio

import pytest
from serve_fake import FakeClassifier
from serve_queue import rows, run, send, settle

from serve.batcher import Batcher, QueueFull


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The batcher's time, which only the test lets pass."""
    now = [100.0]
    monkeypatch.setattr("serve.batcher.perf_counter", lambda: now[0])
    return now


class Noting:
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, int, int, float]] = []
        self.waits: list[float] = []

    def batch(self, rows: int, tokens: int, padded: int, seconds: float) -> None:
        self.batches.append((rows, tokens, padded, seconds))

    def waited(self, seconds: float) -> None:
        self.waits.append(seconds)


def test_an_observer_hears_of_padding_and_of_each_texts_wait(clock: list[float]) -> None:
    """A text of 1 token runs for 3 seconds; meanwhile texts of 4 and 6 wait, one 3 and one 1."""

    async def story(batcher: Batcher, fake: FakeClassifier) -> None:
        fake.gate.clear()
        futures = [send(batcher, rows(1))]
        await settle()
        futures.append(send(batcher, rows(4)))
        clock[0] += 2
        futures.append(send(batcher, rows(6)))
        clock[0] += 1
        fake.gate.set()
        await asyncio.gather(*futures)

    noting = Noting()
    run(story, observer=noting)
    assert noting.batches == [(1, 1, 1, 3.0), (2, 4 + 6, 6 + 6, 0.0)]
    assert noting.waits == [0.0, 3.0, 1.0]


@pytest.mark.parametrize(("seconds", "workers", "wanted"), [
    (0.0, 1, 1),  # nothing is known yet: soon
    (2.0, 1, 8),  # 4 texts in 2 s: 2 texts a second, and 15 wait
    (2.0, 2, 4),  # two workers do twice as much
    (0.2, 1, 1),
    (80.0, 1, 60),  # no longer than a minute
])  # fmt: skip
def test_who_is_turned_away_is_told_when_the_queue_will_be_empty(
    clock: list[float], seconds: float, workers: int, wanted: int
) -> None:
    async def story(batcher: Batcher, fake: FakeClassifier) -> None:
        fake.gate.clear()
        if seconds:
            first = send(batcher, rows(2, 2, 2, 2))
            await settle()
            clock[0] += seconds
            fake.gate.set()
            await first
            fake.gate.clear()
        for _ in range(workers):  # all of them are busy
            send(batcher, rows(1))
            await settle()
        send(batcher, rows(*[2] * 15))
        with pytest.raises(QueueFull) as caught:
            batcher.admit(6)
        assert caught.value.retry_after == wanted

    run(story, workers=workers)
