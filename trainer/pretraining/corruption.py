"""Span corruption, T5's objective (Raffel et al. 2020, section 3.1.4)."""

import numpy as np

FIRST_SENTINEL = 3  # id of <extra_id_0>; the others follow
EOS = 1


def span_starts(length: int, rate: float, mean: float, rng: np.random.Generator) -> np.ndarray:
    """Which of `length` tokens are noise, [length] bool.

    round(length * rate) tokens (at least one, never all) in round(noise / mean) spans (at least
    one), lengths drawn uniformly among all ways to cut; the text begins with a kept token.
    """
    noise = min(max(round(length * rate), 1), length - 1)
    spans = min(max(round(noise / mean), 1), noise, length - noise)
    noise_lengths = _cut(noise, spans, rng)
    kept_lengths = _cut(length - noise, spans, rng)
    flags = np.zeros(length, bool)
    place = 0
    for kept, masked in zip(kept_lengths, noise_lengths, strict=True):
        flags[place + kept : place + kept + masked] = True
        place += kept + masked
    return flags


def _cut(total: int, parts: int, rng: np.random.Generator) -> list[int]:
    borders = np.sort(rng.permutation(total - 1)[: parts - 1]) + 1
    return np.diff(np.concatenate([[0], borders, [total]])).astype(int).tolist()


def corrupt(tokens: np.ndarray, rate: float, mean: float, rng: np.random.Generator
            ) -> tuple[list[int], list[int]]:  # fmt: skip
    """(input, target): each noise span becomes one sentinel in the input, and the target lists
    sentinel and span in turn; both end in </s>. tokens: [S], S >= 2."""
    flags = span_starts(len(tokens), rate, mean, rng)
    source: list[int] = []
    target: list[int] = []
    sentinel = FIRST_SENTINEL - 1
    previous = False
    for token, noise in zip(tokens.tolist(), flags.tolist(), strict=True):
        if noise and not previous:
            sentinel += 1
            source.append(sentinel)
            target.append(sentinel)
        (target if noise else source).append(token)
        previous = noise
    return [*source, EOS], [*target, EOS]
