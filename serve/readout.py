"""From logits to answers: what `Classifier` gives for each text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from serve.errors import Failure
from serve.tokenize import Encoded


class NotFinite(Failure):
    """A logit is no number, or infinite, as when half precision overflows."""


@dataclass(frozen=True, slots=True)
class Result:
    """The answer for one text.

    Attributes:
        label: the most probable label.
        score: its probability.
        probabilities: of every label, after the task's temperature; they add up to 1.
        truncated: whether the text was cut to fit.
        task: the task's name.
    """

    label: str
    score: float
    probabilities: dict[str, float]
    truncated: bool
    task: str


def read_out(batch: Sequence[Encoded], logits: np.ndarray) -> list[Result]:
    """Probabilities and labels of one batch's logits [B, C].

    Raises:
        NotFinite: a row's logits are not.
    """
    if not np.isfinite(logits).all():
        raise NotFinite("the graph's logits are not finite: serve another --precision")
    heat = np.array([item.task.temperature for item in batch], np.float32)
    scaled = logits / heat[:, None]
    scaled -= scaled.max(axis=1, keepdims=True)
    odds = np.exp(scaled)
    odds /= odds.sum(axis=1, keepdims=True)
    results = []
    for item, row in zip(batch, odds.tolist(), strict=True):
        labels = item.task.labels
        best = max(range(len(labels)), key=row.__getitem__)
        results.append(
            Result(
                labels[best],
                row[best],
                dict(zip(labels, row, strict=False)),  # the row goes on with padded classes
                item.truncated,
                item.task.name,
            )
        )
    return results
