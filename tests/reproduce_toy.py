"""Toy data for the tests of `reproduce`: texts whose label one word tells."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

SAYS = {0: ["bad", "awful", "terrible"], 1: ["good", "great"]}
FIVE = ["terrible", "bad", "okay", "good", "great"]
FILLER = "the a film food was it is very and service story acting plot room this that".split()


def sentence(word: str, generator: np.random.Generator) -> str:
    """Filler words with the telling word somewhere among them."""
    words = list(generator.choice(FILLER, 4))
    words.insert(int(generator.integers(0, 5)), word)
    return " ".join(words)


def write_task(folder: Path, rows: int = 120, name: str = "sst2") -> Path:
    """A two-class task file with marked splits; two thirds are for training."""
    generator = np.random.default_rng(0)
    with (folder / f"{name}.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", "split"])
        for index in range(rows):
            label = index % 2
            word = str(generator.choice(SAYS[label]))
            split = "test" if index % 3 == 0 else "train"
            writer.writerow([sentence(word, generator), label, split])
    return folder


def write_source(path: Path, rows: int = 400) -> Path:
    """A five-class source in two clusters."""
    generator = np.random.default_rng(1)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", "cluster"])
        for index in range(rows):
            label = index % 5
            writer.writerow([sentence(FIVE[label], generator), label, (index // 5) % 2])
    return path
