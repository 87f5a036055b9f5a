"""The graphs that are exported, as modules over a frozen T5's weights.

They compute what `trainer.readout.class_scores` computes (tests hold them to it), arranged for one
row per group and for a runtime that executes the graph as it stands:

- query, key and value are one product, weights lie transposed as the products read them;
- position bias is a table over distances, gathered for the batch's length, and added together with
  the masks once for all layers;
- of the decoder everything that no input can change is a constant: the first self-attention and
  the first question to the encoder;
- cross-attention brings the query to the encoder states (see `trainer.t5`).

Notation: B rows, N slots of the bank, S text tokens, P prompt tokens, D width, H heads, K width of
a head, L layers, F width of the feed-forward layer, C classes, Q = 2 decoder positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from exporter.layers import (
    ACTIVATIONS,
    MASKED,
    FeedForward,
    Norm,
    SelfAttention,
    masked_bias,
    product_weight,
)
from serve.errors import UserError
from trainer.t5 import FrozenT5, relative_buckets


@dataclass
class PromptKV:
    """Prompts' keys and values before the text.

    Attributes:
        kv: [N, L, 2, H, P, K].
        task_id: int64 [B], the slot of each row; None where all rows share the only slot.
    """

    kv: Tensor
    task_id: Tensor | None

    @property
    def shared(self) -> bool:
        """Whether `layer` gives one set for all rows."""
        return self.task_id is None

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, each [B or 1, H, P, K]."""
        if self.task_id is None:
            return self.kv[:, index, 0], self.kv[:, index, 1]
        slots, layers, two, heads, prompt, narrow = self.kv.shape
        # One row per slot, layer and kind, so that only what the batch reads is copied.
        flat = self.kv.view(slots * layers * two, heads, prompt, narrow)
        first = self.task_id * (layers * two) + 2 * index
        return flat.index_select(0, first), flat.index_select(0, first + 1)


class Encoder(nn.Module):
    """The encoder, with keys and values of a prompt before the text or without."""

    def __init__(self, t5: FrozenT5) -> None:
        super().__init__()
        stack, config = t5.model.encoder, t5.model.config
        self.attention = nn.ModuleList(
            SelfAttention(block.layer[0], t5.heads, t5.head_width) for block in stack.block
        )
        activation = config.dense_act_fn
        self.feed = nn.ModuleList(FeedForward(block.layer[1], activation) for block in stack.block)
        self.final = Norm(stack.final_layer_norm)
        # Beyond `max_distance` all positions share a bucket, so the table can end there.
        reach = t5.max_distance
        bucket = relative_buckets(
            torch.arange(-reach, reach + 1),
            bidirectional=True,
            buckets=t5.buckets,
            max_distance=reach,
        )
        table = stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight
        self.distance_bias = nn.Parameter(table[bucket].t().contiguous(), requires_grad=False)
        self.reach = reach
        self.layers, self.heads, self.head_width = t5.layers, t5.heads, t5.head_width

    def bias(self, before: int, length: int, seen: Tensor) -> Tensor:
        """Position bias and masks in one: [B, H, S, before + S].

        Args:
            before: keys that stand before the text.
            length: S.
            seen: bool [B, before + S], the keys that count.
        """
        position = self.position(before, length)
        return position + masked_bias(seen, position.dtype)[:, None, None, :]

    def position(self, before: int, length: int) -> Tensor:
        """Position bias alone: [H, S, before + S]. Arguments as for `bias`."""
        keys = torch.arange(before + length, device=self.distance_bias.device)
        queries = keys[before:]
        distance = (keys[None, :] - queries[:, None]).clamp(-self.reach, self.reach)
        flat = self.distance_bias.index_select(1, (distance + self.reach).flatten())
        return flat.unflatten(1, distance.shape)

    def forward(
        self, hidden: Tensor, bias: Tensor, prompt: PromptKV | None
    ) -> tuple[Tensor, list[Tensor]]:
        """Encode.

        Args:
            hidden: [B, S, D].
            bias: [B, H, S, P + S], or [B, H, S, S] without a prompt.
            prompt: gives a layer's keys and values.

        Returns:
            states [B, S, D] after the final norm, and without a prompt per layer [B, 2, H, S, K],
            the keys and values of what was encoded.
        """
        collected = []
        for index in range(self.layers):
            attention = cast(SelfAttention, self.attention[index])
            query, key, value = attention.project(hidden)
            scores = query @ key.transpose(-1, -2)
            if prompt is None:
                collected.append(torch.stack((key, value), dim=1))
                context = (scores + bias).softmax(-1) @ value
            else:
                # Joining the scores copies less than joining the keys; for values of each row's
                # own it is the other way round (measured, see docs/speed.md).
                prompt_key, prompt_value = prompt.layer(index)
                scores = torch.cat((query @ prompt_key.transpose(-1, -2), scores), dim=-1)
                weights = (scores + bias).softmax(-1)
                if prompt.shared:
                    before = prompt_value.shape[2]
                    context = weights[..., :before] @ prompt_value + weights[..., before:] @ value
                else:
                    context = weights @ torch.cat((prompt_value, value), dim=2)
            hidden = attention.join(hidden, context)
            hidden = self.feed[index](hidden)
        return self.final(hidden), collected


