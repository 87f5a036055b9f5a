"""The functional T5 against transformers' own forward, and the modes against a masked encoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from trainer.backbone import Backbone, load_backbone
from trainer.modes import add_group, deepen
from trainer.readout import Batch, class_scores, collate, compile_template, encode_texts, word_ids
from trainer.t5 import relative_buckets

TEXTS = ["the film was not very good", "bad", "a great story and acting , but the plot was awful !"]
LABEL_WORDS = ["terrible", "okay", "great"]


@pytest.fixture(params=["tiny_t5", "tiny_t5_v11"])
def backbone(request: pytest.FixtureRequest) -> Backbone:
    folder: Path = request.getfixturevalue(request.param)
    return load_backbone(str(folder), dtype=torch.float64)


def make_batch(backbone: Backbone) -> tuple[Batch, Tensor]:
    tokenizer = backbone.tokenizer
    template = compile_template(tokenizer, "{text} It was <extra_id_0>.")
    batch = collate(encode_texts(tokenizer, template, TEXTS, 64))
    return batch, torch.tensor(word_ids(tokenizer, LABEL_WORDS))


def reference(
    backbone: Backbone, batch: Batch, prompt: Tensor, words: Tensor, block: bool
) -> Tensor:
    """transformers' own forward over [P; text]; `block`: prompt rows may not see the text."""
    model, (rows, length) = backbone.t5.model, batch.ids.shape
    count = prompt.shape[0]
    embeds = torch.cat((prompt.expand(rows, -1, -1), model.shared(batch.ids)), dim=1)
    keep = torch.cat((torch.ones(rows, count, dtype=torch.bool), batch.mask), dim=1)
    allowed = keep[:, None, None, :].expand(-1, 1, count + length, -1).clone()
    if block:
        allowed[:, :, :count, count:] = False
    bias = torch.zeros(allowed.shape, dtype=embeds.dtype).masked_fill(~allowed, -1e30)
    states = model.encoder(inputs_embeds=embeds, attention_mask=bias).last_hidden_state
    out = model(
        encoder_outputs=(states,),
        attention_mask=keep.long(),
        decoder_input_ids=backbone.decoder_ids.expand(rows, -1),
    )
    return out.logits[:, -1, words]


@pytest.mark.parametrize("mode", ["full", "prefix"])
def test_modes_equal_transformers_forward(backbone: Backbone, mode: str) -> None:
    batch, words = make_batch(backbone)
    prompt = torch.randn(5, backbone.t5.width, dtype=torch.float64)
    got = class_scores(
        backbone.t5,
        mode,
        add_group({"prompt_embeddings": prompt}),
        batch,
        words,
        backbone.decoder_ids,
    )
    want = reference(backbone, batch, prompt, words, block=mode == "prefix")
    # transformers' norm takes its mean of squares in float32 even here, hence not 1e-12.
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)


def test_full_and_prefix_differ(backbone: Backbone) -> None:
    batch, words = make_batch(backbone)
    params = add_group({"prompt_embeddings": torch.randn(5, 32, dtype=torch.float64)})
    one, other = (
        class_scores(backbone.t5, mode, params, batch, words, backbone.decoder_ids)
        for mode in ("full", "prefix")
    )
    assert (one - other).abs().max() > 1e-3


def test_deep_starts_where_prefix_stands(backbone: Backbone) -> None:
    batch, words = make_batch(backbone)
    params = {"prompt_embeddings": torch.randn(4, 32, dtype=torch.float64)}
    prefix, deep = (
        class_scores(backbone.t5, mode, add_group(value), batch, words, backbone.decoder_ids)
        for mode, value in (("prefix", params), ("deep", deepen(backbone.t5, params)))
    )
    torch.testing.assert_close(prefix, deep, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("mode", ["full", "prefix", "deep"])
def test_groups_equal_separate_runs(backbone: Backbone, mode: str) -> None:
    """Rows of several prompts in one batch answer as each prompt's rows alone."""
    batch, words = make_batch(backbone)
    double = Batch(batch.ids.repeat(2, 1), batch.mask.repeat(2, 1))
    each = [{"prompt_embeddings": torch.randn(3, 32, dtype=torch.float64)} for _ in range(2)]
    if mode == "deep":
        each = [deepen(backbone.t5, params) for params in each]
    both = {name: torch.stack([params[name] for params in each]) for name in each[0]}
    got = class_scores(backbone.t5, mode, both, double, words, backbone.decoder_ids)
    want = torch.cat(
        [
            class_scores(backbone.t5, mode, add_group(params), batch, words, backbone.decoder_ids)
            for params in each
        ]
    )
    torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)


def test_relative_buckets_equal_transformers() -> None:
    from transformers.models.t5.modeling_t5 import T5Attention

    distance = torch.arange(-300, 301)
    for bidirectional in (True, False):
        want = T5Attention._relative_position_bucket(distance, bidirectional, 32, 128)
        got = relative_buckets(distance, bidirectional=bidirectional, buckets=32, max_distance=128)
        assert torch.equal(got, want)
