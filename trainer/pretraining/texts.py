"""Cutting documents into sentences, and keeping held-out sentences out."""

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from trainer.spelling import normalise

_BOUNDARY = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[]*[A-Z0-9])")
_TOKENISED = re.compile(r"(?<=\s[.!?])(?:\s[\"')\]])*\s+(?![.!?])")  # "it ends . the next"
_SHORT = 12  # normalised characters below which equality says nothing ("Great!")


def sentences(document: str) -> list[str]:
    """The sentences of a document, in order; line feeds end a sentence.

    Where nothing is in capitals, a full stop that stands alone ends one too.
    """
    boundary = _TOKENISED if document.islower() else _BOUNDARY
    found: list[str] = []
    for line in document.split("\n"):
        found += [s.strip() for s in boundary.split(line)]
    return [s for s in found if s]


class HeldOut:
    """The texts of every held-out set and their sentences, whatever their case and marks."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.keys: set[str] = set()
        for text in texts:
            self.keys.add(normalise(text))
            self.keys.update(normalise(s) for s in sentences(text))
        self.keys = {key for key in self.keys if len(key) >= _SHORT}

    @classmethod
    def read(cls, files: Iterable[Path]) -> "HeldOut":
        """From Parquet files with a `text` column."""

        def rows() -> Iterable[str]:
            for file in files:
                yield from pq.read_table(file, columns=["text"]).column("text").to_pylist()

        return cls(rows())

    def __contains__(self, text: str) -> bool:
        """Whether a text, or one of its sentences, is held out."""
        return any(normalise(part) in self.keys for part in (text, *sentences(text)))


def pick(document: str, rng: np.random.Generator, middle: int, low: int = 3, high: int = 45
         ) -> list[tuple[str, bool]]:  # fmt: skip
    """First, last and up to `middle` other sentences of a review, as (sentence, at an edge).

    Opinions are summed up at the edges of a review, so the review's label is cleaner there.
    Only pieces of low to high words; one time in four the next sentence is joined to it, with a
    line feed, so that `sentences` gives back what was joined.
    """
    found = sentences(document)
    if not found:
        return []
    edges = {0, len(found) - 1, max(len(found) - 2, 0)}
    others = [i for i in range(len(found)) if i not in edges]
    chosen = sorted(edges | set(rng.permutation(others)[:middle].tolist()))
    result = []
    for i in chosen:
        text = found[i]
        if i + 1 < len(found) and rng.random() < 0.25:
            text = f"{text}\n{found[i + 1]}"
        if low <= len(text.split()) <= high:
            result.append((text, i in edges))
    return result
