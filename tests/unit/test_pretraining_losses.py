"""The losses of a batch against plain ones: transformers' own forward, and sums over rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pretraining_toy import make_tokenizer, pools, setting
from tokenizers import Tokenizer

from trainer.pretraining.losses import Auxiliary, batch_loss, layer_distance
from trainer.pretraining.mixture import Batch, Mixture
from trainer.t5 import FrozenT5


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


def test_silent_prompts_do_not_touch_the_bank(tokenizer: Tokenizer) -> None:
    t5, auxiliary, mixture = setting(tokenizer)
    batch = next(b for b in (mixture.batch(s, {"prefix": 1.0}) for s in range(99))
                 if (b.tasks < 0).any() and (b.tasks >= 0).any())  # fmt: skip
    batch_loss(t5, auxiliary, batch, None, 0.0, 0.0).loss.backward()
    touched = set(auxiliary.prompts.grad.abs().sum((1, 2)).nonzero()[:, 0].tolist())
    assert touched == set(batch.tasks[batch.tasks >= 0].tolist())


def plain_logits(t5: FrozenT5, batch: Batch) -> torch.Tensor:
    """transformers' own logits [B, V] where the answer stands."""
    start = torch.tensor([[0, 3]]).expand(len(batch.ids), -1)
    return t5.model(input_ids=batch.ids, attention_mask=batch.mask.long(),
                    decoder_input_ids=start).logits[:, -1]  # fmt: skip


def test_loss_of_a_restricted_row_is_the_softmax_over_its_words(tokenizer: Tokenizer) -> None:
    t5, auxiliary, mixture = setting(tokenizer)
    batch = mixture.batch(0, {"words": 1.0})
    batch.restricted = torch.ones(len(batch.ids), dtype=torch.bool)
    with torch.no_grad():
        found = batch_loss(t5, auxiliary, batch, None, 0.0, 0.0).answer
        logits = plain_logits(t5, batch)
    plain = []
    for row, words, c in zip(logits, batch.words, batch.classes, strict=True):
        own = torch.tensor([row[w] for w in words if w >= 0])
        plain.append(float(-own.log_softmax(0)[c]))
    assert found == pytest.approx(np.mean(plain), rel=1e-4)


def test_a_judges_degrees_are_what_is_answered(tokenizer: Tokenizer) -> None:
    known = pools()
    degrees = np.random.default_rng(1).dirichlet(np.ones(5), len(known["reviews"]))
    known["reviews"].degrees = np.round(255 * degrees).astype(np.uint8)
    mixture = Mixture(known, tokenizer, 200, seed=3)
    t5, auxiliary, _ = setting(tokenizer)
    batch = mixture.batch(0, {"words": 1.0})
    judged = [c in ("polarity", "tone", "star") for c in batch.columns]
    assert any(judged)
    rounded = known["reviews"].degrees / 255
    low, middle, high = rounded[:, :2].sum(1), rounded[:, 2], rounded[:, 3:].sum(1)
    possible = {"polarity": np.stack([low + middle / 2, high + middle / 2], 1),
                "tone": np.stack([low, middle, high], 1), "star": rounded}  # fmt: skip
    for column, target in zip(batch.columns, batch.targets, strict=True):
        if column in possible:
            table = possible[column] / possible[column].sum(1, keepdims=True)
            nearest = np.abs(table - target[: table.shape[1]].numpy()).sum(1).min()
            assert nearest < 1e-6
    with torch.no_grad():
        found = batch_loss(t5, auxiliary, batch, None, 0.0, 0.0).answer
        logits = plain_logits(t5, batch)
    plain = []
    for row, words, target, alone in zip(
        logits, batch.words, batch.targets, batch.restricted, strict=True
    ):
        ids = [int(w) for w in words if w >= 0]
        among = ids if alone else auxiliary.candidates.tolist()
        total = torch.logsumexp(row[among], 0)
        plain.append(-sum(float(t * (row[w] - total)) for w, t in zip(ids, target, strict=False)))
    assert found == pytest.approx(np.mean(plain), rel=1e-4)


