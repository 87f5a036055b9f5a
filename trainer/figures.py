"""Figures of a classifier: accuracy, macro-F1, confusion matrix, calibration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

BINS = 10  # confidence bins of the calibration error


def calibration_error(confidence: np.ndarray, correct: np.ndarray, bins: int = BINS) -> float:
    """Expected calibration error (Naeini et al. 2015; Guo et al. 2017, equation 3).

    Args:
        confidence: [N] in (0, 1]; correct: bool [N].
    """
    # Bins are (0, 0.1], (0.1, 0.2] ..., as in the paper.
    index = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    error = 0.0
    for number in range(bins):
        inside = index == number
        if inside.any():
            gap = abs(correct[inside].mean() - confidence[inside].mean())
            error += inside.mean() * gap
    return float(error)


def fit_temperature(scores: Tensor, labels: Tensor) -> float:
    """The temperature that makes the labels most likely (Guo et al. 2017, section 4.2).

    A golden-section search over its logarithm in [1/10, 10]: with some 40 rows a gradient method
    is no faster, and the bounds keep a perfectly separated sample from driving it to zero.

    Args:
        scores: [N, C]; labels: int64 [N].
    """
    scores = scores.double()

    def loss(log_temperature: float) -> float:
        return float(torch.nn.functional.cross_entropy(scores / np.exp(log_temperature), labels))

    low, high = -np.log(10.0), np.log(10.0)
    ratio = (5**0.5 - 1) / 2
    for _ in range(40):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        if loss(left) < loss(right):
            high = right
        else:
            low = left
    return float(np.exp((low + high) / 2))


def accuracy_interval(hits: int, rows: int) -> tuple[float, float]:
    """The 95 % interval of an accuracy (Wilson 1927): what as many other rows may well give."""
    if not rows:
        return 0.0, 1.0
    z, share = 1.959964, hits / rows
    middle = (share + z * z / (2 * rows)) / (1 + z * z / rows)
    spread = z * math.sqrt(share * (1 - share) / rows + z * z / (4 * rows * rows))
    spread /= 1 + z * z / rows
    return max(0.0, middle - spread), min(1.0, middle + spread)


def figures(
    scores: Tensor, labels: np.ndarray, names: Sequence[str], temperature: float = 1.0
) -> dict[str, Any]:
    """All figures of a set.

    Args:
        scores: [N, C] logits; labels: int64 [N]; names: the C labels.
        temperature: divides the logits before the softmax.

    Returns:
        accuracy with its 95 % interval, macro_f1, calibration_error, loss, rows, labels,
        confusion [C][C] (rows are the true classes), per_class precision, recall, f1, support.
    """
    logs = (scores.double() / temperature).log_softmax(-1).numpy()
    probabilities = np.exp(logs)
    predicted = probabilities.argmax(-1)
    classes = len(names)
    confusion = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(confusion, (labels, predicted), 1)
    hits = np.diag(confusion).astype(float)
    truth, said = confusion.sum(1), confusion.sum(0)
    recall = np.divide(hits, truth, out=np.zeros(classes), where=truth > 0)
    precision = np.divide(hits, said, out=np.zeros(classes), where=said > 0)
    both = precision + recall
    f1 = np.divide(2 * precision * recall, both, out=np.zeros(classes), where=both > 0)
    present = (truth + said) > 0  # a class neither there nor predicted has no F1
    chosen = logs[np.arange(len(labels)), labels]
    return {
        "rows": len(labels),
        "accuracy": float(hits.sum() / max(1, len(labels))),
        "accuracy_interval": list(accuracy_interval(int(hits.sum()), len(labels))),
        "macro_f1": float(f1[present].mean()) if present.any() else 0.0,
        "calibration_error": calibration_error(probabilities.max(-1), predicted == labels),
        "loss": float(-chosen.mean()),
        "labels": list(names),
        "confusion": confusion.tolist(),
        "per_class": {
            name: {
                "precision": float(precision[i]),
                "recall": float(recall[i]),
                "f1": float(f1[i]),
                "support": int(truth[i]),
            }
            for i, name in enumerate(names)
        },
    }


def as_table(values: dict[str, Any]) -> str:
    """The figures as text for a terminal."""
    names: list[str] = values["labels"]
    low, high = values["accuracy_interval"]
    wide = max(12, *(len(name) for name in names)) + 1
    lines = [
        f"rows               {values['rows']}",
        f"accuracy           {values['accuracy']:.4f}   (95 %: {low:.3f} to {high:.3f})",
        f"macro-F1           {values['macro_f1']:.4f}",
        f"calibration error  {values['calibration_error']:.4f}",
        "",
        "true \\ predicted".ljust(wide + 4)
        + "".join(name.rjust(wide) for name in names)
        + "".join(word.rjust(11) for word in ("precision", "recall", "F1")),
    ]
    for i, name in enumerate(names):
        row = values["per_class"][name]
        lines.append(
            name.ljust(wide + 4)
            + "".join(str(count).rjust(wide) for count in values["confusion"][i])
            + "".join(f"{row[key]:11.3f}" for key in ("precision", "recall", "f1"))
        )
    return "\n".join(lines)
