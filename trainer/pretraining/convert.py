"""A post-LayerNorm BERT becomes a pre-RMSNorm T5 encoder, in closed form.

T5 has no biases, no mean subtraction and no absolute positions. What makes the change possible:

- BERT's hidden states, taken before a LayerNorm's gain and bias, have zero mean, so they leave
  the all-ones direction free. A constant there is a bias for every linear map that reads it.
- A LayerNorm scales each state anew, and so does the RMS norm in front of the next layer: the
  stream may hold any multiple of BERT's state.

Layer by layer, on a few thousand sentences, ridge least squares fits each matrix from what the
student really holds at that place (errors of earlier layers included) to what the teacher
computes there: queries, keys, values and the feed-forward input to BERT's values before the
activation, the two output matrices to the step that brings the stream to BERT's next state.
Relative position bias is the mean of BERT's attention scores left over at each distance.

Notation: N tokens of all sentences together, D model width, H heads, K width of a head.
"""

import logging
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import T5ForConditionalGeneration

from trainer.pretraining.teacher import Teacher, plain
from trainer.t5 import relative_buckets

logger = logging.getLogger(__name__)


@dataclass
class Report:
    """Cosine of student and teacher states per layer (embeddings first), mean over tokens."""

    cosine: list[float]


def ridge(inputs: Tensor, targets: Tensor, strength: float = 1e-4) -> Tensor:
    """argmin_W |inputs W^T - targets|^2 + strength * N * mean-square(inputs) * |W|^2.

    inputs [N, I], targets [N, O] -> W [O, I], solved in double precision.
    """
    x, y = inputs.double(), targets.double()
    gram = x.T @ x
    gram.diagonal().add_(strength * gram.diagonal().mean())
    return torch.linalg.solve(gram, x.T @ y).T.to(inputs.dtype)


