"""Tensor parallelism: a frozen T5 whose weights are divided over processes.

As in Megatron-LM (Shoeybi et al. 2019, section 3): a process holds some of the heads and some of
the feed-forward's inner width. The residual stream is whole in every process; what is computed from
it with a share of the weights is summed once after attention and once after the feed-forward.

The two places where whole and divided meet are adjoint linear maps, so that each is the other's
derivative, to any order, which MetaPT's second order needs:

    spread   identity forward, sum over the processes backward
    join     sum over the processes forward, identity backward

DTensor, which would insert them by itself, was tried first (torch 2.13): MetaPT's gradient was off
by 0.2 % where a plain prompt entered through `from_local`, and with a prompt that was a DTensor
itself the backward pass of mode `prefix` failed on a view.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from serve.errors import UserError

Sum = Callable[[Tensor], Tensor]  # over the processes, the result in all of them


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: Tensor, total: Sum) -> Tensor:
        ctx.total = total
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _Join.apply(gradients[0], ctx.total), None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, total: Sum) -> Tensor:
        ctx.total = total
        return total(part.contiguous())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _Spread.apply(gradients[0], ctx.total), None


@dataclass(frozen=True)
class Shards:
    """The part of the weights that this process has; of one process, all of them.

    Attributes:
        rank, count: which part of how many; total: sums a tensor over the processes.
    """

    rank: int = 0
    count: int = 1
    total: Sum | None = None

    def spread(self, whole: Tensor) -> Tensor:
        """Before a product with divided weights: each process derives its part of the gradient."""
        return whole if self.total is None else _Spread.apply(whole, self.total)

    def join(self, part: Tensor) -> Tensor:
        """After a product with divided weights: the sum is what the whole weights would give."""
        return part if self.total is None else _Join.apply(part, self.total)

    def own(self, whole: Tensor, dim: int) -> Tensor:
        """This process's part along a dimension."""
        if self.total is None:
            return whole
        size = whole.shape[dim] // self.count
        return self.spread(whole).narrow(dim, self.rank * size, size)

    def gather(self, part: Tensor, dim: int) -> Tensor:
        """All parts along a dimension, in every process; without a gradient."""
        if self.total is None:
            return part
        shape = list(part.shape)
        shape[dim] *= self.count
        whole = part.new_zeros(shape)
        whole.narrow(dim, self.rank * part.shape[dim], part.shape[dim]).copy_(part.detach())
        return self.total(whole)


WHOLE = Shards()

# Which dimension of a weight holds heads or the feed-forward's inner width.
_DIVIDED = {"q": 0, "k": 0, "v": 0, "o": 1, "wi": 0, "wi_0": 0, "wi_1": 0, "wo": 1}
_BIAS = "relative_attention_bias"  # [buckets, H]


def divide(model: nn.Module, shards: Shards) -> None:
    """Leave only this process's part of a T5's weights, in place.

    Raises:
        UserError: the heads or the feed-forward's width cannot be divided evenly.
    """
    if shards.count == 1:
        return
    config: Any = model.config
    for name, size in (("heads", config.num_heads), ("feed-forward columns", config.d_ff)):
        if size % shards.count:
            raise UserError(
                f"the backbone's {size} {name} cannot be divided evenly over {shards.count} "
                "processes: choose another --parallelism_config_tp_size"
            )
    for path, module in model.named_modules():
        name = path.rsplit(".", 1)[-1]
        dim = 1 if name == _BIAS else _DIVIDED.get(name)
        if dim is None or not isinstance(module, nn.Linear | nn.Embedding):
            continue
        size = module.weight.shape[dim] // shards.count
        # A copy, so that the whole weight can be freed.
        part = module.weight.detach().narrow(dim, shards.rank * size, size).clone()
        module.weight = nn.Parameter(part, requires_grad=False)
