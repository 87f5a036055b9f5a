"""Texts of about one length, and rows of ids as one tensor."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


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
    length = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = True
    return ids, mask