def _rms(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def _centred(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


@torch.no_grad()
def convert(
    model: T5ForConditionalGeneration,
    teacher: Teacher,
    batches: list[tuple[Tensor, Tensor]],
    deviation: float = 0.25,
    carrier: float = 0.5,
) -> Report:
    """Overwrite the encoder and the embeddings of `model` by the teacher's, as described above.

    batches: (ids, mask) [B, S] pairs of real sentences; a hundred of 32 x 32 are plenty.
    deviation: standard deviation of the embedding rows; soft prompts live at this scale, and an
    optimiser step of 3e-3 must be able to move them.
    carrier: the constant along the all-ones direction, relative to a state of unit variance.
    """
    config: Any = model.config
    bert, encoder = teacher.bert, cast(Any, model.encoder)
    eps = config.layer_norm_epsilon
    _embeddings(model, teacher, deviation, carrier)
    targets, scores = _collect(teacher, batches)
    flat_mask = torch.cat([m.flatten() for _, m in batches]).bool()
    stream = torch.cat([model.shared(ids).flatten(0, 1) for ids, _ in batches])[flat_mask]
    stream /= deviation  # unit scale while fitting
    constant = torch.ones(config.d_model) * carrier
    scale = 1.0  # the stream is scale * (BERT's state + constant)
    bias = _position_bias(model, scores, batches)
    cosine = [_cosine(stream, targets[0])]
    weights = teacher.bert.encoder.layer
    for index, block in enumerate(encoder.block):
        layer = weights[index]
        attention, feed = block.layer[0].SelfAttention, block.layer[1].DenseReluDense
        block.layer[0].layer_norm.weight.fill_(1.0)
        block.layer[1].layer_norm.weight.fill_(1.0)
        gain = bert.embeddings.LayerNorm if index == 0 else weights[index - 1].output.LayerNorm
        hidden = targets[index] * gain.weight + gain.bias  # BERT's own state, [N, D]
        own, theirs = layer.attention, layer.attention.self
        normed = _rms(stream, eps)
        width = config.d_kv**-0.5
        attention.q.weight.copy_(ridge(normed, theirs.query(hidden) * width))
        attention.k.weight.copy_(ridge(normed, theirs.key(hidden)))
        attention.v.weight.copy_(ridge(normed, theirs.value(hidden)))
        context = _attend(attention, normed, batches, flat_mask, bias)
        middle, spread = _post(
            layer,
            hidden,
            scores_context=_teacher_context(layer, hidden, scores[index], batches, flat_mask),
        )
        scale *= float(spread / gain.weight.mean())
        stream = _step(attention.o, context, stream, scale * (middle + constant), deviation)
        inner_gain = own.output.LayerNorm
        inner = middle * inner_gain.weight + inner_gain.bias
        normed = _rms(stream, eps)
        feed.wi.weight.copy_(ridge(normed, layer.intermediate.dense(inner)))
        active = feed.act(normed @ feed.wi.weight.T)
        before = layer.output.dense(layer.intermediate(inner)) + inner
        scale *= float(before.std(-1).mean() / inner_gain.weight.mean())
        stream = _step(feed.wo, active, stream, scale * (targets[index + 1] + constant), deviation)
        cosine.append(_cosine(stream, targets[index + 1]))
    encoder.final_layer_norm.weight.fill_(1.0)
    logger.info("cosine to the teacher by layer: %s", " ".join(f"{c:.3f}" for c in cosine))
    return Report(cosine)


def _step(linear: nn.Linear, inputs: Tensor, stream: Tensor, target: Tensor, deviation: float
          ) -> Tensor:  # fmt: skip
    """Fit `linear` to the step towards `target` and take it; its weights work at `deviation`."""
    weight = ridge(inputs, target - stream)
    linear.weight.copy_(weight * deviation)
    return stream + inputs @ weight.T


def _cosine(stream: Tensor, target: Tensor) -> float:
    return float(torch.cosine_similarity(_centred(stream), target, dim=-1).mean())


def _embeddings(model: T5ForConditionalGeneration, teacher: Teacher, deviation: float,
                carrier: float) -> None:  # fmt: skip
    table = teacher.bert.embeddings
    known = table.word_embeddings.weight[teacher.table]  # type: ignore[index]
    # Positions 1 to 32 stand for all: sentences are that long, and T5 has relative ones.
    place = table.position_embeddings.weight[1:33].mean(0) + table.token_type_embeddings.weight[0]
    rows = plain(known + place) + carrier
    rows[3:103] += 0.1 * torch.randn(100, rows.shape[1], generator=torch.Generator().manual_seed(0))
    model.shared.weight.zero_()
    model.shared.weight[: len(rows)] = rows * deviation


def _collect(teacher: Teacher, batches: list[tuple[Tensor, Tensor]]
             ) -> tuple[list[Tensor], list[list[Tensor]]]:  # fmt: skip
    """L + 1 states [N, D] and L lists of score tensors [B, H, S, S]."""
    states: list[list[Tensor]] = []
    scores: list[list[Tensor]] = []
    for ids, mask in batches:
        hidden, score = teacher(ids, mask, attentions=True)
        states.append([h.flatten(0, 1)[mask.flatten().bool()] for h in hidden])
        scores.append(score)
    return ([torch.cat(column) for column in zip(*states, strict=True)],
            [list(column) for column in zip(*scores, strict=True)])  # fmt: skip


def _rows(flat: Tensor, batches: list[tuple[Tensor, Tensor]], flat_mask: Tensor) -> list[Tensor]:
    """[N, D] tokens back into padded [B, S, D] batches."""
    whole = flat.new_zeros(len(flat_mask), flat.shape[1])
    whole[flat_mask] = flat
    parts = whole.split([m.numel() for _, m in batches])
    return [p.view(*m.shape, -1) for p, (_, m) in zip(parts, batches, strict=True)]


def _mix(scores: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """softmax(scores [B, H, S, S]) over values [B, S, H*K] -> [B, S, H*K]."""
    heads = scores.shape[1]
    scores = scores.masked_fill(~mask.bool()[:, None, None], torch.finfo(scores.dtype).min)
    split = values.unflatten(-1, (heads, -1)).transpose(1, 2)
    return (scores.softmax(-1) @ split).transpose(1, 2).flatten(2)


def _attend(attention: Any, normed: Tensor, batches: list[tuple[Tensor, Tensor]],
            flat_mask: Tensor, bias: dict[int, Tensor]) -> Tensor:  # fmt: skip
    found = []
    for rows, (_, mask) in zip(_rows(normed, batches, flat_mask), batches, strict=True):
        heads = attention.n_heads
        q = attention.q(rows).unflatten(-1, (heads, -1)).transpose(1, 2)
        k = attention.k(rows).unflatten(-1, (heads, -1)).transpose(1, 2)
        scores = q @ k.transpose(-1, -2) + bias[rows.shape[1]]
        found.append(_mix(scores, attention.v(rows), mask).flatten(0, 1)[mask.flatten().bool()])
    return torch.cat(found)


def _teacher_context(
    layer: Any,
    hidden: Tensor,
    scores: list[Tensor],
    batches: list[tuple[Tensor, Tensor]],
    flat_mask: Tensor,
) -> Tensor:
    """BERT's attention without [CLS] (which the student lacks), [N, D]."""
    found = []
    for rows, score, (_, mask) in zip(
        _rows(layer.attention.self.value(hidden), batches, flat_mask), scores, batches, strict=True
    ):
        found.append(_mix(score, rows, mask).flatten(0, 1)[mask.flatten().bool()])
    return torch.cat(found)


def _post(layer: Any, hidden: Tensor, scores_context: Tensor) -> tuple[Tensor, Tensor]:
    """BERT's state after its attention, before gain and bias, and its mean spread before it."""
    before = layer.attention.output.dense(scores_context) + hidden
    return plain(before), before.std(-1).mean()


def _position_bias(model: T5ForConditionalGeneration, scores: list[list[Tensor]],
                   batches: list[tuple[Tensor, Tensor]]) -> dict[int, Tensor]:  # fmt: skip
    """Set T5's table to the scores' mean by distance; returns length -> bias [H, S, S].

    T5 shares one table between its layers, so layers are averaged. A row's mean does not change
    its softmax and is taken away first. Half the difference is given: part of it is already in
    the fitted queries and keys.
    """
    config = model.config
    encoder: Any = model.encoder
    table = encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    total, count = torch.zeros_like(table), torch.zeros(len(table), 1)

    def buckets(length: int) -> Tensor:
        place = torch.arange(length)
        return relative_buckets(place[None] - place[:, None], bidirectional=True,
                                buckets=config.relative_attention_num_buckets,
                                max_distance=config.relative_attention_max_distance)  # fmt: skip

    for column in scores:
        for score, (_, mask) in zip(column, batches, strict=True):
            pair = (mask[:, None, :, None] * mask[:, None, None, :]).float()
            score = (score - (score * pair).sum(-1, keepdim=True)
                     / pair.sum(-1, keepdim=True).clamp(min=1)) * pair  # fmt: skip
            index = buckets(score.shape[-1]).flatten()
            total.index_add_(0, index, score.sum(0).flatten(1).T)
            count.index_add_(0, index, pair.sum(0).flatten(1).T)
    table.copy_(0.5 * total / count.clamp(min=1))
    lengths = {mask.shape[1] for _, mask in batches}
    return {n: table[buckets(n)].permute(2, 0, 1) for n in lengths}
