"""What `label` keeps of a stream: a random sample of each class's confident sentences.

Memory depends on `per_class` and the number of classes, not on the length of the stream.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from serve.errors import Failure
from serve.files import atomic_folder, read_json
from trainer.corpus import Sentence
from trainer.data import normalise

BINS = 20  # of the histogram of confidences: steps of 0.05
_STATE, _KEPT = "state.json", "kept.parquet"

Entry = tuple[str, float, str]  # text, confidence, source


def fingerprint(text: str) -> int:
    """64 bits of the letters and digits of a text: equal for two spellings of one sentence."""
    digest = hashlib.blake2b((normalise(text) or text).encode("utf-8", "replace"), digest_size=8)
    return int.from_bytes(digest.digest(), "big")


@dataclass
class Reservoir:
    """A stream of annotated sentences, sampled.

    Attributes:
        per_class: sentences kept of each class at most.
        threshold: the least confidence.
        seed: of the sample.
        classes: C.
        kept: C lists of (text, confidence, source).
        histogram: [C, BINS], all sentences by predicted class and confidence.
        confident: [C], sentences at or above the threshold; excluded and repeated ones left out.
        seen, excluded, repeated: sentences in all; kept out; equal to one that is kept already.
    """

    per_class: int
    threshold: float
    seed: int
    classes: int
    kept: list[list[Entry]] = field(init=False)
    histogram: np.ndarray = field(init=False)
    confident: np.ndarray = field(init=False)
    seen: int = 0
    excluded: int = 0
    repeated: int = 0

    def __post_init__(self) -> None:
        self.kept = [[] for _ in range(self.classes)]
        self.histogram = np.zeros((self.classes, BINS), np.int64)
        self.confident = np.zeros(self.classes, np.int64)
        self._present: list[set[int]] = [set() for _ in range(self.classes)]
        self._generator = np.random.Generator(np.random.PCG64(self.seed))

    def add(self, chunk: Sequence[Sentence], probabilities: np.ndarray, banned: set[int]) -> None:
        """Take in a chunk of N sentences with probabilities [N, C]; `banned` holds fingerprints."""
        best = probabilities.argmax(axis=1)
        sure = probabilities[np.arange(len(chunk)), best]
        # A little is added, so that 0.7 is in the bin that starts at 0.7 despite rounding.
        bins = np.minimum((sure * BINS + 1e-9).astype(np.int64), BINS - 1)
        np.add.at(self.histogram, (best, bins), 1)
        self.seen += len(chunk)
        for position in np.flatnonzero(sure >= self.threshold).tolist():
            sentence = chunk[position]
            key = fingerprint(sentence.text)
            if key in banned:
                self.excluded += 1
            else:
                self._offer(sentence, int(best[position]), float(sure[position]), key)

    def _offer(self, sentence: Sentence, label: int, sure: float, key: int) -> None:
        # Algorithm R (Vitter 1985): after n sentences of a class, each of them is kept with
        # probability per_class / n.
        kept, present = self.kept[label], self._present[label]
        if key in present:
            self.repeated += 1
            return
        self.confident[label] += 1
        entry = (sentence.text, sure, sentence.source)
        if len(kept) < self.per_class:
            kept.append(entry)
            present.add(key)
            return
        place = int(self._generator.random() * self.confident[label])
        if place < self.per_class:
            present.discard(fingerprint(kept[place][0]))
            kept[place] = entry
            present.add(key)

    def above(self, threshold: float) -> np.ndarray:
        """[C], all sentences by class at or above a threshold that is a multiple of 0.05."""
        return self.histogram[:, round(threshold * BINS) :].sum(axis=1)

    def choose(self, balance: bool) -> dict[str, Any]:
        """The columns text, label, confidence and source of the result, in random order.

        With `balance` every class gives as many as the rarest one has.
        """
        generator = np.random.Generator(np.random.PCG64(self.seed))
        fewest = min(len(kept) for kept in self.kept)
        rows: list[tuple[Entry, int]] = []
        for label, kept in enumerate(self.kept):
            order = np.argsort(generator.random(len(kept)), kind="stable")
            rows += [(kept[i], label) for i in (order[:fewest] if balance else order)]
        rows = [rows[i] for i in np.argsort(generator.random(len(rows)), kind="stable")]
        return {
            "text": [entry[0] for entry, _ in rows],
            "label": np.array([label for _, label in rows], np.int32),
            "confidence": np.array([entry[1] for entry, _ in rows], np.float32),
            "source": [entry[2] for entry, _ in rows],
        }

    def save(self, folder: Path, run: dict[str, Any]) -> None:
        """Write the whole state to a folder, so that a killed run can go on; `run` is kept too."""
        import pyarrow as arrow
        import pyarrow.parquet as parquet

        columns = {
            "label": [label for label, kept in enumerate(self.kept) for _ in kept],
            "text": [entry[0] for kept in self.kept for entry in kept],
            "confidence": [entry[1] for kept in self.kept for entry in kept],
            "source": [entry[2] for kept in self.kept for entry in kept],
        }
        state = {
            "run": run,
            "generator": self._generator.bit_generator.state,
            "histogram": self.histogram.tolist(),
            "confident": self.confident.tolist(),
            "seen": self.seen,
            "excluded": self.excluded,
            "repeated": self.repeated,
        }
        with atomic_folder(folder) as temporary:
            parquet.write_table(arrow.table(columns), temporary / _KEPT)
            (temporary / _STATE).write_text(json.dumps(state), "utf-8")

    def restore(self, folder: Path, run: dict[str, Any]) -> bool:
        """Take up what `save` wrote; False when nothing is there or it is of another run.

        Raises:
            Failure: what is there is damaged.
        """
        import pyarrow as arrow
        import pyarrow.parquet as parquet

        if not (folder / _STATE).is_file():
            return False
        state = read_json(folder / _STATE)
        if state["run"] != run:
            return False
        try:
            table = parquet.read_table(folder / _KEPT).to_pydict()
        except (arrow.ArrowInvalid, OSError) as error:
            raise Failure(f"{folder} is damaged ({error}): remove it to start again") from None
        columns = (table[name] for name in ("label", "text", "confidence", "source"))
        for label, text, confidence, source in zip(*columns, strict=True):
            self.kept[label].append((text, confidence, source))
            self._present[label].add(fingerprint(text))
        self._generator.bit_generator.state = state["generator"]
        self.histogram = np.array(state["histogram"], np.int64)
        self.confident = np.array(state["confident"], np.int64)
        self.seen, self.excluded = state["seen"], state["excluded"]
        self.repeated = state["repeated"]
        return True
