"""The decoder of the exported graphs: two positions, the same ids in every row.

Everything that no input can change is a constant: the first self-attention and the first question
to the encoder. Cross-attention brings the query to the encoder's states (see `trainer.t5`).

B rows in G groups of R, each of one prompt; S text tokens, P prompt tokens, D width, H heads,
K width of a head, Q = 2 decoder positions.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from exporter.layers import MASKED, FeedForward, Norm, SelfAttention, product_weight
from trainer.t5 import FrozenT5, relative_buckets


class DecoderLayer(nn.Module):
    """One decoder layer."""

    def __init__(self, t5: FrozenT5, index: int) -> None:
        super().__init__()
        block = t5.model.decoder.block[index]
        self.heads, self.head_width = t5.heads, t5.head_width
        self.own = SelfAttention(block.layer[0], t5.heads, t5.head_width)
        cross = block.layer[1].EncDecAttention
        shape = (t5.heads, t5.head_width, t5.width)
        self.norm = Norm(block.layer[1].layer_norm)
        self.w_query = nn.Parameter(product_weight(cross.q), requires_grad=False)  # [D, HK]
        self.w_key = nn.Parameter(cross.k.weight.detach().view(shape), requires_grad=False)
        value = cross.v.weight.detach().view(shape).transpose(1, 2).contiguous()
        self.w_value = nn.Parameter(value, requires_grad=False)  # [H, D, K]
        self.w_out = nn.Parameter(product_weight(cross.o), requires_grad=False)
        self.feed = FeedForward(block.layer[2], t5.model.config.dense_act_fn)

    def look_back(self, hidden: Tensor, bias: Tensor, last: bool) -> Tensor:
        """Causal self-attention: [B, Q, D] -> [B, Q or 1, D]; `bias` [H, Q, Q] masks as well."""
        query, key, value = self.own.project(hidden)
        if last:  # nobody looks at the earlier positions any more
            query, bias, hidden = query[:, :, -1:], bias[:, -1:], hidden[:, -1:]
        weights = (query @ key.transpose(-1, -2) + bias).softmax(-1)
        return self.own.join(hidden, weights @ value)

    def ask(self, hidden: Tensor) -> Tensor:
        """The cross-attention query as seen from the encoder states: [B, Q, D] -> [B, HQ, D]."""
        rows, count, width = hidden.shape
        query = (self.norm(hidden) @ self.w_query).view(rows * count, self.heads, self.head_width)
        asked = query.transpose(0, 1) @ self.w_key  # [H, BQ, D]
        return asked.view(self.heads, rows, count, width).transpose(0, 1).flatten(1, 2)

    def look(
        self, hidden: Tensor, asked: Tensor, prompt: Tensor | None, states: Tensor, bias: Tensor
    ) -> Tensor:
        """Cross-attention and feed-forward.

        Args:
            hidden: [B or 1, Q, D]; asked: [B, HQ, D].
            prompt: [G, P, D], states that the rows of a group share, or None.
            states: [B, S, D]; bias: [B, 1, P + S], masks.

        Returns:
            [B, Q, D].
        """
        rows, questions, width = asked.shape
        count = hidden.shape[1]
        scores = asked @ states.transpose(-1, -2)
        if prompt is None:
            gathered = (scores + bias).softmax(-1) @ states
        else:
            groups, before, _ = prompt.shape
            by_group = asked.reshape(groups, -1, width)  # [G, RHQ, D]
            first = (by_group @ prompt.transpose(-1, -2)).view(rows, questions, before)
            weights = (torch.cat((first, scores), dim=-1) + bias).softmax(-1)
            shared = weights[..., :before].reshape(groups, -1, before) @ prompt
            gathered = shared.view(rows, questions, width) + weights[..., before:] @ states
        by_head = gathered.view(rows, self.heads, count, width).transpose(0, 1).flatten(1, 2)
        context = (by_head @ self.w_value).transpose(0, 1)  # [BQ, H, K]
        joined = context.reshape(rows, count, self.heads * self.head_width)
        return self.feed(hidden + joined @ self.w_out)


class Decoder(nn.Module):
    """The decoder's last position for `[pad, <extra_id_0>]`."""

    first: Tensor
    first_asked: Tensor
    self_bias: Tensor

    def __init__(self, t5: FrozenT5, decoder_ids: Tensor) -> None:
        super().__init__()
        stack = t5.model.decoder
        self.blocks = nn.ModuleList(DecoderLayer(t5, index) for index in range(len(stack.block)))
        self.final = Norm(stack.final_layer_norm, scale=t5.output_scale)
        count = decoder_ids.shape[0]
        positions = torch.arange(count, device=decoder_ids.device)
        distance = positions[None, :] - positions[:, None]
        bucket = relative_buckets(
            distance, bidirectional=False, buckets=t5.buckets, max_distance=t5.max_distance
        )
        table = stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight
        bias = table[bucket].permute(2, 0, 1).masked_fill(distance > 0, MASKED[torch.float32])
        self.register_buffer("self_bias", bias.contiguous())
        block = cast(DecoderLayer, self.blocks[0])
        only = len(self.blocks) == 1
        with torch.no_grad():
            first = block.look_back(t5.embed(decoder_ids)[None], bias, last=only)
            asked = block.ask(first)
        self.register_buffer("first", first)
        self.register_buffer("first_asked", asked)

    def forward(self, prompt: Tensor | None, states: Tensor, bias: Tensor) -> Tensor:
        """prompt [G, P, D] or None, states [B, S, D], bias [B, 1, P + S] -> [B, D], normed and
        scaled."""
        hidden, asked = self.first, self.first_asked.expand(states.shape[0], -1, -1)
        for index, module in enumerate(self.blocks):
            block = cast(DecoderLayer, module)
            if index > 0:
                last = index == len(self.blocks) - 1
                hidden = block.look_back(hidden, self.self_bias, last)
                asked = block.ask(hidden)
            hidden = block.look(hidden, asked, prompt, states, bias)
        return self.final(hidden[:, -1])
