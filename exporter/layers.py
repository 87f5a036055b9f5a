"""The layers that the exported graphs are built of, over a frozen T5's weights.

B rows, S tokens, D width, H heads, K width of a head, F width of the feed-forward layer.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

# Added to the scores of masked keys: exp(-1e9) is 0 in fp32, and half precision can hold -6e4.
MASKED = {torch.float32: -1e9, torch.float16: -6e4, torch.bfloat16: -1e9}
ACTIVATIONS = ("relu", "gelu_new", "gelu", "silu")


def product_weight(linear: nn.Module) -> Tensor:
    """A linear layer's weight as the right-hand side of a product: [in, out]."""
    return cast(Tensor, linear.weight).detach().t().contiguous()


class Norm(nn.Module):
    """T5's layer norm: root mean square, no mean, no bias."""

    def __init__(self, norm: nn.Module, scale: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(cast(Tensor, norm.weight).detach() * scale, requires_grad=False)
        self.epsilon = float(cast(float, norm.variance_epsilon))

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        # A division by the root, not a product with rsqrt: onnxruntime knows this form, and runs
        # it as one operator (SimplifiedLayerNormalization).
        variance = hidden.pow(2).mean(-1, keepdim=True)
        return hidden / torch.sqrt(variance + self.epsilon) * self.weight


class FeedForward(nn.Module):
    """The feed-forward layer with its norm and residual, plain (v1.0) or gated (v1.1)."""

    def __init__(self, layer: nn.Module, activation: str) -> None:
        super().__init__()
        dense = cast(nn.Module, layer.DenseReluDense)
        self.norm = Norm(cast(nn.Module, layer.layer_norm))
        self.gated = hasattr(dense, "wi_0")
        inner = [dense.wi_0, dense.wi_1] if self.gated else [dense.wi]
        joined = torch.cat([product_weight(cast(nn.Module, part)) for part in inner], dim=1)
        self.w_in = nn.Parameter(joined, requires_grad=False)  # [D, F], gated [D, 2F]
        self.w_out = nn.Parameter(product_weight(cast(nn.Module, dense.wo)), requires_grad=False)
        self.activation = activation

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        inner = self.norm(hidden) @ self.w_in
        if self.gated:
            gate, inner = inner.chunk(2, dim=-1)
            inner = self._activate(gate) * inner
        else:
            inner = self._activate(inner)
        return hidden + inner @ self.w_out

    def _activate(self, value: Tensor) -> Tensor:
        if self.activation == "relu":
            return functional.relu(value)
        if self.activation == "silu":
            return functional.silu(value)
        return functional.gelu(
            value, approximate="tanh" if self.activation == "gelu_new" else "none"
        )


class SelfAttention(nn.Module):
    """Self-attention with its norm and residual; query, key and value in one product."""

    def __init__(self, layer: nn.Module, heads: int, head_width: int) -> None:
        super().__init__()
        attention = cast(nn.Module, layer.SelfAttention)
        self.norm = Norm(cast(nn.Module, layer.layer_norm))
        parts = [product_weight(cast(nn.Module, getattr(attention, name))) for name in "qkv"]
        self.w_qkv = nn.Parameter(torch.cat(parts, dim=1), requires_grad=False)  # [D, 3HK]
        self.w_out = nn.Parameter(product_weight(cast(nn.Module, attention.o)), requires_grad=False)
        self.heads, self.head_width = heads, head_width

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, S, D] -> query, key, value, each [B, H, S, K]."""
        parts = (self.norm(hidden) @ self.w_qkv).chunk(3, dim=-1)
        shape = (self.heads, self.head_width)
        query, key, value = (part.unflatten(-1, shape).transpose(1, 2) for part in parts)
        return query, key, value

    def join(self, hidden: Tensor, context: Tensor) -> Tensor:
        """Residual [B, S, D] plus the heads' contexts [B, H, S, K], or [G, H, RS, K]."""
        joined = context.transpose(1, 2).reshape(*hidden.shape[:2], self.heads * self.head_width)
        return hidden + joined @ self.w_out


def masked_bias(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a key counts and hugely negative where not."""
    return (~seen).to(dtype) * MASKED[dtype]
