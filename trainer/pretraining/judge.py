"""A judge of single sentences, taught by the labels of whole documents.

A review's label says little about one of its sentences: by the last sentence of a film review a
reader finds its verdict in seven of ten cases. So the judge reads every sentence on its own, gives
it probabilities of five degrees, and only what the sentences of a document say together is compared
with the document's label: multiple-instance learning, as MILNET does it (Angelidis and Lapata 2018,
https://aclanthology.org/Q18-1002). MILNET weighs sentences by attention; what a sentence of little
weight would be judged is then left to chance. Here a sentence weighs as much as it is not neutral,
so one that does not help to tell the label has to be neutral.

The judge's verdicts replace the labels that a bag of words agrees to (`shards`), and its encoder is
a better teacher for opinions than the one that it starts from.

Notation: N sentences of the M documents of a batch, D width.
"""

import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import BertModel

logger = logging.getLogger(__name__)

DEGREES, NEUTRAL = 5, 2  # very negative, negative, neutral, positive, very positive
HEAD = "judge.safetensors"
_TINY = 1e-6
MAX_SENTENCES = 8  # of a document in one step, drawn anew each time
MAX_PIECES = 64  # of a sentence
_STEP = 8  # sentences are padded to a multiple of so many pieces
_CHUNK = 3072


class Judge(nn.Module):
    """A BERT; mean of its last states -> scores of the five degrees."""

    def __init__(self, bert: BertModel) -> None:
        super().__init__()
        self.bert = bert
        self.degrees = nn.Linear(bert.config.hidden_size, DEGREES)
        nn.init.normal_(self.degrees.weight, std=0.02)
        nn.init.zeros_(self.degrees.bias)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.degrees.weight.device

    def forward(self, rows: Sequence[np.ndarray]) -> Tensor:
        """Ids of N sentences of any lengths -> scores [N, 5], before the softmax.

        Sentences of about one length are a group, all groups are one run of tokens: little is
        padded, and only attention looks at groups.
        """
        wide = [math.ceil(len(row) / _STEP) * _STEP for row in rows]
        order = sorted(range(len(rows)), key=wide.__getitem__)
        groups = list(Counter(wide[i] for i in order).items())
        padded = np.zeros(sum(wide), np.int64)
        starts = np.cumsum([0, *(wide[i] for i in order)])
        for start, i in zip(starts, order, strict=False):
            padded[start : start + len(rows[i])] = rows[i]
        device = self.device
        lengths = torch.tensor([len(rows[i]) for i in order]).split([c for _, c in groups])
        masks = [(torch.arange(n) < length[:, None]).to(device)
                 for (n, _), length in zip(groups, lengths, strict=True)]  # fmt: skip
        states = self._encode(torch.from_numpy(padded).to(device), masks)
        means = []
        for part, mask in zip(states.split([m.numel() for m in masks]), masks, strict=True):
            share = mask[..., None].to(part.dtype)
            means.append((part.view(*mask.shape, -1) * share).sum(1) / share.sum(1))
        back = torch.empty(len(order), dtype=torch.long)
        back[torch.tensor(order)] = torch.arange(len(order))
        return self.degrees(torch.cat(means)[back.to(device)]).float()

    def _encode(self, ids: Tensor, masks: Sequence[Tensor]) -> Tensor:
        """BERT's last states [M, D] of M tokens. masks: of the groups in their order, bool [C, S],
        true where a token is no padding."""
        bert: Any = self.bert
        table = bert.embeddings
        places = torch.cat([torch.arange(m.shape[1]).repeat(len(m)) for m in masks]).to(ids.device)
        hidden = table.LayerNorm(table.word_embeddings(ids) + table.position_embeddings(places)
                                 + table.token_type_embeddings.weight[0])  # fmt: skip
        sizes = [mask.numel() for mask in masks]
        for layer in bert.encoder.layer:
            own = layer.attention.self
            heads, scale = own.num_attention_heads, own.attention_head_size**-0.5
            split = [made.split(sizes) for made in
                     (own.query(hidden) * scale, own.key(hidden), own.value(hidden))]  # fmt: skip
            context = []
            for parts, mask in zip(zip(*split, strict=True), masks, strict=True):
                query, key, value = (part.view(*mask.shape, heads, -1).transpose(1, 2)
                                     for part in parts)  # fmt: skip
                scores = query @ key.transpose(-1, -2)
                scores = scores.masked_fill(~mask[:, None, None], torch.finfo(scores.dtype).min)
                mixed = scores.softmax(-1).to(value.dtype) @ value
                context.append(mixed.transpose(1, 2).reshape(mask.numel(), -1))
            output = layer.attention.output
            hidden = output.LayerNorm(output.dense(torch.cat(context)) + hidden)
            hidden = layer.output.LayerNorm(layer.output.dense(layer.intermediate(hidden)) + hidden)
        return hidden


