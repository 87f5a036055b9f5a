"""The graphs that are exported, as modules over a frozen T5's weights.

They compute what `trainer.readout.class_scores` computes (tests hold them to it), arranged for many
tasks in a batch and for a runtime that executes the graph as it stands:

- query, key and value are one product, weights lie transposed as the products read them;
- position bias is a table over distances, gathered for the batch's length, and added together with
  the masks once for all layers; that of the prompt's part is the same for all rows of a group, and
  so small that adding it to a layer's scores reads little besides the scores;
- rows come in groups of one task each (`task_id` names a group's task; the sizes tell how many
  rows it has): what the rows of a task share is read once, and multiplied by all of them at once;
- the decoder does only what the text can change (`exporter.decoder`).

Notation: B rows in G groups of R, N slots of the bank, S text tokens, P prompt tokens, D width,
H heads, K width of a head, L layers, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from exporter.decoder import Decoder
from exporter.layers import ACTIVATIONS, MASKED, FeedForward, Norm, SelfAttention, masked_bias
from serve.errors import UserError
from trainer.t5 import FrozenT5, relative_buckets


@dataclass
class PromptKV:
    """Prompts' keys and values before the text.

    Attributes:
        kv: [N, L, 2, H, P, K].
        slots: int64 [G], the slot of each group; None where all rows are one group of the only
            slot.
    """

    kv: Tensor
    slots: Tensor | None

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, each [G, H, P, K]."""
        if self.slots is None:
            return self.kv[:, index, 0], self.kv[:, index, 1]
        slots, layers, two, heads, prompt, narrow = self.kv.shape
        # One row per slot, layer and kind, so that only what the batch reads is copied.
        flat = self.kv.view(slots * layers * two, heads, prompt, narrow)
        first = self.slots * (layers * two) + 2 * index
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
        self.distance_bias = nn.Parameter(table[bucket].contiguous(), requires_grad=False)
        self.reach = reach
        self.layers, self.heads, self.head_width = t5.layers, t5.heads, t5.head_width

    def position(self, before: int, length: int) -> Tensor:
        """Position bias: [H, S, before + S].

        Args:
            before: keys that stand before the text; length: S.
        """
        keys = torch.arange(before + length, device=self.distance_bias.device)
        queries = keys[before:]
        distance = (keys[None, :] - queries[:, None]).clamp(-self.reach, self.reach)
        flat = self.distance_bias.index_select(0, (distance + self.reach).flatten())
        return flat.t().unflatten(1, distance.shape)

    def forward(self, hidden: Tensor, bias: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Encode rows that hold all there is to see: [B, S, D], with bias [B, H, S, S].

        Returns:
            states [B, S, D] after the final norm, and per layer [B, 2, H, S, K], the keys and
            values of what was encoded.
        """
        collected = []
        for index in range(self.layers):
            attention = cast(SelfAttention, self.attention[index])
            query, key, value = attention.project(hidden)
            collected.append(torch.stack((key, value), dim=1))
            context = (query @ key.transpose(-1, -2) + bias).softmax(-1) @ value
            hidden = self.feed[index](attention.join(hidden, context))
        return self.final(hidden), collected

    def behind(self, prompt: PromptKV, text: Tensor, present: Tensor, seen: Tensor) -> Tensor:
        """Encode texts behind their group's prompt.

        Args:
            prompt: gives a layer's keys and values for each group.
            text: [B, S, D].
            present, seen: masks as bias, of the prompts [G, P] and of the texts [G, R, S].

        Returns:
            states [B, S, D] after the final norm.
        """
        before, (groups, _, length) = present.shape[1], seen.shape
        position = self.position(before, length)[:, None]  # [H, 1, S, P + S]
        shared = position[..., :before] + present[:, None, None, None]  # [G, H, 1, S, P]
        own = position[..., before:] + seen[:, None, :, None]  # [G, H, R, S, S]
        hidden = text.view(groups, -1, text.shape[-1])  # the rows of a group on end: [G, RS, D]
        for index in range(self.layers):
            attention = cast(SelfAttention, self.attention[index])
            context = self._look(attention, hidden, shared, own, *prompt.layer(index))
            hidden = self.feed[index](attention.join(hidden, context))
        return self.final(hidden).view(text.shape)

    @staticmethod
    def _look(
        attention: SelfAttention,
        hidden: Tensor,
        shared_bias: Tensor,
        own_bias: Tensor,
        key: Tensor,
        value: Tensor,
    ) -> Tensor:
        """Attention to a group's prompt, key and value [G, H, P, K], and to the row itself: the
        first product has R x S rows for each group and head, which is large where a batch has few
        groups. Returns [G, H, RS, K].
        """
        before, split = key.shape[2], own_bias.shape[:-1]  # G, H, R, S
        parts = attention.project(hidden)  # each [G, H, RS, K]
        own_query, own_key, own_value = (part.reshape(*split, part.shape[-1]) for part in parts)
        first = (parts[0] @ key.transpose(-1, -2)).view(*split, before) + shared_bias
        second = own_query @ own_key.transpose(-1, -2) + own_bias
        weights = torch.cat((first, second), dim=-1).softmax(-1)  # [G, H, R, S, P + S]
        shared = weights[..., :before].reshape(*split[:2], -1, before) @ value
        own = weights[..., before:] @ own_value
        return shared + own.view(shared.shape)


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
            input_ids, attention_mask: int64 [B, S], the rows of a group together; task_id: int64
                [G], the slot of each group; B is a multiple of G, and G = B where no two rows
                are known to be of one task.
            bank: `bank_kv` [N, L, 2, H, P, K] and `bank_states` [N, P, D], or in mode `full`
                `bank_prompts` [N, P, D]; then `bank_length` int64 [N], `label_ids` int64 [N, C].

        Returns:
            [B, C]; padded classes hugely negative.
        """
        *prompts, bank_length, label_ids = bank
        before, (rows, length), groups = self.prompt_tokens, input_ids.shape, task_id.shape[0]
        slots = torch.arange(before, device=input_ids.device)
        lengths = bank_length.index_select(0, task_id)[:, None, None]
        present = masked_bias(slots >= before - lengths, self.shared.dtype)  # left padded
        words = label_ids.index_select(0, task_id)  # [G, C]
        seen = masked_bias(attention_mask.bool(), self.shared.dtype).view(groups, -1, length)
        spread = present.expand(-1, rows // groups, -1)
        masks = torch.cat((spread, seen), dim=-1).view(rows, 1, -1)  # [B, 1, P + S]
        text = functional.embedding(input_ids, self.shared)
        if self.mode == "full":
            copies = prompts[0].index_select(0, task_id)[:, None].expand(-1, rows // groups, -1, -1)
            whole = torch.cat((copies.reshape(rows, before, -1), text), dim=1)
            position = self.encoder.position(0, before + length)
            states, _ = self.encoder(whole, position + masks[:, None])
            decoded = self.decoder(None, states, masks)
        else:
            kv = PromptKV(prompts[0], task_id)
            states = self.encoder.behind(kv, text, present[:, 0], seen)
            shared = prompts[1].index_select(0, task_id)
            decoded = self.decoder(shared, states, masks)  # [B, D]
        columns = functional.embedding(words.clamp(min=0), self.head)  # [G, C, D]
        scores = decoded.view(groups, -1, decoded.shape[-1]) @ columns.transpose(-1, -2)
        return scores.masked_fill((words < 0)[:, None], MASKED[scores.dtype]).flatten(0, 1)


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
        states, kv = self.encoder(prompt[None], bias)
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
                    position = self.encoder.position(0, embeddings.shape[0])
                    states, layers = self.encoder(embeddings[None], position[None])
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
        seen = masked_bias(attention_mask.bool(), prompt.dtype)
        masks = functional.pad(seen, (before, 0))[:, None]  # [B, 1, P + S]
        text = functional.embedding(input_ids, self.shared)
        if self.mode == "full":
            whole = torch.cat((prompt.expand(rows, -1, -1), text), dim=1)
            position = self.encoder.position(0, before + length)
            states, _ = self.encoder(whole, position + masks[:, None])
            decoded = self.decoder(None, states, masks)
        else:
            kv = PromptKV(cast(Tensor, self.kv), None)
            present = torch.zeros_like(prompt[..., 0])
            states = self.encoder.behind(kv, text, present, seen[None])  # all rows are one group
            decoded = self.decoder(prompt, states, masks)
        return decoded @ cast(Tensor, self.word_rows)
