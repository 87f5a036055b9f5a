"""What `label` keeps of a stream: a random sample of each class's confident sentences.

Every sentence has a rank, a hash of its letters and digits under the run's seed, and the lowest
`per_class` ranks of a class are kept (bottom-k sampling, Cohen and Kaplan 2007). The sample so
depends on what is in the stream, not on its order nor on how it is cut: parts sampled on several
machines and merged are the sample of the whole. Memory depends on `per_class` and the number of
classes, not on the length of the stream.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from serve.errors import Failure
from serve.files import atomic_folder, read_json
from trainer.corpus import Sentence
from trainer.spelling import fingerprint

logger = logging.getLogger(__name__)

BINS = 20  # of the histogram of confidences: steps of 0.05
_STATE, _KEPT = "state.json", "kept.parquet"
_ALL = 2**64  # above every rank

Place = tuple[int, int]  # orders sentences as the stream does


class Entry(NamedTuple):
    """A sentence that is kept, where it first stood, and how often it came."""

    text: str
    confidence: float
    source: str
    place: Place
    times: int = 1


def rank(mark: int, seed: int) -> int:
    """64 bits in an order that `seed` chooses; one to one, so different marks never tie."""
    return _scatter(mark ^ _scatter(seed + 0x9E3779B97F4A7C15))


def _scatter(value: int) -> int:
    """The output function of splitmix64 (Steele, Lea and Flood 2014)."""
    value &= _ALL - 1
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & (_ALL - 1)
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & (_ALL - 1)
    return value ^ (value >> 31)


@dataclass
class Reservoir:
    """A stream of annotated sentences, sampled.

    Attributes:
        per_class: sentences kept of each class at most.
        threshold: the least confidence.
        seed: of the sample.
        classes: C.
        bounds: C ranks: a sentence above its class's cannot be kept any more.
        offered: [C], sentences at or above the threshold, excluded ones left out.
        histogram: [C, BINS], all sentences by predicted class and confidence.
        seen, excluded: sentences in all; kept out.
    """

    per_class: int
    threshold: float
    seed: int
    classes: int
    bounds: list[int] = field(init=False)
    offered: np.ndarray = field(init=False)
    histogram: np.ndarray = field(init=False)
    seen: int = 0
    excluded: int = 0

    def __post_init__(self) -> None:
        self._kept: list[dict[int, Entry]] = [{} for _ in range(self.classes)]
        self.bounds = [_ALL] * self.classes
        self.offered = np.zeros(self.classes, np.int64)
        self.histogram = np.zeros((self.classes, BINS), np.int64)

    @property
    def kept(self) -> list[list[Entry]]:
        """C lists of what is kept, in the order of the stream."""
        for label in range(self.classes):
            self._prune(label)
        return [sorted(kept.values(), key=lambda entry: entry.place) for kept in self._kept]

    @property
    def repeated(self) -> int:
        """Sentences left out because they equal one that is kept."""
        return sum(entry.times - 1 for kept in self.kept for entry in kept)

    @property
    def confident(self) -> np.ndarray:
        """[C], sentences at or above the threshold, without excluded ones and without repeats of
        those that are kept."""
        again = [sum(entry.times - 1 for entry in kept) for kept in self.kept]
        return self.offered - np.array(again, np.int64)

    def add(
        self,
        chunk: Sequence[Sentence],
        probabilities: np.ndarray,
        banned: set[int],
        places: Sequence[Place] | None = None,
    ) -> None:
        """Take in a chunk of N sentences.

        Args:
            chunk: the sentences.
            probabilities: [N, C].
            banned: fingerprints of what must not get in.
            places: where each stands in the stream; None counts on.
        """
        best = probabilities.argmax(axis=1)
        sure = probabilities[np.arange(len(chunk)), best]
        # A little is added, so that 0.7 is in the bin that starts at 0.7 despite rounding.
        bins = np.minimum((sure * BINS + 1e-9).astype(np.int64), BINS - 1)
        np.add.at(self.histogram, (best, bins), 1)
        for position in np.flatnonzero(sure >= self.threshold).tolist():
            sentence, label = chunk[position], int(best[position])
            mark = fingerprint(sentence.text)
            if mark in banned:
                self.excluded += 1
                continue
            self.offered[label] += 1
            place = (self.seen + position, 0) if places is None else places[position]
            entry = Entry(sentence.text, float(sure[position]), sentence.source, place)
            self._offer(label, rank(mark, self.seed), entry)
        self.seen += len(chunk)

    def _offer(self, label: int, key: int, entry: Entry) -> None:
        if key > self.bounds[label]:
            return
        kept = self._kept[label]
        if key in kept:
            first = min(kept[key], entry, key=lambda one: one.place)
            kept[key] = first._replace(times=kept[key].times + entry.times)
            return
        kept[key] = entry
        if len(kept) >= 2 * self.per_class:
            self._prune(label)

    def _prune(self, label: int) -> None:
        kept = self._kept[label]
        if len(kept) >= self.per_class:
            lowest = sorted(kept)[: self.per_class]
            self._kept[label] = {key: kept[key] for key in lowest}
            self.bounds[label] = lowest[-1]

    def above(self, threshold: float) -> np.ndarray:
        """[C], all sentences by class at or above a threshold that is a multiple of 0.05."""
        return self.histogram[:, round(threshold * BINS) :].sum(axis=1)

    def choose(self, balance: bool) -> dict[str, Any]:
        """The columns text, label, confidence and source of the result, in random order.

        With `balance` every class gives as many as the rarest one has.
        """
        generator = np.random.Generator(np.random.PCG64(self.seed))
        everything = self.kept
        fewest = min(map(len, everything))
        rows: list[tuple[Entry, int]] = []
        for label, kept in enumerate(everything):
            order = np.argsort(generator.random(len(kept)), kind="stable")
            rows += [(kept[i], label) for i in (order[:fewest] if balance else order)]
        rows = [rows[i] for i in np.argsort(generator.random(len(rows)), kind="stable")]
        return {
            "text": [entry.text for entry, _ in rows],
            "label": np.array([label for _, label in rows], np.int32),
            "confidence": np.array([entry.confidence for entry, _ in rows], np.float32),
            "source": [entry.source for entry, _ in rows],
        }

    # -- parts of a sample, from other processes or an earlier run --------------------------------

    def part(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What is kept as columns of equal length, and the counts as JSON values."""
        rows = [
            (label, key, *entry[:3], *entry.place, entry.times)
            for label, kept in enumerate(self._kept)
            for key, entry in kept.items()
        ]
        names = ("label", "rank", "text", "confidence", "source", "place", "within", "times")
        columns: dict[str, Any] = {
            name: [row[position] for row in rows] for position, name in enumerate(names)
        }
        columns["rank"] = np.array(columns["rank"], np.uint64)
        counts = {
            "histogram": self.histogram.tolist(),
            "offered": self.offered.tolist(),
            "seen": self.seen,
            "excluded": self.excluded,
        }
        return columns, counts

    def merge(self, columns: dict[str, Any], counts: dict[str, Any]) -> None:
        """Take in another reservoir's `part`; parts may come in any order, and in pieces."""
        for label, key, text, confidence, source, place, within, times in zip(
            *columns.values(), strict=True
        ):
            self._offer(label, int(key), Entry(text, confidence, source, (place, within), times))
        if not counts:
            return
        self.histogram += np.array(counts["histogram"], np.int64)
        self.offered += np.array(counts["offered"], np.int64)
        self.seen += counts["seen"]
        self.excluded += counts["excluded"]

    def save(self, folder: Path, run: dict[str, Any]) -> None:
        """Write the whole state to a folder, so that a killed run can go on; `run` is kept too."""
        import pyarrow as arrow
        import pyarrow.parquet as parquet

        columns, counts = self.part()
        with atomic_folder(folder) as temporary:
            parquet.write_table(arrow.table(columns), temporary / _KEPT)
            (temporary / _STATE).write_text(json.dumps({"run": run, **counts}), "utf-8")

    def restore(self, folder: Path, run: dict[str, Any]) -> bool:
        """Take up what `save` wrote; False when nothing is there, or (aloud) of another run.

        Raises:
            Failure: what is there is damaged.
        """
        import pyarrow as arrow
        import pyarrow.parquet as parquet

        if not (folder / _STATE).is_file():
            return False
        state = read_json(folder / _STATE)
        if state.pop("run") != run:
            logger.warning(
                "%s is of a run with other settings or data: it is not continued but replaced",
                folder,
            )
            return False
        try:
            columns = parquet.read_table(folder / _KEPT).to_pydict()
        except (arrow.ArrowInvalid, OSError) as error:
            raise Failure(f"{folder} is damaged ({error}): remove it to start again") from None
        self.merge(columns, state)
        return True
