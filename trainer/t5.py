"""T5's forward pass as classification with soft prompts needs it, over Hugging Face weights.

What trains is this (it can be differentiated twice); the exporter arranges the same weights for
serving in modules of its own, and holds every graph to this one's answers:

- rows come in groups that share a prompt: tuning is one group, MetaPT has a group per task. Nothing
  of a prompt is copied to its rows;
- the encoder takes keys and values that stand before the text (mode `prefix`);
- cross-attention absorbs its key and value projections: with two decoder positions it is cheaper
  to bring the query to the encoder states than to project every state (DeepSeek-V2, section 2.1,
  does the same for its latent cache).

Notation: B rows = G groups x R rows, S text tokens, P prompt tokens, D model width, H heads,
K width of a head, L encoder layers, Q decoder positions, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import T5ForConditionalGeneration

from trainer.sharding import WHOLE, Shards, divide


@dataclass
class Segment:
    """Encoder states that the decoder may look at.

    Attributes:
        states: [G, R or 1, N, D]; a second axis of 1 is shared by all rows of a group.
        mask: bool, [G, R or 1, N], true where a state counts; None where all do.
    """

    states: Tensor
    mask: Tensor | None


# Below this share of padding, moving rows costs what it saves.
_WORTH_PACKING = 0.05
_packs = ContextVar("packs", default=True)


@contextmanager
def unpacked() -> Iterator[None]:
    """Within, padding is computed along: every size then follows from the batch's shape alone, and
    nobody has to wait until the device has counted its tokens."""
    before = _packs.set(False)
    try:
        yield
    finally:
        _packs.reset(before)


class Packing:
    """Rows of unequal length as one run of tokens, so that no product is spent on padding.

    Args:
        mask: bool [B, S], true at the N tokens that are no padding.
    """

    def __init__(self, mask: Tensor):
        self.shape = mask.shape
        flat = mask.flatten()
        self.tokens = flat.nonzero().flatten()  # [N]
        # Where padding stands in [B, S] any token may be read: what looks there is masked.
        self.places = (flat.cumsum(0) - 1).clamp(min=0)  # [B*S]

    @staticmethod
    def of(mask: Tensor | None) -> Packing | None:
        """None where there is too little padding to be worth it, or within `unpacked`."""
        if mask is None or not _packs.get():
            return None
        packing = Packing(mask)
        worth = len(packing.tokens) < (1 - _WORTH_PACKING) * mask.numel()
        return packing if worth and len(packing.tokens) else None

    def pack(self, rows: Tensor) -> Tensor:
        """[B, S, D] -> [N, D]."""
        return rows.flatten(0, 1).index_select(0, self.tokens)

    def unpack(self, tokens: Tensor) -> Tensor:
        """[N, D] -> [B, S, D], with some token's values at padding."""
        return tokens.index_select(0, self.places).unflatten(0, self.shape)


def relative_buckets(
    distance: Tensor, *, bidirectional: bool, buckets: int, max_distance: int
) -> Tensor:
    """T5's bucket of each relative position (Raffel et al. 2020, section 2.1).

    Near distances have a bucket each, far ones share logarithmically wider buckets up to
    `max_distance`.

    Args:
        distance: int64, key position minus query position, any shape.

    Returns:
        int64 of the same shape, in [0, buckets).
    """
    offset = torch.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        offset = torch.where(distance > 0, buckets, 0)
        distance = distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    exact = buckets // 2
    # clamp: log(0) of the near distances is thrown away by the where below, but is -inf until then
    ratio = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (ratio * (buckets - exact)).long()).clamp(max=buckets - 1)
    return offset + torch.where(distance < exact, distance, far)


def rms_norm(layer: Any, hidden: Tensor) -> Tensor:
    """T5's norm: by the root mean square, without a mean or a bias.

    transformers' module takes the mean of squares in float32 whatever it is given; here only half
    precision is widened, so that float64 is float64 throughout (the tests' finite differences).
    """
    wide = hidden.float() if hidden.dtype in (torch.float16, torch.bfloat16) else hidden
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + layer.variance_epsilon)
    return layer.weight * (wide * scale).to(hidden.dtype)


