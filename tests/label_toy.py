"""Toy data for the tests of `label`: reviews that are good or bad by their words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

POOR = ["awful", "terrible", "boring", "dreadful", "nasty", "ugly"]
FINE = ["lovely", "great", "superb", "charming", "tasty", "fresh"]
THINGS = ["soup", "room", "film", "song", "phone", "book", "staff", "view"]


def reviews(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Texts of two sentences each, good or bad by the words in them."""
    generator = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        mood, words = ("bad", POOR) if i % 2 else ("good", FINE)
        parts = [
            f"The {THINGS[generator.integers(8)]} was {words[generator.integers(6)]} number {i}."
            for _ in range(2)
        ]
        rows.append((" ".join(parts), mood))
    return rows


def csv(path: Path, rows: Sequence[tuple[str, str]]) -> Path:
    path.write_text("text,label\n" + "".join(f'"{t}",{c}\n' for t, c in rows), "utf-8")
    return path


def write_material(tmp_path: Path) -> dict[str, Any]:
    """A labelled file, a corpus and the flags that use them."""
    csv(tmp_path / "reviews.csv", reviews(300))
    lines = [text for text, _ in reviews(400, seed=9)]
    lines += ["The lovely staff was great and superb and it must not get in."]
    (tmp_path / "corpus.txt").write_text("\n".join(lines) + "\n", "utf-8")
    return {
        "corpus": [str(tmp_path / "corpus.txt")],
        "data": str(tmp_path / "reviews.csv"),
        "out": str(tmp_path / "out" / "sure.parquet"),
        "per_class": 50,
        "chunk": 64,
    }
