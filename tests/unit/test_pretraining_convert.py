"""The closed-form conversion: exact where T5 can express BERT, close where it cannot."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import BertConfig, BertModel

from trainer.pretraining.command import start_model
from trainer.pretraining.config import BackboneConfig
from trainer.pretraining.convert import convert, ridge
from trainer.pretraining.model import new_model
from trainer.pretraining.shards import Pool
from trainer.pretraining.teacher import Teacher

VOCABULARY, WIDTH = 300, 32


def make_teacher(layers: int, seed: int = 0) -> Teacher:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=layers, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=64, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    config._attn_implementation = "eager"
    bert = BertModel(config, add_pooling_layer=False)
    with torch.no_grad():
        for name, value in bert.named_parameters():
            if "LayerNorm" in name or name.endswith("bias"):
                value.add_(0.1 * torch.randn_like(value))
            elif "position" in name:
                value.zero_()  # what T5 has no place for
            else:
                value.mul_(4.0)
    return Teacher(bert, list(range(VOCABULARY)), cls=2)


def batches(count: int, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        length = int(torch.randint(6, 20, (1,), generator=generator))
        ids = torch.randint(103, VOCABULARY, (16, length), generator=generator)
        mask = torch.ones(16, length, dtype=torch.long)
        mask[::2, length - 3 :] = 0
        found.append((ids, mask))
    return found


def student(layers: int) -> torch.nn.Module:
    return new_model(VOCABULARY, width=WIDTH, layers=layers, decoder_layers=1, heads=4,
                     feed_forward=64, deviation=0.25, seed=0)  # fmt: skip


def test_ridge_finds_a_linear_map() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(200, 8, generator=generator)
    weight = torch.randn(3, 8, generator=generator)
    found = ridge(inputs, inputs @ weight.T, strength=1e-9)
    torch.testing.assert_close(found, weight, atol=1e-5, rtol=1e-4)


def test_ridge_matches_the_normal_equations() -> None:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(50, 4, generator=generator, dtype=torch.float64)
    targets = torch.randn(50, 2, generator=generator, dtype=torch.float64)
    gram = inputs.T @ inputs
    plain = torch.inverse(gram + 0.1 * gram.diagonal().mean() * torch.eye(4)) @ inputs.T @ targets
    torch.testing.assert_close(ridge(inputs, targets, 0.1), plain.T)


def test_embeddings_carry_over_exactly() -> None:
    teacher, model = make_teacher(1), student(1)
    convert(model, teacher, batches(20, 0))
    # Without positions the embeddings are a function of the piece alone. Sentinels are jittered.
    ids = torch.arange(103, VOCABULARY - 1).view(4, -1)
    ours = model.shared(ids)
    theirs = teacher(ids, torch.ones_like(ids))[0][0]
    cosine = torch.cosine_similarity(ours - ours.mean(-1, keepdim=True), theirs, dim=-1)
    assert float(cosine.min()) > 0.999
    rows = model.shared.weight[103:].detach()
    torch.testing.assert_close(rows.std(-1), torch.full((VOCABULARY - 103,), 0.25), atol=0.01,
                               rtol=0)  # fmt: skip


def test_student_is_close_on_new_texts_without_a_gradient_step() -> None:
    teacher, model = make_teacher(2), student(2)
    plain = student(2)
    convert(model, teacher, batches(60, 0))
    ids, mask = batches(1, 99)[0]
    targets, _ = teacher(ids, mask)
    cosines = []
    for network in (model, plain):
        with torch.no_grad():
            hidden = network.encoder(input_ids=ids, attention_mask=mask,
                                     output_hidden_states=True).hidden_states  # fmt: skip
        state = hidden[-1] - hidden[-1].mean(-1, keepdim=True)
        cosine = torch.cosine_similarity(state, targets[-1], dim=-1)
        cosines.append(float(cosine[mask.bool()].mean()))
    assert cosines[0] > 0.8
    assert abs(cosines[1]) < 0.2


@pytest.mark.parametrize("converted", [True, False])
def test_the_run_begins_from_the_teacher_unless_told_otherwise(converted: bool) -> None:
    teacher = make_teacher(2)
    rng = np.random.default_rng(0)
    tokens = rng.integers(103, VOCABULARY, 600).astype(np.uint16)
    pools = {"texts": Pool("texts", tokens, np.arange(0, 601, 10), {})}
    vocabulary = {str(number): number for number in range(VOCABULARY)}
    config = BackboneConfig(out="", width=WIDTH, layers=2, heads=4, feed_forward=64,
                            convert=converted)  # fmt: skip
    model = start_model(config, Tokenizer(WordLevel(vocabulary, "0")), teacher, pools)
    ours = model.shared.weight.detach()[103:]
    theirs = teacher.bert.embeddings.word_embeddings.weight.detach()[103:]
    # Which pieces are near each other says whose embeddings they are, whatever their scale.
    both = torch.stack([torch.pdist(ours), torch.pdist(theirs)])
    assert (float(torch.corrcoef(both)[0, 1]) > 0.5) is converted
