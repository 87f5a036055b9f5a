"""The losses of one batch, over the functional T5 of `trainer.t5`."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.modes import steer_full, steer_prefix
from trainer.pretraining.corruption import FIRST_SENTINEL
from trainer.pretraining.mixture import Batch
from trainer.pretraining.teacher import Teacher
from trainer.pretraining.wordings import QUESTIONS
from trainer.t5 import FrozenT5, Segment


class Auxiliary(nn.Module):
    """What is trained beside the backbone and thrown away, or shipped apart: soft prompts of the
    tasks [T, 100, D], and a mean-pooled classification head per question on the encoder.

    candidates: sorted ids of every label word, [A]; answers are told from each other."""

    candidates: Tensor

    def __init__(self, prompts: Tensor, width: int, candidates: Tensor) -> None:
        super().__init__()
        self.register_buffer("candidates", candidates, persistent=False)
        self.prompts = nn.Parameter(prompts)
        sizes = {q.column: max(len(w) for w in q.words) for q in QUESTIONS}
        self.heads = nn.ModuleDict({name: nn.Linear(width, size) for name, size in sizes.items()})

    def loss(self, states: Tensor, mask: Tensor, batch: Batch) -> Tensor:
        """Mean cross-entropy of the heads on the mean of `states` [B, S, D]."""
        weights = mask.to(states.dtype)[..., None]
        pooled = (states * weights).sum(1) / weights.sum(1)
        assert batch.columns is not None and batch.targets is not None
        total = pooled.new_zeros(())
        # What texts are about has no head: its classes are others in every question.
        for name in sorted(set(batch.columns) & set(self.heads)):
            rows = torch.tensor([c == name for c in batch.columns], device=pooled.device)
            logits = self.heads[name](pooled[rows])
            wanted = batch.targets[rows][:, : logits.shape[1]].to(logits.dtype)
            total = total + F.cross_entropy(logits, wanted, reduction="sum")
        return total / len(batch.columns)


@dataclass
class Result:
    """loss: what is differentiated; answer: cross-entropy a target token; right: share of rows
    whose best label word is the right one (nan for kind `span`); distance: to the teacher."""

    loss: Tensor
    answer: float
    right: float
    distance: float = float("nan")


def batch_loss(t5: FrozenT5, auxiliary: Auxiliary, batch: Batch, teacher: Teacher | None,
               aux_weight: float, distil_weight: float) -> Result:  # fmt: skip
    """The loss of one batch of any kind."""
    if batch.kind == "span":
        loss = t5.model(input_ids=batch.ids, attention_mask=batch.mask.long(),
                        labels=batch.labels).loss  # fmt: skip
        return Result(loss, loss.item(), float("nan"))
    distance = t5.model.shared.weight.new_zeros(())
    if batch.kind == "distil" and teacher is not None:
        hidden = t5.model.encoder(input_ids=batch.ids, attention_mask=batch.mask.long(),
                                  output_hidden_states=True).hidden_states  # fmt: skip
        distance = layer_distance(hidden, teacher(batch.ids, batch.mask.long())[0], batch.mask)
        memory = [Segment(hidden[-1][:, None], batch.mask[:, None])]
        text_states = hidden[-1]
    else:
        embedded = t5.embed(batch.ids)
        if batch.tasks is None:
            text_states = t5.encode(embedded, batch.mask)
            memory = [Segment(text_states[:, None], batch.mask[:, None])]
        else:
            prompts = auxiliary.prompts[batch.tasks.clamp(min=0), : batch.prompt_length]
            assert batch.random is not None
            prompts = torch.where((batch.tasks < 0)[:, None, None], t5.embed(batch.random), prompts)
            method = steer_full if batch.kind == "full" else steer_prefix
            memory = method(t5, {"prompt_embeddings": prompts}, embedded, batch.mask)
            last = memory[-1].states.flatten(0, 1)
            text_states = last[:, -batch.ids.shape[1] :]
    start = torch.tensor([0, FIRST_SENTINEL], device=batch.ids.device)
    decoded = t5.decode(start, memory)
    assert batch.words is not None and batch.classes is not None and batch.targets is not None
    # Only against the other label words: against the whole vocabulary every rare row gets a tiny
    # push away from the answer, which Adam blows up to a full step. Kind `span` has the whole.
    logits = t5.scores(decoded, auxiliary.candidates).float()
    known = torch.searchsorted(auxiliary.candidates, batch.words.clamp(min=0))
    chosen = logits.gather(1, known).masked_fill(batch.words < 0, -1e9)
    likelihoods = logits.log_softmax(-1).gather(1, known)
    if batch.restricted is not None:
        own = chosen.log_softmax(-1)
        likelihoods = torch.where(batch.restricted[:, None], own, likelihoods)
    answer = -(batch.targets * likelihoods).sum(1).mean()
    with torch.no_grad():
        right = (chosen.argmax(1) == batch.classes).float().mean().item()
    loss = answer + aux_weight * auxiliary.loss(text_states, batch.mask, batch)
    loss = loss + distil_weight * distance
    return Result(loss, answer.item(), right, distance.item())


def layer_distance(hidden: tuple[Tensor, ...], targets: list[Tensor], mask: Tensor) -> Tensor:
    """1 - cosine of student and teacher states, mean over tokens and layers.

    hidden: L + 1 of [B, S, D]; the student's all-ones direction carries biases and is left out.
    """
    total = hidden[0].new_zeros(())
    for state, target in zip(hidden, targets, strict=True):
        state = state - state.mean(-1, keepdim=True)
        total = total + (1 - F.cosine_similarity(state, target, dim=-1))[mask].mean()
    return total / len(targets)
