"""Texts of about one length, and rows of ids as one tensor."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from trainer.readout import collate


def of_length(lengths: np.ndarray, band: int, rng: np.random.Generator) -> int:
    """The place of a text of about `band` tokens, +- 25 %, or of the nearest there are.

    lengths: [N], ascending, N >= 2.
    """
    low, high = np.searchsorted(lengths, [round(band * 0.75), round(band * 1.25) + 1])
    if high - low < 2:  # nothing of this length
        low, high = max(0, min(low, len(lengths) - 2)), min(len(lengths), max(high, low + 2))
    return int(rng.integers(low, high))


def pad(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Ids [B, S] padded with 0, and a bool mask [B, S]."""
    batch = collate(rows)
    return batch.ids, batch.mask
