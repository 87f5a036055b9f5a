"""Options of MetaPT beyond the paper; with the defaults none of them changes anything.

- inner rates that are learned, one for each prompt token (Meta-SGD, Li et al. 2017);
- an inner rate that is found by search: a prompt's numbers and its gradients have the size that the
  backbone's embeddings give them, so that one backbone's rate does nothing on another;
- whole clusters held out, so that the run stops when it no longer helps on unseen ones.

Annealing of the second order and drawing some of the clusters a step are a line each in
`trainer.source` and `trainer.meta`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from serve.errors import UserError
from trainer.meta import ScoreFn, adapt, task_losses
from trainer.modes import Params, add_group
from trainer.readout import Batch

SEARCHED_RATES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)

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


def query_losses(
    score: ScoreFn,
    params: Params,
    episodes: Sequence[tuple[Batch, Batch, int]],
    rates: Sequence[float] = SEARCHED_RATES,
) -> dict[float, float]:
    """Query loss (mean per row) after one inner step (equation 1), for each inner rate.

    Args:
        params: without a task axis.
        episodes: support rows, query rows and the number of tasks of each.
    """
    sums, count = dict.fromkeys(rates, 0.0), 0
    for support, query, tasks in episodes:
        copies = add_group(params, tasks)
        moved, _ = adapt(score, copies, support, inner_rate=1.0, second_order=False)
        assert query.labels is not None
        count += tasks
        with torch.no_grad():
            for rate in rates:
                at = {name: value.lerp(moved[name], rate) for name, value in copies.items()}
                losses = task_losses(score(at, query), query.labels, tasks)
                sums[rate] += float(losses.sum())
    return {rate: total / count for rate, total in sums.items()}


def step_size(params: Params, adapted: Params) -> float:
    """How far the inner steps move a prompt, as a share of its own size: mean over the tasks.

    Args:
        params: without a task axis; adapted: with one.
    """
    with torch.no_grad():
        moved = sum(
            (adapted[name] - value).square().flatten(1).sum(1) for name, value in params.items()
        )
        own = sum(value.square().sum() for value in params.values())
        assert isinstance(moved, torch.Tensor) and isinstance(own, torch.Tensor)
        return float((moved.sqrt() / own.sqrt()).mean())
