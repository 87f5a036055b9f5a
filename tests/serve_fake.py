"""A classifier without a model for the tests of the queue and of HTTP.

A text's answer is a plain function of its words: `good` counts for the last label, `bad` for the
first. A `gate` holds batches back, so that a test decides when they end.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from types import SimpleNamespace

from serve.errors import Failure, UserError
from serve.plan import BatchLimits
from serve.readout import NotFinite, Result
from serve.task import Task
from serve.tokenize import Encoded

GOOD, BAD = 5, 6


def task(name: str, labels: Sequence[str] = ("negative", "positive")) -> Task:
    return Task(
        name=name, labels=list(labels), words=list(labels), word_ids=list(range(len(labels))),
        template="{text} x", prefix_ids=[], suffix_ids=[1], sha256=name.ljust(12, "0"),
    )  # fmt: skip


def answer(item: Encoded) -> Result:
    """What the fake says to one text."""
    labels = item.task.labels
    good, bad = item.ids.count(GOOD) + 1, item.ids.count(BAD) + 1
    share = good / (good + bad)
    odds = [1 - share] + [0.0] * (len(labels) - 2) + [share]
    best = odds.index(max(odds))
    pairs = dict(zip(labels, odds, strict=True))
    return Result(labels[best], odds[best], pairs, item.truncated, item.task.name)


class FakeEncoder:
    max_tokens = 50

    def room(self, task: Task) -> int:
        return self.max_tokens - 1

    def encode(self, texts: Sequence[str], tasks: Sequence[Task]) -> list[Encoded]:
        result = []
        for text, item in zip(texts, tasks, strict=True):
            ids = [GOOD if w == "good" else BAD if w == "bad" else 9 for w in text.split()]
            room = self.room(item)
            result.append(Encoded([*ids[:room], 1], len(ids) > room, item))
        return result


class FakeClassifier:
    """Has what `serve.http.App` uses of a `Classifier`."""

    def __init__(self, *, token_budget: int = 1000, max_rows: int = 8, max_tasks: int = 3) -> None:
        self.limits = BatchLimits(token_budget, max_rows, max_tasks)
        self.workers = 1
        self.tasks = {"film": task("film"), "food": task("food", ("no", "so", "yes"))}
        self.encoder = FakeEncoder()
        self.bundle = SimpleNamespace()
        self.gate = threading.Event()
        self.gate.set()
        self.batches: list[list[Encoded]] = []
        self.broken: set[str] = set()  # tasks that fail
        self.overflowing: set[int] = set()  # lengths of rows whose answer is not finite

    def run(self, batch: Sequence[Encoded]) -> list[Result]:
        self.batches.append(list(batch))
        self.gate.wait(10)
        for item in batch:
            if item.task.name in self.broken:
                raise Failure(f"the prompt of {item.task.name} is damaged")
            if len(item.ids) in self.overflowing:
                raise NotFinite("the graph's logits are not finite")
        return [answer(item) for item in batch]

    def warm(self) -> None:
        pass

    def add_task(self, name: str, record: object = None, prompt: object = None) -> Task:
        if name == "unknown":
            raise UserError("the bundle has no task 'unknown'")
        self.tasks = {**self.tasks, name: task(name)}
        return self.tasks[name]

    def remove_task(self, name: str) -> None:
        if name not in self.tasks:
            raise UserError(f"no task '{name}'")
        self.tasks = {key: value for key, value in self.tasks.items() if key != name}
