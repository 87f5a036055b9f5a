"""Span corruption against a plain oracle that puts the pieces back together."""

import numpy as np
import pytest

from trainer.pretraining.corruption import EOS, FIRST_SENTINEL, corrupt, span_starts


def restore(source: list[int], target: list[int]) -> list[int]:
    """The obvious inverse: read the target into a table, then fill the sentinels in."""
    spans: dict[int, list[int]] = {}
    current = None
    for token in target[:-1]:
        if FIRST_SENTINEL <= token < FIRST_SENTINEL + 100:
            current = token
            spans[current] = []
        else:
            assert current is not None
            spans[current].append(token)
    result: list[int] = []
    for token in source[:-1]:
        result += spans.pop(token) if token in spans else [token]
    assert not spans
    return result


@pytest.mark.parametrize("length", [2, 3, 7, 20, 48])
def test_corruption_loses_nothing(length: int) -> None:
    rng = np.random.default_rng(length)
    tokens = rng.integers(200, 900, length)
    for _ in range(50):
        source, target = corrupt(tokens, 0.15, 3.0, rng)
        assert source[-1] == EOS and target[-1] == EOS
        assert restore(source, target) == tokens.tolist()
        sentinels = [t for t in target if FIRST_SENTINEL <= t < FIRST_SENTINEL + 100]
        assert sentinels == list(range(FIRST_SENTINEL, FIRST_SENTINEL + len(sentinels)))


@pytest.mark.parametrize(
    ("length", "rate", "mean", "noise", "spans"),
    [(40, 0.15, 3.0, 6, 2), (20, 0.15, 3.0, 3, 1), (100, 0.5, 5.0, 50, 10), (2, 0.15, 3.0, 1, 1)],
)
def test_amount_of_noise(length: int, rate: float, mean: float, noise: int, spans: int) -> None:
    rng = np.random.default_rng(0)
    for _ in range(30):
        flags = span_starts(length, rate, mean, rng)
        assert flags.sum() == noise
        assert not flags[0]
        starts = flags[1:] & ~flags[:-1]
        assert starts.sum() == spans


def test_every_cut_is_reached() -> None:
    rng = np.random.default_rng(1)
    # 4 noise tokens of 8 in 2 spans, a kept token first: 3 x 3 ways.
    seen = {tuple(span_starts(8, 0.5, 2.0, rng).tolist()) for _ in range(400)}
    assert len(seen) == 9
