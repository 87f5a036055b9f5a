"""Stories of the queue: a started batcher over a fake classifier, and what is sent to it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from serve_fake import FakeClassifier, task

from serve.batcher import Batcher
from serve.plan import BatchLimits
from serve.tokenize import Encoded

FILM, FOOD = task("film"), task("food", ("no", "so", "yes"))


def rows(*lengths: int, of: Any = FILM) -> list[Encoded]:
    return [Encoded([5] * length, False, of) for length in lengths]


def run(
    story: Callable[[Batcher, FakeClassifier], Awaitable[None]], **settings: Any
) -> FakeClassifier:
    """Run a test's story with a started batcher, and end it within seconds whatever happens."""
    fake = FakeClassifier()
    bounds = {"tokens": 100, "rows": 4, "tasks": 2, "run_cost": 24, "scores": None}
    limits = BatchLimits(**{key: settings.pop(key, value) for key, value in bounds.items()})
    values = {"limits": limits, "max_wait": 0.0, "max_queue": 20, "deadline": 5.0} | settings

    async def main() -> None:
        batcher = Batcher(fake.run, **values)
        await batcher.start()
        try:
            await asyncio.wait_for(story(batcher, fake), 20)
        finally:
            fake.gate.set()
            await batcher.stop(5)
        # What is counted beside the rows themselves: a batch is full by it.
        assert batcher._tokens == sum(len(row.encoded.ids) for row in batcher._rows.values()) == 0

    asyncio.run(main())
    return fake


def send(batcher: Batcher, encoded: list[Encoded]) -> asyncio.Future:
    request = batcher.admit(len(encoded))
    batcher.enqueue(request, encoded)
    return request.future


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0.01)
