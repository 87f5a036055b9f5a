"""How a batch's rows are grouped for the graph."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from serve.plan import in_groups


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
