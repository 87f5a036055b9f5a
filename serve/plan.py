"""Which texts run together: batches of like lengths under a token budget."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from serve.tokenize import Encoded


def plan(
    encoded: Sequence[Encoded],
    token_budget: int,
    max_rows: int,
    max_tasks: int,
    run_cost: int,
) -> list[list[int]]:
    """Split texts into batches whose padded size, rows x longest row, is within the budget, and
    whose padding costs no more than one more run would.

    Args:
        encoded: the texts.
        token_budget: padded tokens of a batch; a longer text runs alone.
        max_rows: rows of a batch.
        max_tasks: different tasks of a batch.
        run_cost: what a run costs besides its tokens, in tokens.

    Returns:
        Positions in `encoded`, each once: the longest texts first, so that memory peaks at once
        and not at the end.
    """
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i].ids))
    batches: list[list[int]] = []
    longest, padding, tasks = 0, 0, set[int]()
    for index in order:
        item = encoded[index]
        grown = len(batches[-1]) + 1 if batches else 1
        padding += longest - len(item.ids)
        fits = (
            bool(batches)
            and grown <= max_rows
            and grown * longest <= token_budget
            and padding <= run_cost
            and (id(item.task) in tasks or len(tasks) < max_tasks)
        )
        if fits:
            batches[-1].append(index)
        else:
            batches.append([index])
            longest, padding, tasks = len(item.ids), 0, set()
        tasks.add(id(item.task))
    return batches


def in_groups(slots: Sequence[int]) -> tuple[list[int], list[int]]:
    """How a batch's rows are given to a graph that reads what a task's rows share only once: the
    rows of a task together, in groups of one size: the largest that divides every task's rows.

    Args:
        slots: of each row, its task's slot in the bank.

    Returns:
        the order of the rows (positions in `slots`), and the slot of each group [G]; G divides the
        number of rows.
    """
    counts = Counter(slots)
    size = math.gcd(*counts.values())
    if size == 1:
        return list(range(len(slots))), list(slots)
    order = sorted(range(len(slots)), key=slots.__getitem__)
    return order, [slots[place] for place in order[::size]]