def masked(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Attention scores with the masked keys out of reach. `mask` broadcasts to `scores`."""
    if mask is None:
        return scores
    return scores.masked_fill(~mask, torch.finfo(scores.dtype).min)


class FrozenT5(nn.Module):
    """A frozen T5 (v1.0 or v1.1/FLAN), steered by prompts.

    Args:
        model: the Hugging Face model; its parameters stop requiring gradients, dropout is off.
        shards: which part of the weights to keep; H is then the number of heads in this process.
    """

    def __init__(
        self,
        model: T5ForConditionalGeneration,
        *,
        trainable: bool = False,
        shards: Shards = WHOLE,
    ):
        super().__init__()
        self.model = model.eval()
        self.model.requires_grad_(trainable)
        divide(model, shards)
        self.shards = shards
        config = model.config
        self.width: int = config.d_model
        self.heads: int = config.num_heads // shards.count
        self.head_width: int = config.d_kv
        self.layers: int = config.num_layers
        self.vocabulary: int = model.lm_head.weight.shape[0]
        self.buckets: int = config.relative_attention_num_buckets
        self.max_distance: int = config.relative_attention_max_distance
        # Only models whose head is tied to the embeddings scale the decoder's output; transformers
        # 5 keeps that in its own flag, since it rewrites `tie_word_embeddings`.
        scaled = getattr(config, "scale_decoder_outputs", config.tie_word_embeddings)
        self.output_scale: float = config.d_model**-0.5 if scaled else 1.0

    # -- encoder ---------------------------------------------------------------------------------

    def embed(self, ids: Tensor) -> Tensor:
        """Token embeddings: [..., S] int64 -> [..., S, D]."""
        return self.model.shared(ids)

    def _bias(self, stack: Any, queries: Tensor, keys: Tensor, bidirectional: bool) -> Tensor:
        """Relative position bias [H, Q, K] for query and key positions [Q], [K]."""
        table = stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight
        bucket = relative_buckets(
            keys[None, :] - queries[:, None],
            bidirectional=bidirectional,
            buckets=self.buckets,
            max_distance=self.max_distance,
        )
        return table[bucket].permute(2, 0, 1)

    def _split(self, projected: Tensor, groups: int) -> Tensor:
        """[B, S, H*K] -> [G, R, H, S, K]."""
        rows, length, _ = projected.shape
        shape = (groups, rows // groups, length, self.heads, self.head_width)
        return projected.view(shape).transpose(2, 3)

    def encode(self, text: Tensor, mask: Tensor | None, kv: Tensor | None = None) -> Tensor:
        """Encode text, with a prompt's keys and values before it or without.

        Args:
            text: [B, S, D] input embeddings.
            mask: bool [B, S], true at tokens; None where nothing is padded.
            kv: [G, L, 2, H, P, K] keys and values of each layer, one set a group; B must be a
                multiple of G.

        Returns:
            [B, S, D] encoder states of the text, after the final norm.
        """
        return self._run_encoder(text, mask, kv, None)

    def prefix(self, prompt: Tensor) -> tuple[Tensor, Tensor]:
        """What a prompt [G, P, D] contributes in mode `prefix`: constants that no text changes.

        Returns:
            kv [G, L, 2, H, P, K] and the prompt's encoder states [G, P, D].
        """
        collected: list[Tensor] = []
        states = self._run_encoder(prompt, None, None, collected)
        return torch.stack(collected, dim=1), states

    def _run_encoder(
        self,
        hidden: Tensor,
        mask: Tensor | None,
        kv: Tensor | None,
        collect: list[Tensor] | None,
    ) -> Tensor:
        rows, length, _ = hidden.shape
        groups = rows if kv is None else kv.shape[0]
        packing = Packing.of(mask)
        prompt_tokens = 0 if kv is None else kv.shape[4]
        encoder = self.model.encoder
        # The text stands after the prompt, so its positions start at P.
        positions = torch.arange(length, device=hidden.device) + prompt_tokens
        bias = self._bias(encoder, positions, positions, True)  # [H, S, S]
        text_mask = None if mask is None else mask.view(groups, -1, 1, 1, length)
        if kv is not None:
            before = torch.arange(prompt_tokens, device=hidden.device)
            prompt_bias = self._bias(encoder, positions, before, True)  # [H, S, P]
        # Once for all layers, so that no layer fills and no backward pass unfills.
        bias = (
            bias
            if text_mask is None
            else masked(bias.expand(*text_mask.shape[:2], -1, -1, -1), text_mask)
        )
        if packing is not None:
            hidden = packing.pack(hidden)
        for index, block in enumerate(encoder.block):
            attention, norm = block.layer[0].SelfAttention, block.layer[0].layer_norm
            normed = self.shards.spread(rms_norm(norm, hidden))
            # Only attention needs rows; every other product runs over the tokens.
            query, key, value = (
                self._split(made if packing is None else packing.unpack(made), groups)
                for made in (attention.q(normed), attention.k(normed), attention.v(normed))
            )  # [G, R, H, S, K]
            if collect is not None:  # rows are groups here: [G, 1, H, P, K] -> [G, 2, H, P, K]
                collect.append(torch.cat((key, value), dim=1))
            scores = query @ key.transpose(-1, -2) + bias
            if kv is None:
                context = scores.softmax(-1) @ value
            else:
                # [G, R, H, S, K] -> [G, H, R*S, K]: one product a group, and the prompt's keys are
                # read once for all rows.
                flat = query.transpose(1, 2).flatten(2, 3)
                before_scores = flat @ kv[:, index, 0].transpose(-1, -2)
                before_scores = before_scores.unflatten(2, (-1, length)).transpose(1, 2)
                before_scores = before_scores + prompt_bias
                weights = torch.cat((before_scores, scores), dim=-1).softmax(-1)
                # A split's backward is one join; that of two slices fills and adds whole tensors.
                to_prompt, to_text = weights.split((prompt_tokens, length), dim=-1)
                to_prompt = to_prompt.transpose(1, 2).flatten(2, 3)
                from_prompt = (to_prompt @ kv[:, index, 1]).unflatten(2, (-1, length))
                context = to_text @ value + from_prompt.transpose(1, 2)
            joined = context.transpose(2, 3).reshape(rows, length, self.heads * self.head_width)
            if packing is not None:
                joined = packing.pack(joined)
            hidden = hidden + self.shards.join(attention.o(joined))
            hidden = hidden + self._feed_forward(block.layer[1], hidden)
        states = rms_norm(encoder.final_layer_norm, hidden)
        return states if packing is None else packing.unpack(states)

    def _feed_forward(self, layer: Any, hidden: Tensor) -> Tensor:
        normed = self.shards.spread(rms_norm(layer.layer_norm, hidden))
        return self.shards.join(layer.DenseReluDense(normed))

    # -- decoder ---------------------------------------------------------------------------------

    def decode(self, decoder_ids: Tensor, memory: list[Segment]) -> Tensor:
        """The decoder's output at its last position.

        Args:
            decoder_ids: int64 [Q], the same for every row (`[pad, <extra_id_0>]`).
            memory: the segments of encoder states to attend to, as one sequence.

        Returns:
            [B, D], normed and scaled, ready for the rows of the output matrix.
        """
        decoder = self.model.decoder
        hidden = self.embed(decoder_ids)[None, None]  # [1, 1, Q, D] until a row differs
        count = decoder_ids.shape[0]
        positions = torch.arange(count, device=decoder_ids.device)
        bias = self._bias(decoder, positions, positions, False)
        causal = positions[None, :] <= positions[:, None]
        last = len(decoder.block) - 1
        for index, block in enumerate(decoder.block):
            attention, norm = block.layer[0].SelfAttention, block.layer[0].layer_norm
            normed = self.shards.spread(rms_norm(norm, hidden))
            # Above the last layer nobody looks at the earlier positions any more.
            asking = normed[:, :, -1:] if index == last else normed
            query = self._heads(attention.q(asking))  # [G, R, H, Q, K]
            key, value = self._heads(attention.k(normed)), self._heads(attention.v(normed))
            first = count - query.shape[3]
            scores = masked(query @ key.transpose(-1, -2) + bias[:, first:], causal[first:])
            context = (scores.softmax(-1) @ value).transpose(2, 3).flatten(3)
            hidden = hidden[:, :, first:] + self.shards.join(attention.o(context))
            hidden = hidden + self._cross(block.layer[1], hidden, memory)
            hidden = hidden + self._feed_forward(block.layer[2], hidden)
        final = rms_norm(decoder.final_layer_norm, hidden[:, :, -1])  # [G, R, D]
        return final.flatten(0, 1) * self.output_scale

    def _heads(self, projected: Tensor) -> Tensor:
        """[G, R, Q, H*K] -> [G, R, H, Q, K]."""
        return projected.unflatten(-1, (self.heads, self.head_width)).transpose(2, 3)

    def _cross(self, layer: Any, hidden: Tensor, memory: list[Segment]) -> Tensor:
        """Cross-attention with absorbed projections: [G, R, Q, D] -> [G, R, Q, D]."""
        attention = layer.EncDecAttention
        heads, head_width = self.heads, self.head_width
        w_key = attention.k.weight.view(heads, head_width, self.width)  # [H, K, D]
        w_value = attention.v.weight.view(heads, head_width, self.width)
        asking = self.shards.spread(rms_norm(layer.layer_norm, hidden))
        query = self._heads(attention.q(asking))  # [G, R, H, Q, K]
        memory = [Segment(self.shards.spread(part.states), part.mask) for part in memory]
        asked = query @ w_key  # [G, R, H, Q, D]: the query, seen from the encoder states
        count = asked.shape[3]
        asked = asked.flatten(2, 3)  # [G, R, H*Q, D]
        scores = []
        for segment in memory:
            mask = None if segment.mask is None else segment.mask[:, :, None, :]
            scores.append(masked(self._against(asked, segment.states), mask))
        lengths = [segment.states.shape[2] for segment in memory]
        # A query that is the same for all rows scores a shared prompt once; the rows join here.
        rows = max(score.shape[1] for score in scores)
        scores = [score.expand(-1, rows, -1, -1) for score in scores]
        weights = torch.cat(scores, dim=-1).softmax(-1).split(lengths, dim=-1)
        gathered = sum(
            self._against(weight, segment.states.transpose(-1, -2))
            for weight, segment in zip(weights, memory, strict=True)
        )
        assert isinstance(gathered, Tensor)
        context = gathered.unflatten(2, (heads, count)) @ w_value.transpose(-1, -2)
        return self.shards.join(attention.o(context.transpose(2, 3).flatten(3)))

    @staticmethod
    def _against(asked: Tensor, states: Tensor) -> Tensor:
        """`asked @ states^T` where a group's rows may share the states.

        [G or 1, R or 1, N, D] with [G, R or 1, M, D] -> [G, R, N, M].
        """
        groups, rows = asked.shape[:2]
        if states.shape[1] == 1 and rows > 1 and groups == states.shape[0]:
            # One product a group instead of one a row: [G, R*N, D] @ [G, D, M].
            product = asked.flatten(1, 2) @ states[:, 0].transpose(-1, -2)
            return product.unflatten(1, (rows, -1))
        return asked @ states.transpose(-1, -2)

    # -- read-out --------------------------------------------------------------------------------

    def scores(self, decoded: Tensor, word_ids: Tensor) -> Tensor:
        """Class scores: the logits of the label words only.

        Args:
            decoded: [B, D] from `decode`.
            word_ids: int64 [C] for all rows, or [G, C] with B a multiple of G.

        Returns:
            [B, C].
        """
        rows = self.model.lm_head.weight[word_ids]
        if word_ids.dim() == 1:
            return decoded @ rows.T
        grouped = decoded.view(word_ids.shape[0], -1, self.width)
        return (grouped @ rows.transpose(-1, -2)).flatten(0, 1)
