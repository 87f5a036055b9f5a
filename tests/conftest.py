"""Shared fixtures: tiny T5 folders made from a seed, and markers by folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

STORE = 80 << 20  # bytes of Ray's object store in the tests; its own minimum is 75 MiB
WORDS = (
    "terrible bad okay good great awful negative neutral positive mixed the a film food was it It "
    "is not very and but service story acting plot room this that . , ! ?"
).split()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for tier in ("unit", "integration", "e2e"):
            if tier in Path(str(item.path)).parts:
                item.add_marker(getattr(pytest.mark, tier))


def make_tiny_t5(folder: Path, *, kind: str = "v1.0", seed: int = 0, layers: int = 2) -> Path:
    """A random T5 folder: width 32, 4 heads of 8; `kind` v1.0 (tied) or v1.1 (untied, gated)."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

    letters = list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789'")
    # Unigram with word pieces for WORDS and single letters for the rest, as SentencePiece does.
    scores = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0)]
    scores += [("▁" + word, -3.0) for word in WORDS] + [("▁", -4.0)]
    scores += [(letter, -6.0) for letter in letters] + [(mark, -5.0) for mark in ".,!?"]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=[f"<extra_id_{i}>" for i in range(100)],
    )
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=len(fast), d_model=32, d_kv=8, num_heads=4, d_ff=64, num_layers=layers,
        num_decoder_layers=layers, decoder_start_token_id=0, dropout_rate=0.1,
        feed_forward_proj="relu" if kind == "v1.0" else "gated-gelu",
        tie_word_embeddings=kind == "v1.0",
    )  # fmt: skip
    model = T5ForConditionalGeneration(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "relative_attention_bias" in name:
                weight.normal_(0, 1)  # T5 starts these near zero, where a wrong bias would not show
            elif "layer_norm" in name:
                weight.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random T5 v1.0: tied and scaled head, ReLU."""
    return make_tiny_t5(tmp_path_factory.mktemp("tiny") / "v10")


@pytest.fixture(scope="session")
def tiny_t5_v11(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random T5 v1.1: untied head, gated GELU."""
    return make_tiny_t5(tmp_path_factory.mktemp("tiny") / "v11", kind="v1.1")


@pytest.fixture(scope="module")
def cluster() -> Iterator[int]:
    """Ray on this machine: two cores and an object store of so many bytes."""
    ray = pytest.importorskip("ray", reason="Ray is not installed (the extra `ray`)")
    for attempt in range(3):
        try:
            ray.init(
                "local", num_cpus=2, object_store_memory=STORE, include_dashboard=False,
                log_to_driver=False,
            )  # fmt: skip
            break
        except Exception:  # bare ones: it gives itself 30 s, which a busy machine exceeds
            ray.shutdown()
            if attempt == 2:
                raise
    yield STORE
    ray.shutdown()
