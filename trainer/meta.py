"""MetaPT (Huang, Qian, Yu): MAML over clusters of texts finds where a soft prompt should start.

For each cluster, a task, `samples` support and `samples` query texts are drawn. The inner step is
plain gradient descent on the support loss of a task (equation 1),

    P_t = P - alpha * grad_P L_t^support(P),

and the outer step is AdamW on the sum of the tasks' query losses after it (equation 2),

    P <- P - beta * grad_P sum_t L_t^query(P_t).

A prompt is an input, not a weight: P is expanded to one copy a task, all tasks' support rows run in
one forward, the gradient with respect to the copies is taken, and so on for the query rows. That is
the exact second-order gradient in two forwards, without a loop over tasks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.modes import Params, add_group
from trainer.readout import Batch

# (params with a leading task axis [T, ...], batch of T x M rows) -> class scores [T*M, C]
ScoreFn = Callable[[Params, Batch], Tensor]


@dataclass(frozen=True)
class Stages:
    """A score in two stages, where what a prompt contributes does not depend on the text.

    Attributes:
        constants: parameters with a leading group axis -> what they contribute, likewise.
        score: class scores under those contributions.
    """

    constants: Callable[[Params], Params]
    score: ScoreFn


@dataclass
class Outcome:
    """What an outer step measured: query loss (mean per row) and accuracy, before and after."""

    loss: float
    accuracy: float
    support_loss: float

    @classmethod
    def of(cls, figures: Tensor) -> Outcome:
        """The figures [3] of `outer_losses` as numbers; waits for the device, once."""
        return cls(*figures.tolist())


def task_losses(scores: Tensor, labels: Tensor, tasks: int) -> Tensor:
    """Cross-entropy, mean over the rows of each task: [T*M, C], [T*M] -> [T]."""
    losses = torch.nn.functional.cross_entropy(scores, labels, reduction="none")
    return losses.view(tasks, -1).mean(1)


def adapt(
    score: ScoreFn,
    copies: Params,
    support: Batch,
    *,
    inner_rate: float | Params,
    inner_steps: int = 1,
    second_order: bool = True,
) -> tuple[Params, Tensor]:
    """Equation 1, for all tasks at once.

    Args:
        score: class scores of a batch under grouped parameters.
        copies: the parameters with a leading task axis [T, ...].
        support: T x M rows, ordered by task.
        inner_rate: alpha; or one tensor a parameter that broadcasts to it (Meta-SGD, Li et al.
            2017), which the outer step may train.
        inner_steps: how often equation 1 is applied.
        second_order: keep the graph of the inner gradients, so that the outer gradient is exact.

    Returns:
        The adapted copies and the support losses [T] of the first step.
    """
    assert support.labels is not None
    tasks = next(iter(copies.values())).shape[0]
    first: Tensor | None = None
    for _ in range(inner_steps):
        losses = task_losses(score(copies, support), support.labels, tasks)
        first = losses.detach() if first is None else first
        # A task's loss depends on its own copy only, so the gradient of the sum is every task's.
        gradients = torch.autograd.grad(
            losses.sum(), list(copies.values()), create_graph=second_order
        )
        copies = {
            name: value - (inner_rate if isinstance(inner_rate, float) else inner_rate[name]) * grad
            for (name, value), grad in zip(copies.items(), gradients, strict=True)
        }
    assert first is not None
    return copies, first


def adapt_together(
    stages: Stages,
    params: Params,
    support: Batch,
    tasks: int,
    *,
    inner_rate: float | Params,
    second_order: bool = True,
) -> tuple[Params, Tensor]:
    """The first step of equation 1, with the prompt encoded once instead of once a task.

    Before the first step all copies are equal, so their contributions are; only the gradients
    differ. The contributions are copied instead of the prompt, and the gradients with respect to
    them go back through the one encoding side by side.

    Args:
        params: without a task axis, as for `outer_gradient`; the rest as for `adapt`.
    """
    assert support.labels is not None
    once = stages.constants(add_group(params))
    copies = {name: value.expand(tasks, *value.shape[1:]) for name, value in once.items()}
    losses = task_losses(stages.score(copies, support), support.labels, tasks)
    reached = torch.autograd.grad(
        losses.sum(), list(copies.values()), create_graph=second_order
    )  # [T, ...]
    gradients = torch.autograd.grad(
        list(once.values()), list(params.values()), [value[:, None] for value in reached],
        is_grads_batched=True, create_graph=second_order,
    )  # fmt: skip
    adapted = {
        name: value - (inner_rate if isinstance(inner_rate, float) else inner_rate[name]) * grad
        for (name, value), grad in zip(params.items(), gradients, strict=True)
    }
    return adapted, losses.detach()


def outer_losses(
    score: ScoreFn,
    params: Params,
    support: Batch,
    query: Batch,
    tasks: int,
    *,
    inner_rate: float | Params,
    inner_steps: int = 1,
    second_order: bool = True,
    stages: Stages | None = None,
) -> tuple[Tensor, Tensor]:
    """Equation 2 before it is differentiated; nothing in it waits for the device.

    Args:
        params: leaf tensors without a task axis.
        support, query: T x M rows each, ordered by task.
        tasks: T.
        inner_rate: as for `adapt`; tensors that require gradients get theirs as well.
        stages: `score` in two stages, if it has them: the same gradient with less work.

    Returns:
        The summed query losses [], to be differentiated, and figures [3]: query loss, accuracy and
        support loss, means per row.
    """
    assert query.labels is not None
    if stages is None:
        adapted, support_losses = adapt(
            score, add_group(params, tasks), support,
            inner_rate=inner_rate, inner_steps=inner_steps, second_order=second_order,
        )  # fmt: skip
    else:
        adapted, support_losses = adapt_together(
            stages, params, support, tasks, inner_rate=inner_rate, second_order=second_order
        )
        if inner_steps > 1:
            adapted, _ = adapt(
                score, adapted, support,
                inner_rate=inner_rate, inner_steps=inner_steps - 1, second_order=second_order,
            )  # fmt: skip
    scores = score(adapted, query)
    losses = task_losses(scores, query.labels, tasks)
    accuracy = (scores.argmax(-1) == query.labels).float().mean()
    figures = (losses.detach().mean(), accuracy, support_losses.mean())
    return losses.sum(), torch.stack([figure.to(losses.dtype) for figure in figures])


def outer_gradient(
    score: ScoreFn,
    params: Params,
    support: Batch,
    query: Batch,
    tasks: int,
    **options: Any,
) -> Outcome:
    """Equation 2: add the gradient of the summed query losses to `.grad` of the parameters.

    Args:
        options: and the rest, as for `outer_losses`.
    """
    total, figures = outer_losses(score, params, support, query, tasks, **options)
    total.backward()
    return Outcome.of(figures)


class TaskSampler:
    """Draws support and query rows of each cluster.

    Args:
        clusters: int [N], the cluster of each row; labels: int [N].
        samples: M, rows of support and as many of query for each task.
        balanced: draw the classes of a task's support and query evenly instead of at random.
        each_step: clusters that a step draws from, by chance; 0 draws from all.
    """

    def __init__(
        self,
        clusters: np.ndarray,
        labels: np.ndarray,
        samples: int,
        *,
        balanced: bool = False,
        each_step: int = 0,
    ):
        self.names = np.unique(clusters)
        self.members = [np.flatnonzero(clusters == name) for name in self.names]
        self.labels, self.samples, self.balanced = labels, samples, balanced
        self.each_step = min(each_step, len(self.members)) or len(self.members)
        self.small = [
            int(name)
            for name, rows in zip(self.names, self.members, strict=True)
            if len(rows) < 2 * samples
        ]

    @property
    def tasks(self) -> int:
        """T, the number of clusters that a step draws from."""
        return self.each_step

    def draw(self, seed: int, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Row numbers of support and query, [T*M] each, a function of (seed, step) alone."""
        generator = np.random.default_rng([seed, step])
        support, query = [], []
        members = self.members
        if self.each_step < len(members):
            chosen_tasks = generator.choice(len(members), self.each_step, replace=False)
            members = [members[task] for task in chosen_tasks]
        for rows in members:
            if self.balanced:
                chosen = self._balanced(rows, generator)
            else:
                chosen = generator.choice(rows, 2 * self.samples, replace=False)
            support.append(chosen[: self.samples])
            query.append(chosen[self.samples :])
        return np.concatenate(support), np.concatenate(query)

    def _balanced(self, rows: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """M rows of support and M of query, in each of which the classes take turns; a class that
        runs out is skipped."""
        order = generator.permutation(rows)
        turn, side = np.zeros((2, len(order)), dtype=np.int64)
        for label in np.unique(self.labels[order]):
            where = np.flatnonzero(self.labels[order] == label)
            # A class's rows go to support and query alternately, to which first by chance.
            turn[where] = np.arange(len(where)) // 2
            side[where] = (np.arange(len(where)) + generator.integers(2)) % 2
        # By turn first; among the rows of one turn at random, so no class leads every draw.
        queue = np.lexsort((generator.random(len(order)), turn))
        halves = [queue[side[queue] == number] for number in (0, 1)]
        short = 1 if len(halves[1]) < self.samples else 0
        missing = max(0, self.samples - len(halves[short]))
        spare = halves[1 - short][self.samples :][:missing]
        halves[short] = np.concatenate((halves[short], spare))
        return order[np.concatenate([half[: self.samples] for half in halves])]
