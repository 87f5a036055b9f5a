"""Which texts run together: batches of like lengths under a token budget."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from serve.tokenize import Encoded


@dataclass(frozen=True)
class BatchLimits:
    """What bounds a batch of B rows, the longest of S tokens.

    tokens: B x S, padding included.
    rows: B.
    tasks: different ones.
    run_cost: what a run costs besides its tokens, in tokens.
    scores: see `cells`; None for no bound.
        What no longer fits the processor's caches is slower in a larger batch, not faster.
    queries, keys: tokens of the prompt that attend, and that are attended to.
    """

    tokens: int
    rows: int
    tasks: int
    run_cost: int = 24
    scores: int | None = None
    queries: int = 0
    keys: int = 0

    def hold(self, rows: int, longest: int) -> bool:
        """Whether so many rows may run together. A row alone always may."""
        if rows == 1:
            return True
        return (
            rows <= self.rows
            and rows * longest <= self.tokens
            and (self.scores is None or self.cells(rows, longest) <= self.scores)
        )

    def cells(self, rows: int, longest: int) -> int:
        """Attention scores of a head and layer."""
        return rows * (longest + self.queries) * (longest + self.keys)


def plan(encoded: Sequence[Encoded], limits: BatchLimits) -> list[list[int]]:
    """Split texts into batches within the limits, whose padding costs no more than one more run
    would.

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
            and limits.hold(grown, longest)
            and padding <= limits.run_cost
            and (id(item.task) in tasks or len(tasks) < limits.tasks)
        )
        if fits:
            batches[-1].append(index)
        else:
            batches.append([index])
            longest, padding, tasks = len(item.ids), 0, set()
        tasks.add(id(item.task))
    return batches


def company(waiting: Sequence[Encoded], limits: BatchLimits, most: int) -> list[int]:
    """Which texts of a queue run with the first: those nearest to it in length, as many as make a
    token cheapest. Padding is run as well, but so is what every run costs however short it is.

    Args:
        waiting: at least one text.
        most: texts at most, besides the limits.

    Returns:
        Positions in `waiting`, 0 first.
    """
    lengths = [len(item.ids) for item in waiting]
    order = sorted(range(len(waiting)), key=lengths.__getitem__)
    low = high = order.index(0)
    useful = longest = lengths[0]
    chosen, tasks = [0], {id(waiting[0].task)}
    count, best = 1, useful / (longest + limits.run_cost)
    while len(chosen) < min(most, limits.rows):
        below = lengths[order[low - 1]] if low else None
        above = lengths[order[high + 1]] if high + 1 < len(order) else None
        if below is None and above is None:
            break
        if above is None or (below is not None and longest - below <= above - longest):
            low -= 1
            place = order[low]
        else:
            high += 1
            place = order[high]
        size = lengths[place]
        grown = max(longest, size)
        padded = (len(chosen) + 1) * grown
        alone = size + limits.run_cost  # what a run of its own would cost
        dearer = padded - len(chosen) * longest > alone
        if dearer or not limits.hold(len(chosen) + 1, grown):
            break
        task = id(waiting[place].task)
        if task not in tasks and len(tasks) == limits.tasks:
            continue
        tasks.add(task)
        chosen.append(place)
        useful += size
        longest = grown
        share = useful / (padded + limits.run_cost)
        if share >= best:
            count, best = len(chosen), share
    return chosen[:count]


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
