"""The student: an ordinary Hugging Face T5 with a deep encoder and a shallow decoder."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from serve.files import atomic_folder
from trainer.pretraining.vocabulary import save_tokenizer


def new_model(
    vocabulary: int,
    *,
    width: int,
    layers: int,
    decoder_layers: int,
    heads: int,
    feed_forward: int,
    deviation: float,
    seed: int,
) -> T5ForConditionalGeneration:
    """A fresh T5 (v1.0 style: tied head) with GELU, embeddings of the given deviation.

    T5's own initialisation (embeddings of deviation 1) does not learn with AdamW in a short run.
    """
    config = T5Config(  # type: ignore[call-arg]
        vocab_size=vocabulary, d_model=width, d_kv=width // heads, d_ff=feed_forward,
        num_layers=layers, num_decoder_layers=decoder_layers, num_heads=heads,
        feed_forward_proj="gelu", dropout_rate=0.0, tie_word_embeddings=True, pad_token_id=0,
        eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip
    config._attn_implementation = "eager"  # FrozenT5 and double backward need it
    torch.manual_seed(seed)
    model = T5ForConditionalGeneration(config)
    with torch.no_grad():
        model.shared.weight.normal_(0.0, deviation)
        decoder: Any = model.decoder
        for block in decoder.block:
            _gentle(block.layer[0].SelfAttention, deviation)
            _mean_pooling(block.layer[1].EncDecAttention, deviation)
            block.layer[2].DenseReluDense.wo.weight.mul_(0.3 * deviation)
        # Tied heads are scaled by width ** -0.5; a gain brings the logits to a useful range.
        decoder.final_layer_norm.weight.fill_(2.0)
    return model


def _gentle(attention: Any, deviation: float) -> None:
    attention.o.weight.mul_(0.3 * deviation)


def _mean_pooling(attention: Any, deviation: float) -> None:
    """Cross-attention starts as the mean of the encoder states, passed on as they are."""
    width = attention.v.weight.shape[1]
    attention.q.weight.mul_(0.3)
    nn.init.orthogonal_(attention.v.weight)
    attention.o.weight.copy_(attention.v.weight.T * deviation)
    assert attention.o.weight.shape[0] == width


def save_backbone(model: T5ForConditionalGeneration, tokenizer: Tokenizer, folder: Path,
                  extra: dict[str, str] | None = None) -> None:  # fmt: skip
    """Write the folder that AutoModelForSeq2SeqLM and AutoTokenizer load; weights as fp16.

    extra: file name -> text of further files (a model card).
    """
    half = {k: v.detach().cpu() for k, v in model.state_dict().items()}
    copy = T5ForConditionalGeneration(model.config).half()
    copy.load_state_dict(half)
    with atomic_folder(folder) as temporary:
        copy.save_pretrained(temporary)
        save_tokenizer(tokenizer, temporary)
        for name, text in (extra or {}).items():
            (temporary / name).write_text(text, encoding="utf-8")