class DecoderLayer(nn.Module):
    """One decoder layer over two positions, the same ids in every row."""

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

    def look(self, hidden: Tensor, asked: Tensor, memory: Tensor, bias: Tensor) -> Tensor:
        """Cross-attention and feed-forward.

        Args:
            hidden: [B or 1, Q, D]; asked: [B or 1, HQ, D]; memory: [B, M, D];
            bias: [B, 1, M], masks.

        Returns:
            [B, Q, D].
        """
        rows, _, width = memory.shape
        count = hidden.shape[1]
        weights = (asked @ memory.transpose(-1, -2) + bias).softmax(-1)
        gathered = (weights @ memory).view(rows, self.heads, count, width)
        by_head = gathered.transpose(0, 1).flatten(1, 2)  # [H, BQ, D]
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

    def forward(self, memory: Tensor, seen: Tensor) -> Tensor:
        """memory [B, M, D] and bool seen [B, M] -> [B, D], normed and scaled."""
        bias = masked_bias(seen, memory.dtype)[:, None, :]
        hidden, asked = self.first, self.first_asked
        for index, module in enumerate(self.blocks):
            block = cast(DecoderLayer, module)
            if index > 0:
                last = index == len(self.blocks) - 1
                hidden = block.look_back(hidden, self.self_bias, last)
                asked = block.ask(hidden)
            hidden = block.look(hidden, asked, memory, bias)
        return self.final(hidden[:, -1])


class ServedGraph(nn.Module):
    """The graph of a bundle: rows of any tasks -> class scores.

    Args:
        mode: `full`, `prefix` or `deep`.
        prompt_tokens: P, the longest prompt of the bundle; shorter ones are left padded.

    Raises:
        UserError: the T5's activation is not one that the graph has.
    """

    def __init__(self, t5: FrozenT5, decoder_ids: Tensor, mode: str, prompt_tokens: int) -> None:
        super().__init__()
        if t5.model.config.dense_act_fn not in ACTIVATIONS:
            raise UserError(
                f"the backbone's activation '{t5.model.config.dense_act_fn}' cannot be exported: "
                f"there are {', '.join(ACTIVATIONS)}"
            )
        self.mode, self.prompt_tokens = mode, prompt_tokens
        self.shared = nn.Parameter(t5.model.shared.weight.detach(), requires_grad=False)
        head = t5.model.lm_head.weight.detach()
        tied = head.data_ptr() == self.shared.data_ptr() or torch.equal(head, self.shared)
        self.head = self.shared if tied else nn.Parameter(head, requires_grad=False)
        self.encoder = Encoder(t5)
        self.decoder = Decoder(t5, decoder_ids)

    def inputs(self) -> list[str]:
        """The names of `forward`'s arguments that become the graph's inputs, in order."""
        bank = ["bank_prompts"] if self.mode == "full" else ["bank_kv", "bank_states"]
        return ["input_ids", "attention_mask", "task_id", *bank, "bank_length", "label_ids"]

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, task_id: Tensor, *bank: Tensor
    ) -> Tensor:
        """Class scores.

        Args:
            input_ids, attention_mask: int64 [B, S]; task_id: int64 [B].
            bank: `bank_kv` [N, L, 2, H, P, K] and `bank_states` [N, P, D], or in mode `full`
                `bank_prompts` [N, P, D]; then `bank_length` int64 [N], `label_ids` int64 [N, C].

        Returns:
            [B, C]; padded classes hugely negative.
        """
        *prompts, bank_length, label_ids = bank
        before = self.prompt_tokens
        slots = torch.arange(before, device=input_ids.device)
        present = (
            slots[None, :] >= before - bank_length.index_select(0, task_id)[:, None]
        )  # left padded
        seen = torch.cat((present, attention_mask.bool()), dim=1)
        text = functional.embedding(input_ids, self.shared)
        length = input_ids.shape[1]
        if self.mode == "full":
            whole = torch.cat((prompts[0].index_select(0, task_id), text), dim=1)
            bias = self.encoder.bias(0, before + length, seen)
            memory, _ = self.encoder(whole, bias, None)
        else:
            bank_kv, bank_states = prompts
            bias = self.encoder.bias(before, length, seen)
            states, _ = self.encoder(text, bias, PromptKV(bank_kv, task_id))
            memory = torch.cat((bank_states.index_select(0, task_id), states), dim=1)
        decoded = self.decoder(memory, seen)  # [B, D]
        words = label_ids.index_select(0, task_id)  # [B, C]
        rows = functional.embedding(words.clamp(min=0), self.head)  # [B, C, D]
        scores = (rows @ decoded[:, :, None])[:, :, 0]
        return scores.masked_fill(words < 0, MASKED[scores.dtype])


