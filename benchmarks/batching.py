"""How many texts of a length should run together: one batch, or the same texts in smaller ones.

    python -m benchmarks.batching BUNDLE --precision int8 --lengths 24 64 128 256 512

For each length, as many texts (VADER's sentences run together, fetched as in the quick start) as
fill the token budget run in batches of 1, 2, 4 ... rows. That all give the same probabilities is
proved first, in deviations of a probability over the texts; then the sizes are timed in turn, round
after round, in CPU time of one thread. In brackets stands what the attention scores of a batch
take. The bound of a batch's attention in `serve.classifier` comes from here.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from serve.classifier import MIB, Classifier
from serve.cli import guarded
from serve.files import write_json
from serve.tokenize import Encoded
from trainer import vader

TOLERANCE = {"fp32": 1e-3, "int8": 0.75}  # deviations; int8's scales are those of a batch


def in_batches(classifier: Classifier, texts: list[Encoded], rows: int) -> np.ndarray:
    """Probabilities of the first label [N], computed `rows` texts at a time."""
    found = []
    for start in range(0, len(texts), rows):
        results = classifier.run(texts[start : start + rows])
        found += [next(iter(result.probabilities.values())) for result in results]
    return np.array(found)


def sentences(classifier: Classifier, rows: int, length: int) -> list[list[int]]:
    """Token ids [rows, length] of real sentences run together: always the same."""
    tokenizer = Tokenizer.from_file(str(classifier.bundle.folder / "tokenizer.json"))
    found = tokenizer.encode_batch(vader.sentences()["film"].texts, add_special_tokens=False)
    ids = [number for text in found for number in text.ids]
    return [ids[row * length : (row + 1) * length] for row in range(rows)]


def measure(classifier: Classifier, length: int, repeats: int) -> dict[str, Any]:
    """Milliseconds of all texts, by rows of a batch: the fastest of the rounds.

    Raises:
        SystemExit: a text's answer depends on what it runs with.
    """
    task = next(iter(classifier.tasks.values()))
    count = max(1, min(classifier.limits.rows, classifier.limits.tokens // length))
    texts = [Encoded(row, False, task) for row in sentences(classifier, count, length)]
    sizes = [2**n for n in range(count.bit_length()) if 2**n <= count]
    alone = in_batches(classifier, texts, 1)
    difference = max(float(abs(in_batches(classifier, texts, n) - alone).max()) for n in sizes)
    difference /= max(float(alone.std()), 1e-9)
    if count > 1 and not difference <= TOLERANCE[classifier.precision]:
        raise SystemExit(f"{length} tokens: a probability is off by {difference:.1e} deviations")
    times: dict[int, list[float]] = {n: [] for n in sizes}
    for _ in range(repeats):
        for rows in sizes:
            start = time.process_time()
            in_batches(classifier, texts, rows)
            times[rows].append(time.process_time() - start)
    heads = classifier.bundle.size("num_heads")
    return {
        "length": length,
        "texts": count,
        "difference": difference,
        "rows": {
            rows: {
                "ms": round(1000 * min(values), 1),
                "scores_mib": round(4 * heads * classifier.limits.cells(rows, length) / MIB, 2),
            }
            for rows, values in times.items()
        },
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle")
    parser.add_argument("--precision", default="fp32", choices=sorted(TOLERANCE))
    parser.add_argument("--lengths", type=int, nargs="+", default=[24, 64, 128, 256, 512])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", default="", help="JSON file for the figures")
    given = parser.parse_args()
    classifier = Classifier(given.bundle, given.precision, threads=1)
    classifier.warm()
    found = []
    for length in given.lengths:
        if length > classifier.encoder.max_tokens:
            continue
        found.append(measure(classifier, length, given.repeats))
        cells = [
            f"{rows}: {cell['ms']:.0f} ms ({cell['scores_mib']} MiB)"
            for rows, cell in found[-1]["rows"].items()
        ]
        sys.stdout.write(f"{found[-1]['texts']} x {length} | {' | '.join(cells)}\n")
        sys.stdout.flush()
    if given.out:
        write_json(given.out, json.loads(json.dumps(found)))


if __name__ == "__main__":
    sys.exit(guarded(main))
