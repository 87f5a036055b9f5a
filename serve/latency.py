"""`python -m serve latency`: what an answer takes on this machine, in process."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from serve.cli import option
from serve.errors import UserError
from serve.files import text_lines
from serve.options import ModelConfig, make_classifier

# Of 6 to 40 words, for want of the user's own.
TEXTS = (
    "I would buy it again tomorrow.",
    "The soup was cold and nobody seemed to mind.",
    "Two hours of beautiful pictures, and not one person in them whom I cared about.",
    "It charges quickly, it sits well in the hand, and after a year of daily use it still holds as "
    "much as on the first day.",
    "We had booked a quiet room months ahead, were given one above the kitchen, and when we asked "
    "for another the man at the desk shrugged and said that all of them were taken, which was not "
    "true.",
)


@dataclass
class LatencyConfig(ModelConfig):
    """Time answers on this machine: percentiles of a call, and texts a second.

    Calls follow each other, as from one client of the Python class; HTTP adds about a millisecond
    and merges requests. Texts of your own tell more: the time grows with their length.
    """

    task: str = option("", help="name of the task; by default the bundle's first")
    texts: str | None = option(
        None, help="file with a text on each line; default: five sentences of 6 to 40 words"
    )
    sizes: list[int] = option([1, 8, 32], help="texts of a call, a line for each", minimum=1)
    seconds: float = option(3.0, help="how long each size is timed", minimum=0.01)
    json: bool = option(False, help="as JSON")

    examples: ClassVar[list[str]] = [
        "bundle",
        "bundle --precision int8 --threads 1 --workers 1 --texts reviews.txt --sizes 1 4 16",
    ]


def call_times(
    answer: Callable[[list[str]], Any],
    texts: Sequence[str],
    size: int,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> np.ndarray:
    """Seconds of each call of `answer` with the next `size` texts in turn, [calls].

    At least ten calls, and as many as begin within `seconds`.
    """
    found: list[float] = []
    place = 0
    end = clock() + seconds
    while True:
        chosen = [texts[(place + i) % len(texts)] for i in range(size)]
        place = (place + size) % len(texts)
        start = clock()
        if len(found) >= 10 and start >= end:
            return np.array(found)
        answer(chosen)
        found.append(clock() - start)


def summary(times: np.ndarray, size: int) -> dict[str, float]:
    """Percentiles in milliseconds, nearest rank, and the rate in texts a second."""
    p50, p95, p99 = np.percentile(1000 * times, [50, 95, 99], method="inverted_cdf").tolist()
    rate = size * len(times) / float(times.sum())
    return {"texts": size, "calls": len(times), "p50_ms": p50, "p95_ms": p95, "p99_ms": p99,
            "texts_per_second": rate}  # fmt: skip


def read_texts(path: str | None) -> list[str]:
    """The lines of a file that hold a text, or the sentences that come with this command.

    Raises:
        UserError: the file is not there, not UTF-8, or empty.
    """
    if path is None:
        return list(TEXTS)
    try:
        with Path(path).open("rb") as file:
            texts = [line for line in text_lines(file, f"--texts {path}") if line.strip()]
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"--texts {path} is no file: pass one with a text on each line") from None
    if not texts:
        raise UserError(f"--texts {path} is empty: pass a file with a text on each line")
    return texts


def run_latency(config: LatencyConfig) -> None:
    """Time the sizes one after another and print a table."""
    from serve.classifier import Classifier

    texts = read_texts(config.texts)
    classifier = make_classifier(config, Classifier, spin=True)
    task = config.task or next(iter(classifier.tasks), "")
    if not task:
        advice = f"python -m exporter add {config.bundle} PROMPT"
        raise UserError(f"{config.bundle} has no task: {advice}")
    held = [classifier.task(task)] * len(texts)
    lengths = [len(encoded.ids) for encoded in classifier.encoder.encode(texts, held)]

    def answer(chosen: list[str]) -> None:
        classifier.classify(chosen, task)

    rows = []
    for size in config.sizes:
        call_times(answer, texts, size, min(0.5, config.seconds))  # onnxruntime's first calls
        rows.append(summary(call_times(answer, texts, size, config.seconds), size))
    if config.json:
        document = {"task": task, "precision": config.precision, "tokens": lengths, "sizes": rows}
        sys.stdout.write(json.dumps(document, indent=2) + "\n")
        return
    sys.stdout.write(
        f"{config.bundle}, {config.precision}, task {task}: {len(texts)} texts of "
        f"{np.mean(lengths):.0f} tokens in the mean, {max(lengths)} at most\n"
        f"{'texts a call':>12}{'p50 ms':>9}{'p95 ms':>9}{'p99 ms':>9}{'texts/s':>10}\n"
    )
    for row in rows:
        sys.stdout.write(
            f"{row['texts']:12.0f}{row['p50_ms']:9.2f}{row['p95_ms']:9.2f}{row['p99_ms']:9.2f}"
            f"{row['texts_per_second']:10.0f}\n"
        )
