"""The queue's rules, on a fake classifier."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from serve_fake import FakeClassifier, answer, task
from serve_queue import FILM, FOOD, rows, run, send, settle

from serve.batcher import Batcher, ClientGone, DeadlinePassed, QueueFull, TooManyTexts
from serve.errors import Failure
from serve.readout import NotFinite
from serve.tokenize import Encoded


def test_results_come_back_in_order_whatever_the_batches() -> None:
    async def story(batcher: Batcher, fake: FakeClassifier) -> None:
        encoded = rows(9, 2, 40) + rows(3, 1, of=FOOD) + rows(30)
        results = await send(batcher, encoded)
        assert results == [answer(item) for item in encoded]
        assert batcher.waiting == 0

    run(story)


def test_waiting_requests_are_merged_across_tasks() -> None:
    async def story(batcher: Batcher, fake: FakeClassifier) -> None:
        fake.gate.clear()
        futures = [send(batcher, rows(3))]
        await settle()  # the worker is busy with the first
        futures += [send(batcher, rows(4, of=kind)) for kind in (FILM, FOOD, FILM)]
        fake.gate.set()
        await asyncio.gather(*futures)
        assert [len(batch) for batch in fake.batches] == [1, 3]

    run(story)


def test_the_oldest_waits_max_wait_for_others() -> None:
    async def story(batcher: Batcher, fake: FakeClassifier) -> None:
        first = send(batcher, rows(3))
        await asyncio.sleep(0.05)
        second = send(batcher, rows(3))
        await asyncio.gather(first, second)
        assert [len(batch) for batch in fake.batches] == [2]

    run(story, max_wait=0.5)


def test_rare_requests_do_not_wait_for_company_that_will_not_come() -> None:
    async def story(batcher: Batcher, fake: FakeClassifier) -> None:
        for _ in range(8):  # it learns from the first few
            await send(batcher, rows(3))
            await asyncio.sleep(0.2)
        send(batcher, rows(3))
        for _ in range(3):  # the worker's turns; no time passes
            await asyncio.sleep(0)
        assert batcher.waiting == 0

    run(story, max_wait=0.1)


def test_a_client_who_waits_for_each_answer_is_not_made_to_wait_for_company() -> None:
    """However quickly it asks again: only its first request may be the first of many."""

    async def story(batcher: Batcher, fake: FakeClassifier) -> None:
        await send(batcher, rows(3))
        for _ in range(20):
            answered = send(batcher, rows(3))
            await settle()  # a twentieth of a second
            assert answered.done()

    run(story, max_wait=0.5)


def test_two_who_ask_together_are_answered_together_however_often() -> None:
    async def story(batcher: Batcher, fake: FakeClassifier) -> None:
        for _ in range(12):
            await asyncio.gather(send(batcher, rows(3)), send(batcher, rows(3)))
        assert [len(batch) for batch in fake.batches] == [2] * 12

    run(story, max_wait=0.02)


@pytest.mark.parametrize("count_and_length", [(4, 3), (2, 50)])
def test_a_full_batch_does_not_wait(count_and_length: tuple[int, int]) -> None:
    async def story(batcher: Batcher, fake: FakeClassifier) -> None:
        count, length = count_and_length
        await asyncio.wait_for(send(batcher, rows(*[length] * count)), 5)

    run(story, max_wait=60, deadline=100)


def test_who_waits_for_company_goes_as_soon_as_the_batch_is_full() -> None:
    async def story(batcher: Batcher, fake: FakeClassifier) -> None:
        first = send(batcher, rows(3))
        await settle()
        assert not first.done()
        second = send(batcher, rows(3, 3, 3))
        await asyncio.wait_for(asyncio.gather(first, second), 5)

    run(story, max_wait=60, deadline=100)


def test_a_batch_keeps_to_rows_tokens_and_tasks() -> None:
    kinds = [task(f"t{i}") for i in range(5)]

    async def story(batcher: Batcher, fake: FakeClassifier) -> None:
        lengths = [1 + (7 * i) % 45 for i in range(20)]
        encoded = [Encoded([5] * n, False, kinds[i % 5]) for i, n in enumerate(lengths)]
        results = await send(batcher, encoded)
        assert [r.task for r in results] == [item.task.name for item in encoded]

    fake = run(story)
    for batch in fake.batches:
        longest = max(len(item.ids) for item in batch)
        assert len(batch) <= 4 and len({item.task.name for item in batch}) <= 2
        assert len(batch) * longest <= 100
    assert sum(len(batch) for batch in fake.batches) == 20


def test_every_batch_holds_the_oldest_text() -> None:
    async def story(batcher: Batcher, fake: FakeClassifier) -> None:
        fake.gate.clear()
        busy = send(batcher, rows(1))
        await settle()
        odd = send(batcher, rows(90))  # fits with nothing else
        others = [send(batcher, rows(2, 2, 2, 2)) for _ in range(3)]
        fake.gate.set()
        await asyncio.gather(busy, odd, *others)
        assert [len(item.ids) for item in fake.batches[1]] == [90]

    run(story)


def behind_a_busy_worker(*lengths: int, **settings: Any) -> list[list[int]]:
    """The lengths in each batch of texts that wait together until the worker is free."""

    async def story(batcher: Batcher, fake: FakeClassifier) -> None:
        fake.gate.clear()
        busy = send(batcher, rows(1))
        await settle()
        waiting = send(batcher, rows(*lengths))
        fake.gate.set()
        await asyncio.gather(busy, waiting)

    batches = run(story, **settings).batches[1:]
    return [sorted(len(item.ids) for item in batch) for batch in batches]


def test_texts_of_like_length_share_a_batch() -> None:
    batches = behind_a_busy_worker(300, 4, 299, 5, 301, tokens=10_000)
    assert batches == [[299, 300, 301], [4, 5]]


@pytest.mark.parametrize(("cost", "sizes"), [(1, [[10, 10], [12, 12]]), (100, [[10, 10, 12, 12]])])
def test_padding_is_run_where_a_run_of_its_own_costs_more(
    cost: int, sizes: list[list[int]]
) -> None:
    """Two texts of 10 tokens and two of 12, in one run or in two: 48 tokens and one run's cost,
    or 44 tokens and two."""
    assert behind_a_busy_worker(10, 12, 10, 12, run_cost=cost) == sizes


def test_long_texts_do_not_run_together_when_their_attention_is_too_much() -> None:
    batches = behind_a_busy_worker(20, 30, 20, 30, scores=800)
    assert batches == [[20, 20], [30], [30]]  # 2 x 20 x 20 is within 800, 2 x 30 x 30 is not


def test_the_queue_is_bounded_in_texts() -> None:
    async def story(batcher: Batcher, fake: FakeClassifier) -> None:
        fake.gate.clear()
        first = send(batcher, rows(1))
        await settle()
        waiting = send(batcher, rows(*[2] * 15))
        with pytest.raises(QueueFull) as caught:
            batcher.admit(6)
        assert caught.value.retry_after >= 1
        with pytest.raises(TooManyTexts):
            batcher.admit(21)
        fits = send(batcher, rows(*[2] * 5))
        assert batcher.waiting == 20
        fake.gate.set()
        await asyncio.gather(first, waiting, fits)
        await send(batcher, rows(*[2] * 20))  # all of it is free again

    run(story)


def test_a_deadline_ends_a_request_and_its_texts_are_not_run() -> None:
    async def story(batcher: Batcher, fake: FakeClassifier) -> None:
        fake.gate.clear()
        running = send(batcher, rows(1))
        await settle()
        late = send(batcher, rows(7, 7))
        with pytest.raises(DeadlinePassed):
            await late
        with pytest.raises(DeadlinePassed):
            await running
        assert batcher.waiting == 0
        fake.gate.set()
        await settle()
        assert [len(batch) for batch in fake.batches] == [1]
        await send(batcher, rows(2))

    run(story, deadline=0.3)


def test_a_client_that_goes_costs_no_work() -> None:
    async def story(batcher: Batcher, fake: FakeClassifier) -> None:
        fake.gate.clear()
        running = send(batcher, rows(1))
        await settle()
        request = batcher.admit(3)
        batcher.enqueue(request, rows(2, 2, 2))
        stays = send(batcher, rows(4))
        batcher.fail(request, ClientGone())
        assert batcher.waiting == 1
        fake.gate.set()
        await asyncio.gather(running, stays)
        assert [[len(i.ids) for i in batch] for batch in fake.batches] == [[1], [4]]

    run(story)


def test_a_request_that_ended_while_it_was_tokenized_is_not_queued() -> None:
    async def story(batcher: Batcher, fake: FakeClassifier) -> None:
        request = batcher.admit(2)
        batcher.fail(request, ClientGone())
        batcher.enqueue(request, rows(2, 2))
        await settle()
        assert fake.batches == [] and batcher.waiting == 0

    run(story)


def test_a_broken_task_fails_alone() -> None:
    async def story(batcher: Batcher, fake: FakeClassifier) -> None:
        fake.gate.clear()
        busy = send(batcher, rows(1))
        await settle()
        fake.broken.add("food")
        good, bad = send(batcher, rows(2, 3)), send(batcher, rows(2, of=FOOD))
        fake.gate.set()
        await busy
        assert await good == [answer(item) for item in rows(2, 3)]
        with pytest.raises(Failure, match="food"):
            await bad

    run(story)


def test_a_row_that_is_not_finite_fails_alone() -> None:
    async def story(batcher: Batcher, fake: FakeClassifier) -> None:
        fake.gate.clear()
        busy = send(batcher, rows(1))
        await settle()
        fake.overflowing.add(7)
        good, bad, also = send(batcher, rows(2, 3)), send(batcher, rows(7)), send(batcher, rows(5))
        fake.gate.set()
        await busy
        assert await good == [answer(item) for item in rows(2, 3)]
        assert await also == [answer(item) for item in rows(5)]
        with pytest.raises(NotFinite):
            await bad

    run(story)


def test_stop_answers_what_was_accepted_without_waiting_for_company() -> None:
    async def story(batcher: Batcher, fake: FakeClassifier) -> None:
        futures = [send(batcher, rows(n)) for n in (2, 3, 40)]
        assert await batcher.stop(5)
        assert all(future.done() for future in futures)

    run(story, max_wait=60, deadline=100)


def test_stop_says_when_a_request_was_left() -> None:
    async def story(batcher: Batcher, fake: FakeClassifier) -> None:
        fake.gate.clear()
        future = send(batcher, rows(2))
        await settle()
        assert not await batcher.stop(0.1)
        with pytest.raises(DeadlinePassed):
            await future

    run(story)


def test_two_workers_run_two_batches_at_once() -> None:
    async def story(batcher: Batcher, fake: FakeClassifier) -> None:
        fake.gate.clear()
        futures = [send(batcher, rows(1)), send(batcher, rows(1))]
        await settle()
        futures.append(send(batcher, rows(90)))
        await settle()
        assert len(batcher.running_since) == 2
        fake.gate.set()
        await asyncio.gather(*futures)

    run(story, workers=2, rows=1)


def test_a_worker_goes_on_while_the_loop_is_busy() -> None:
    """The next batch is taken by the worker itself: the loop only delivers."""

    async def story(batcher: Batcher, fake: FakeClassifier) -> None:
        fake.gate.clear()
        futures = [send(batcher, rows(1))]
        await settle()
        futures += [send(batcher, rows(2, 2, 2, 2)), send(batcher, rows(3, 3, 3, 3))]
        fake.gate.set()
        end = time.monotonic() + 5
        while len(fake.batches) < 3 and time.monotonic() < end:
            time.sleep(0.001)  # the loop is busy with something else
        assert [len(batch) for batch in fake.batches] == [1, 4, 4]
        assert not any(future.done() for future in futures)
        await asyncio.gather(*futures)

    run(story)


@pytest.mark.parametrize(
    ("workers", "sizes"), [(1, [40]), (2, [20, 10, 8, 2]), (4, [10, 8, 8, 8, 6])]
)
def test_a_batch_takes_its_workers_share_of_what_waits(workers: int, sizes: list[int]) -> None:
    async def story(batcher: Batcher, fake: FakeClassifier) -> None:
        await send(batcher, rows(*[2] * 40))

    fake = run(story, workers=workers, rows=64, tokens=1000, max_queue=64)
    assert sorted((len(batch) for batch in fake.batches), reverse=True) == sizes


def test_alive_is_false_while_a_batch_hangs() -> None:
    async def story(batcher: Batcher, fake: FakeClassifier) -> None:
        assert batcher.alive()
        fake.gate.clear()
        with pytest.raises(DeadlinePassed):
            await send(batcher, rows(1))
        await asyncio.sleep(0.05)
        assert not batcher.alive()
        fake.gate.set()
        await settle()
        assert batcher.alive()

    run(story, deadline=0.1)
