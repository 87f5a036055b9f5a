"""Texts tokenised once and kept in memory, and scored in batches of similar length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from trainer.backbone import Backbone
from trainer.loop import Score
from trainer.meta import ScoreFn, Stages
from trainer.modes import Params, add_group, steer
from trainer.readout import Batch, class_scores, collate, compile_template, encode_texts, word_ids
from trainer.t5 import Segment
from trainer.tasks import Task

ROW_TOKENS = 8192  # tokens of a batch in evaluation: bounds memory, fills two cores and a GPU


class Rows:
    """Labelled texts as token ids.

    Args:
        texts: N texts; labels: [N] class numbers.
    """

    def __init__(
        self,
        backbone: Backbone,
        template: str,
        texts: Sequence[str],
        labels: np.ndarray | Sequence[int],
        max_tokens: int,
    ):
        compiled = compile_template(backbone.tokenizer, template)
        self.ids = encode_texts(backbone.tokenizer, compiled, texts, max_tokens)
        self.labels = np.asarray(labels, dtype=np.int64)
        self.device = backbone.device

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """The rows of these numbers, in this order, on the backbone's device."""
        return self.collated(indices).to(self.device)

    def collated(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """The same, on the CPU."""
        return collate([self.ids[i] for i in indices], self.labels[indices])

    def by_length(self, tokens: int = ROW_TOKENS) -> Iterator[np.ndarray]:
        """Row numbers in batches of similar length, each under a budget of tokens."""
        lengths = np.array([len(row) for row in self.ids])
        order = np.argsort(lengths, kind="stable")
        start = 0
        while start < len(order):
            stop = start + 1
            while stop < len(order) and (stop + 1 - start) * lengths[order[stop]] <= tokens:
                stop += 1
            yield order[start:stop]
            start = stop


class Scorer:
    """Class scores of a task on a backbone, under whatever prompt is given.

    Args:
        words: the label words; mode: an attention mode, or "none" for the backbone alone.
    """

    def __init__(self, backbone: Backbone, words: Sequence[str], mode: str):
        self.backbone, self.mode = backbone, mode
        self.words = torch.tensor(word_ids(backbone.tokenizer, words), device=backbone.device)
        self.decoder_ids = backbone.decoder_ids
        if mode != "none":
            steer(mode)  # an unknown mode is named before any work

    @classmethod
    def of(cls, backbone: Backbone, task: Task, mode: str) -> Scorer:
        """The scorer of a task's label words."""
        return cls(backbone, task.words, mode)

    def __call__(self, params: Params, batch: Batch) -> Tensor:
        """Scores [B, C] under params with a group axis (ignored by mode "none")."""
        t5 = self.backbone.t5
        if self.mode == "none":
            states = t5.encode(t5.embed(batch.ids), batch.mask)
            memory = [Segment(states[None], batch.mask[None])]
            return t5.scores(t5.decode(self.decoder_ids, memory), self.words)
        return class_scores(t5, self.mode, params, batch, self.words, self.decoder_ids)

    def stages(self) -> Stages | None:
        """The score in two stages, in mode `prefix`: a prompt's constants, then the texts."""
        if self.mode != "prefix":
            return None
        second = Scorer.__new__(Scorer)  # the words are looked up already
        second.__dict__.update(self.__dict__, mode="constants")

        def constants(params: Params) -> Params:
            kv, states = self.backbone.t5.prefix(params["prompt_embeddings"])
            return {"kv": kv, "states": states}

        return Stages(constants, second)

    @torch.no_grad()
    def all(
        self, params: Params, rows: Rows, progress: Callable[[int], object] | None = None
    ) -> Tensor:
        """Scores [N, C] of all rows under one prompt (without a group axis), on the CPU."""
        scores = torch.empty(len(rows), len(self.words))
        grouped: Params = add_group(params)
        scorer: ScoreFn = self
        if (stages := self.stages()) is not None:  # the prompt's constants once, not once a batch
            grouped, scorer = stages.constants(grouped), stages.score
        for indices in rows.by_length():
            scores[torch.from_numpy(indices)] = scorer(grouped, rows.batch(indices)).float().cpu()
            if progress is not None:
                progress(len(indices))
        return scores

    def score(self, params: Params, rows: Rows) -> Score:
        """Accuracy and mean cross-entropy over all rows."""
        scores = self.all(params, rows)
        labels = torch.from_numpy(rows.labels)
        loss = torch.nn.functional.cross_entropy(scores, labels)
        return Score(float((scores.argmax(-1) == labels).float().mean()), float(loss))
