"""Labelled sets whose question is no opinion, made of files that are there for other reasons.

- `news`: the five sections of BBC items, of which the headline and what follows, 30 words in all;
- `aspects`: whether a sentence of a restaurant review (SemEval 2016) is about the food, the service
  or the ambience; sentences with one aspect only;
- `kinds`: whether a sentence (UCI) is from a restaurant, a film or a product review.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from trainer.data import Examples
from trainer.pretraining.rows import read_rows
from trainer.tasks import Task, make_task

TEMPLATE = "{text} It was about <extra_id_0>."
Rows = list[tuple[str, str]]  # (text, label)


def news(folder: Path) -> Rows:
    """See above."""
    rows = read_rows(folder / "text" / "bbc_news.parquet")
    return [(" ".join(row["text"].replace("\n", ". ", 1).split()[:30]), row["source"][4:])
            for row in rows]  # fmt: skip


def aspects(folder: Path) -> Rows:
    """See above."""
    found: dict[str, set[str]] = {}
    for row in read_rows(folder / "semeval16_restaurants.parquet"):
        found.setdefault(row["text"], set()).add(str(row["aspect"]).split("#")[0].lower())
    return [(text, *names) for text, names in found.items() if len(names) == 1]  # type: ignore[misc]


def kinds(folder: Path) -> Rows:
    """See above."""
    rows = read_rows(folder / "uci_labelled_sentences.parquet")
    return [(row["text"], row["domain"]) for row in rows]


# name -> (rows, labels, label words)
SETS: dict[str, tuple[Callable[[Path], Rows], tuple[str, ...], tuple[str, ...]]] = {
    "news": (news, ("sport", "business", "politics", "tech", "entertainment"),
             ("sport", "business", "politics", "technology", "entertainment")),
    "aspects": (aspects, ("food", "service", "ambience"), ("food", "service", "location")),
    "kinds": (kinds, ("restaurant", "movie", "phone_accessories"),
              ("restaurant", "film", "phone")),
}  # fmt: skip


def load(name: str, folder: Path) -> tuple[Task, Examples, Examples]:
    """(task, training pool, test rows): a text is for testing if its hash says so, one in three."""
    read, labels, words = SETS[name]
    task = make_task(name, labels, words, template=TEMPLATE)
    rows = {text: labels.index(label) for text, label in read(folder) if label in labels}
    held = np.array([zlib.crc32(text.encode()) % 3 == 0 for text in rows], bool)
    whole = Examples(list(rows), np.array(list(rows.values())), labels)
    return task, whole.take(np.flatnonzero(~held)), whole.take(np.flatnonzero(held))