def pieces(tokenizer: Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """Ids with [CLS] and [SEP], at most MAX_PIECES; uint16, since a corpus of them is kept."""
    found = [e.ids for e in tokenizer.encode_batch_fast(list(texts), add_special_tokens=True)]
    cut = [ids if len(ids) <= MAX_PIECES else [*ids[: MAX_PIECES - 1], ids[-1]] for ids in found]
    return [np.array(ids, np.uint16) for ids in cut]


def document_loss(scores: Tensor, document: Tensor, allowed: Tensor) -> Tensor:
    """Mean negative log-likelihood of the documents' labels.

    A document with a verdict holds an opinion (one of its sentences is not neutral), and its label
    is that of one of its opinions drawn at random: P = (1 - prod_i n_i) * sum_i a_i / sum_i (1 -
    n_i), where n_i is the probability that sentence i is neutral and a_i that it is an opinion that
    agrees. Of a neutral document P is the mean of what its sentences agree.

    scores [N, 5]; document [N]: which of the M documents a sentence is of; allowed [M, 5]: how far
    a degree agrees with the document's label, 0 to 1, with 1 at the middle in neutral documents.
    """
    count = len(allowed)
    verdict = scores.softmax(-1)
    neutral = verdict[:, NEUTRAL]
    agrees = (verdict * allowed[document]).sum(-1)
    opinion = 1 - neutral
    total = scores.new_zeros(4, count).index_add(
        1, document, torch.stack((agrees, opinion, neutral.clamp(min=_TINY).log(),
                                  torch.ones_like(neutral))))  # fmt: skip
    agreed, opinions, silent, sentences = total
    some = 1 - silent.clamp(max=-_TINY).exp()  # at least one opinion
    probability = torch.where(allowed[:, NEUTRAL] == 1, agreed / sentences,
                              some * agreed / opinions.clamp(min=_TINY))  # fmt: skip
    return -probability.clamp(min=_TINY).log().mean()


@dataclass(frozen=True)
class Document:
    """Sentences as pieces, and how far each degree agrees with the label."""

    rows: list[np.ndarray]
    allowed: tuple[float, ...]


def allowed_degrees(columns: dict[str, int]) -> tuple[float, ...] | None:
    """A document's classes -> agreement of the five degrees; None where no class is an opinion.

    `star` names a degree (its neighbours agree by half with the middle one), `polarity` its two
    degrees, and `tone` 1 is neutral.
    """
    if (star := columns.get("star", -1)) == NEUTRAL:
        return (0.0, 0.5, 1.0, 0.5, 0.0)
    if star >= 0:
        return tuple(float(i == star) for i in range(DEGREES))
    if (side := columns.get("polarity", -1)) >= 0:
        return (1.0, 1.0, 0.0, 0.0, 0.0) if side == 0 else (0.0, 0.0, 0.0, 1.0, 1.0)
    if columns.get("tone", -1) == 1:
        return (0.0, 0.0, 1.0, 0.0, 0.0)
    return None


@dataclass(frozen=True)
class JudgeSchedule:
    """rate: AdamW's peak rate of the encoder, ten times that for the head; tokens: of a process's
    batch; epochs: over all documents; warmup: share of the run."""

    rate: float = 1.5e-4
    tokens: int = 4096
    epochs: float = 0.5
    warmup: float = 0.06

    def factor(self, done: float) -> float:
        """Linear warm-up, linear decay to zero; done: 0 to 1."""
        return min(1.0, done / self.warmup + 0.01) * (1.0 - done)


class Batches:
    """Documents in batches of about `tokens`, in an order that seed and epoch decide.

    Of a long document another MAX_SENTENCES are drawn each epoch."""

    def __init__(self, documents: Sequence[Document], tokens: int, seed: int) -> None:
        self.documents, self.seed = documents, seed
        self.sizes = np.array([self._size(d) for d in documents])
        self.count = max(1, int(self.sizes.sum()) // tokens)  # of an epoch
        self._epoch = -1
        self._parts: list[np.ndarray] = []

    @staticmethod
    def _size(document: Document) -> int:
        lengths = sum(len(row) for row in document.rows)
        return max(1, round(lengths * min(1.0, MAX_SENTENCES / len(document.rows))))

    def __call__(self, index: int) -> list[Document]:
        """Batch number `index`, counted through all epochs."""
        epoch, place = divmod(index, self.count)
        if epoch != self._epoch:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.documents))
            ends = np.cumsum(self.sizes[order])
            cuts = np.searchsorted(ends, np.arange(1, self.count) * ends[-1] / self.count)
            self._epoch, self._parts = epoch, np.split(order, cuts)
        rng = np.random.default_rng([self.seed, epoch, place])
        return [self._some(self.documents[i], rng) for i in self._parts[place]]

    @staticmethod
    def _some(document: Document, rng: np.random.Generator) -> Document:
        if len(document.rows) <= MAX_SENTENCES:
            return document
        chosen = np.sort(rng.permutation(len(document.rows))[:MAX_SENTENCES])
        return Document([document.rows[i] for i in chosen], document.allowed)


def batch_loss(judge: Judge, documents: Sequence[Document]) -> tuple[Tensor, int]:
    """(`document_loss` of some documents, their number of pieces)."""
    rows = [row for document in documents for row in document.rows]
    scores = judge(rows)
    number = torch.tensor([i for i, d in enumerate(documents) for _ in d.rows])
    allowed = torch.tensor([d.allowed for d in documents])
    loss = document_loss(scores, number.to(scores.device), allowed.to(scores.device))
    return loss, sum(map(len, rows))