def text_states(t5: FrozenT5, auxiliary: Auxiliary, batch: Batch) -> torch.Tensor:
    """transformers' own encoder states [B, S, D] of the texts, behind the soft prompts of kind
    `full`."""
    embedded, mask = t5.model.shared(batch.ids), batch.mask
    if batch.kind == "full":
        assert batch.tasks is not None and batch.random is not None
        each = len(batch.ids) // len(batch.tasks)
        prompts = torch.stack([
            t5.model.shared(batch.random[group])
            if task < 0 else auxiliary.prompts[task, : batch.prompt_length]
            for group, task in enumerate(batch.tasks.tolist()) for _ in range(each)
        ])  # fmt: skip
        embedded = torch.cat((prompts, embedded), 1)
        mask = torch.cat((mask.new_ones(prompts.shape[:2]), mask), 1)
    states = t5.model.encoder(inputs_embeds=embedded, attention_mask=mask.long()).last_hidden_state
    return states[:, states.shape[1] - batch.ids.shape[1] :]


@pytest.mark.parametrize("kind", ["words", "full"])
def test_heads_judge_the_mean_state_of_a_text_beside_the_answer(
    tokenizer: Tokenizer, kind: str
) -> None:
    t5, auxiliary, mixture = setting(tokenizer)
    batch = mixture.batch(1, {kind: 1.0})
    assert batch.columns is not None and batch.targets is not None
    assert not batch.mask.all()  # the padding of a short text is no part of it
    with torch.no_grad():
        result = batch_loss(t5, auxiliary, batch, None, 0.7, 0.0)
        states = text_states(t5, auxiliary, batch)
        plain = []
        for row, column in enumerate(batch.columns):
            pooled = states[row][batch.mask[row]].mean(0)
            own = auxiliary.heads[column](pooled).log_softmax(0)
            pairs = zip(own.tolist(), batch.targets[row].tolist(), strict=False)
            plain.append(-sum(value * wanted for value, wanted in pairs))
    assert float(result.loss) == pytest.approx(result.answer + 0.7 * np.mean(plain), rel=1e-5)


def test_distance_is_the_mean_angle_of_centred_states_where_texts_are() -> None:
    torch.manual_seed(0)
    hidden = tuple(torch.randn(3, 5, 8) + 2.0 for _ in range(3))  # what all numbers share is left
    targets = [torch.nn.functional.layer_norm(torch.randn(3, 5, 8), (8,)) for _ in range(3)]
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]], dtype=torch.bool)
    plain = []
    for state, target in zip(hidden, targets, strict=True):
        for row, place in mask.nonzero().tolist():
            a, b = state[row, place].double().numpy(), target[row, place].double().numpy()
            a = a - a.mean()
            plain.append(1 - a @ b / np.sqrt((a @ a) * (b @ b)))
    assert float(layer_distance(hidden, targets, mask)) == pytest.approx(np.mean(plain), rel=1e-5)


def test_the_distance_to_the_teacher_is_added_to_the_loss(tokenizer: Tokenizer) -> None:
    t5, auxiliary, mixture = setting(tokenizer)
    batch = mixture.batch(0, {"distil": 1.0})

    def teacher(ids: torch.Tensor, mask: torch.Tensor) -> tuple[list[torch.Tensor], list[Any]]:
        generator = torch.Generator().manual_seed(0)
        shape = (*ids.shape, 32)
        return [torch.randn(shape, generator=generator) for _ in range(3)], []

    with torch.no_grad():
        found = batch_loss(t5, auxiliary, batch, teacher, 0.5, 3.0)  # type: ignore[arg-type]
        hidden = t5.model.encoder(
            input_ids=batch.ids, attention_mask=batch.mask.long(), output_hidden_states=True
        ).hidden_states
        distance = float(layer_distance(hidden, teacher(batch.ids, batch.mask)[0], batch.mask))
        heads = float(auxiliary.loss(hidden[-1], batch.mask, batch))
    assert found.distance == pytest.approx(distance, rel=1e-5) and distance > 0.5
    want = found.answer + 0.5 * heads + 3.0 * distance
    assert float(found.loss) == pytest.approx(want, rel=1e-5)
