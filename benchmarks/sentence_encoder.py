"""The sentence encoder that `cluster` embeds with, in torch and compiled to ONNX.

    python -m benchmarks.sentence_encoder

Real sentences (VADER's, fetched as in the quick start). That both give the same vectors is proved
first; then they are timed in turn, round after round, in CPU time of one thread. The size of the
compiled encoder's batches comes from here.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from serve.cli import guarded
from serve.files import write_json
from trainer import onnx_encoder
from trainer.embed import encoder_source, load_encoder
from trainer.vader import sentences

TOLERANCE = 1e-5  # of a unit vector's numbers


def seconds(call: Callable[[], Any]) -> float:
    """CPU time of a call."""
    start = time.process_time()
    call()
    return time.process_time() - start


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--encoder", help="folder or hub id (default: all-MiniLM-L6-v2)")
    parser.add_argument("--texts", type=int, default=1000)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 512, 1024, 2048],
                        help="of a batch of the compiled encoder")  # fmt: skip
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", default="", help="JSON file for the figures")
    given = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    source = encoder_source(given.encoder)
    texts = [text for part in sentences().values() for text in part.texts][: given.texts]
    model = load_encoder(source)
    compiled = onnx_encoder.compile_encoder(source)
    compiled.threads = 1

    def in_torch() -> np.ndarray:
        return model.encode(texts, batch_size=64, normalize_embeddings=True,
                            show_progress_bar=False)  # fmt: skip

    def in_onnx(tokens: int) -> np.ndarray:
        onnx_encoder.BATCH_TOKENS = tokens
        return compiled.encode(texts)

    expected = in_torch()
    for tokens in given.tokens:
        difference = float(np.abs(in_onnx(tokens) - expected).max())
        if not difference < TOLERANCE:
            raise SystemExit(f"batches of {tokens} tokens differ from torch by {difference:.1e}")
    sides: dict[str, Callable[[], Any]] = {"torch": in_torch}
    sides |= {f"onnx, {n} tokens": lambda n=n: in_onnx(n) for n in given.tokens}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(given.repeats):
        for name, call in sides.items():
            times[name].append(seconds(call))
    figures = {
        name: {
            "ms_a_text": round(1000 * min(values) / len(texts), 3),
            "times_torch": round(
                statistics.median(
                    torch_s / own for torch_s, own in zip(times["torch"], values, strict=True)
                ),
                2,
            ),
        }
        for name, values in times.items()
    }
    for name, figure in figures.items():
        sys.stdout.write(
            f"{name:20} {figure['ms_a_text']:.2f} ms a text, {figure['times_torch']:.2f} times\n"
        )
    if given.out:
        write_json(given.out, {"texts": len(texts), "encoder": given.encoder, **figures})


if __name__ == "__main__":
    sys.exit(guarded(main))
