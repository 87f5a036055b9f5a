"""Which texts run together, and how a batch's rows are grouped for the graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import serve_toy as toy
from hypothesis import given
from hypothesis import strategies as st
from serve_fake import task

from serve.classifier import Classifier
from serve.plan import BatchLimits, company, in_groups, plan
from serve.task import Task
from serve.tokenize import Encoded


def test_rows_of_one_task_are_one_group() -> None:
    assert in_groups([7, 7, 7]) == ([0, 1, 2], [7])


def test_as_many_rows_of_each_task_are_a_group_each() -> None:
    assert in_groups([4, 2, 2, 4]) == ([1, 2, 0, 3], [2, 4])


def test_tasks_with_more_and_fewer_rows_are_given_row_by_row() -> None:
    assert in_groups([4, 2, 2]) == ([0, 1, 2], [4, 2, 2])


def test_groups_are_as_large_as_every_task_allows() -> None:
    """Four rows of task 3 and six of task 1: pairs."""
    slots = [3, 1, 1, 3, 1, 3, 1, 3, 1, 1]
    assert in_groups(slots) == ([1, 2, 4, 6, 8, 9, 0, 3, 5, 7], [1, 1, 1, 3, 3])


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40))
def test_every_row_is_given_once_and_with_its_own_task(slots: list[int]) -> None:
    order, groups = in_groups(slots)
    assert sorted(order) == list(range(len(slots)))
    assert len(slots) % len(groups) == 0
    size = len(slots) // len(groups)
    assert [slots[place] for place in order] == [slot for slot in groups for _ in range(size)]


def cheapest(lengths: list[int], most: int, cost: int) -> float:
    """Tokens run for each token of text, of the best batch around the first text: every run of
    neighbours in length that holds it, tried one by one."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    here = order.index(0)
    best = float("inf")
    for low in range(here + 1):
        for high in range(here, len(order)):
            chosen = [lengths[place] for place in order[low : high + 1]]
            if len(chosen) <= most:
                best = min(best, (len(chosen) * max(chosen) + cost) / sum(chosen))
    return best


@given(st.lists(st.integers(1, 60), min_size=1, max_size=12), st.integers(1, 12))
def test_company_holds_the_first_and_keeps_to_the_limits(lengths: list[int], most: int) -> None:
    """No cheaper than the best batch of all, no dearer than the first text alone."""
    waiting = [Encoded([5] * length, False, None) for length in lengths]
    limits = BatchLimits(tokens=300, rows=8, tasks=1)
    found = company(waiting, limits, most)
    assert found[0] == 0 and len(set(found)) == len(found) <= min(8, most)
    chosen = [lengths[place] for place in found]
    assert len(found) == 1 or len(found) * max(chosen) <= 300
    price = (len(found) * max(chosen) + limits.run_cost) / sum(chosen)
    alone = (lengths[0] + limits.run_cost) / lengths[0]
    assert cheapest(lengths, min(8, most), limits.run_cost) <= price <= alone


def row(length: int, item: Task) -> Encoded:
    return Encoded([1] * length, False, item)


def test_plan_respects_budget_rows_and_tasks() -> None:
    rng = np.random.default_rng(3)
    tasks = [task("film") for _ in range(7)]  # seven objects
    rows = [row(int(rng.integers(1, 50)), tasks[rng.integers(7)]) for _ in range(300)]
    batches = plan(rows, BatchLimits(tokens=200, rows=12, tasks=3, run_cost=16))
    assert sorted(i for batch in batches for i in batch) == list(range(300))
    for batch in batches:
        assert len(batch) * max(len(rows[i].ids) for i in batch) <= 200
        assert len(batch) <= 12 and len({id(rows[i].task) for i in batch}) <= 3


def test_plan_runs_a_text_over_the_budget_alone() -> None:
    film = task("film")
    rows = [row(500, film), row(3, film), row(2, film)]
    assert plan(rows, BatchLimits(100, 64, 9, 16)) == [[0], [1, 2]]


def test_plan_pads_as_long_as_it_costs_less_than_another_run() -> None:
    film = task("film")
    rows = [row(length, film) for length in (10, 40, 9, 39, 38, 10)]
    # 1 + 2 and 0 + 1 padded
    assert plan(rows, BatchLimits(1000, 64, 9, 3)) == [[1, 3, 4], [0, 5, 2]]
    assert plan(rows, BatchLimits(1000, 64, 9, 2)) == [[1, 3], [4], [0, 5, 2]]
    assert plan(rows, BatchLimits(1000, 64, 9, 1000)) == [[1, 3, 4, 0, 5, 2]]


@pytest.mark.parametrize(("queries", "keys"), [(0, 0), (0, 10), (10, 10)])
def test_plan_bounds_the_attention_scores(queries: int, keys: int) -> None:
    film = task("film")
    limits = BatchLimits(10**6, 64, 9, 10**6, scores=5000, queries=queries, keys=keys)
    rows = [row(length, film) for length in [90] * 3 + [40] * 5 + [10] * 30]
    batches = plan(rows, limits)
    assert sorted(i for batch in batches for i in batch) == list(range(38))
    for batch, after in zip(batches, [*batches[1:], []], strict=True):
        longest = len(rows[batch[0]].ids)
        row_scores = (longest + queries) * (longest + keys)
        assert len(batch) == 1 or len(batch) * row_scores <= 5000
        # Full: with the next text it would have been too much.
        assert not after or (len(batch) + 1) * row_scores > 5000


@pytest.mark.parametrize(("mode", "queries"), [("full", 5), ("prefix", 0), ("deep", 0)])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_cpu_bounds_batches_by_its_caches_and_threads(
    tmp_path: Path, mode: str, queries: int, threads: int
) -> None:
    """Scores of the toy's 2 heads in 4 bytes each fill 6 MiB; a prompt of 5 is always attended to,
    and attends itself in mode full only; a run costs 16 tokens for each thread."""
    found = Classifier(toy.make_bundle(tmp_path / "b", mode), threads=threads)
    assert found.limits == BatchLimits(
        tokens=2048, rows=32, tasks=found.bank.capacity, run_cost=16 * threads,
        scores=6 * 1024 * 1024 // (2 * 4), queries=queries, keys=5,
    )  # fmt: skip
