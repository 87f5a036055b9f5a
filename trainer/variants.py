"""Options of MetaPT beyond the paper; with the defaults none of them changes anything.

- inner rates that are learned, one for each prompt token (Meta-SGD, Li et al. 2017);
- whole clusters held out, so that the run stops when it no longer helps on unseen ones.

Annealing of the second order and drawing some of the clusters a step are a line each in
`trainer.source` and `trainer.meta`.
"""

from __future__ import annotations

import numpy as np
import torch

from serve.errors import UserError
from trainer.modes import Params

_NAME = "log_rate/"  # before the parameter's name, among the trained tensors


def hold_out_clusters(clusters: np.ndarray, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers of training and validation; `count` whole clusters, drawn by seed, are held out.

    Args:
        clusters: int [N], the cluster of each row.

    Raises:
        UserError: fewer than two clusters would be left.
    """
    names = np.unique(clusters)
    if count > len(names) - 2:
        raise UserError(
            f"--held-clusters {count} of {len(names)} leaves fewer than two to train on: lower it"
        )
    chosen = np.random.default_rng(seed).choice(names, count, replace=False)
    held = np.isin(clusters, chosen)
    return np.flatnonzero(~held), np.flatnonzero(held)


class InnerRates:
    """Alpha of equation 1: a number, or a tensor for each parameter that the outer step trains.

    A learned rate is e to the power of a trained tensor, times alpha: it stays positive, and
    AdamW's step is a share of it, whatever its size.

    Args:
        params: without a task axis; `prompt_embeddings` or `states` [P, D], `kv` [L, 2, H, P, K].
        alpha: where the rates start.
        learned: whether they are trained, one for each prompt token.

    Attributes:
        trained: the logarithms by name, [..., P, 1], zero at first; empty where none are learned.
    """

    def __init__(self, params: Params, alpha: float, *, learned: bool):
        self.alpha = alpha
        self.trained: Params = {}
        for name, value in params.items() if learned else ():
            shape = [1] * (value.dim() - 2) + [value.shape[-2], 1]
            zeros = torch.zeros(shape, dtype=value.dtype, device=value.device)
            self.trained[_NAME + name] = zeros.requires_grad_()

    def now(self) -> float | Params:
        """The rates as `trainer.meta.adapt` takes them."""
        if not self.trained:
            return self.alpha
        return {
            name.removeprefix(_NAME): self.alpha * value.exp()
            for name, value in self.trained.items()
        }