class PrefixGraph(nn.Module):
    """A prompt's constants in mode `prefix`; shares the encoder's weights with `ServedGraph`."""

    position: Tensor

    def __init__(self, served: ServedGraph) -> None:
        super().__init__()
        self.encoder = served.encoder
        self.prompt_tokens = served.prompt_tokens
        with torch.no_grad():
            position = served.encoder.position(0, self.prompt_tokens)
        # A buffer, which keeps its name when traced; the tracer would fold it to a nameless one.
        self.register_buffer("position", position.contiguous())

    def forward(self, prompt: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        """prompt [P, D], left padded, and its length (a scalar) -> [L, 2, H, P, K] and [P, D]."""
        slots = torch.arange(self.prompt_tokens, device=prompt.device)
        seen = (slots >= self.prompt_tokens - length)[None]
        bias = self.position + masked_bias(seen, self.position.dtype)[:, None, None, :]
        states, kv = self.encoder(prompt[None], bias, None)
        return torch.cat(kv, dim=0), states[0]


class SingleFileGraph(nn.Module):
    """One task with everything baked in: input_ids, attention_mask -> logits [B, C].

    Args:
        prompt: the task's tensors without a group axis (`trainer.modes`), unpadded; in mode
            `prefix` its keys, values and states are computed here.
        words: int64 [C], the label words; only their rows of the output matrix are kept.
    """

    def __init__(self, served: ServedGraph, prompt: dict[str, Tensor], words: Tensor) -> None:
        super().__init__()
        self.mode = served.mode
        self.encoder, self.decoder, self.shared = served.encoder, served.decoder, served.shared
        if self.mode == "full":
            self.register_buffer("prompt", prompt["prompt_embeddings"][None])
        else:
            if self.mode == "prefix":
                embeddings = prompt["prompt_embeddings"]
                with torch.no_grad():
                    seen = torch.ones(1, embeddings.shape[0], dtype=torch.bool)
                    bias = self.encoder.bias(0, embeddings.shape[0], seen)
                    states, layers = self.encoder(embeddings[None], bias, None)
                kv = torch.stack(layers, dim=1)
            else:
                kv, states = prompt["kv"][None], prompt["states"][None]
            self.register_buffer("kv", kv)  # [1, L, 2, H, P, K]
            self.register_buffer("prompt", states)  # [1, P, D]
        self.register_buffer("word_rows", served.head.detach()[words].t().contiguous())  # [D, C]

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[B, S], [B, S] -> [B, C]."""
        rows, length = input_ids.shape
        prompt = cast(Tensor, self.prompt)
        before = prompt.shape[1]
        present = torch.ones_like(input_ids[:, :1], dtype=torch.bool).expand(-1, before)
        seen = torch.cat((present, attention_mask.bool()), dim=1)
        text = functional.embedding(input_ids, self.shared)
        spread = prompt.expand(rows, -1, -1)
        if self.mode == "full":
            whole = torch.cat((spread, text), dim=1)
            memory, _ = self.encoder(whole, self.encoder.bias(0, before + length, seen), None)
        else:
            bias = self.encoder.bias(before, length, seen)
            states, _ = self.encoder(text, bias, PromptKV(cast(Tensor, self.kv), None))
            memory = torch.cat((spread, states), dim=1)
        return self.decoder(memory, seen) @ cast(Tensor, self.word_rows)
