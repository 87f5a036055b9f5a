"""A tiny backbone run: random texts, a tokenizer of the label words, a model and its mixture."""

from __future__ import annotations

import numpy as np
import torch
from tokenizers import Tokenizer

from trainer.pretraining.losses import Auxiliary
from trainer.pretraining.mixture import Mixture
from trainer.pretraining.model import new_model
from trainer.pretraining.recipe import COLUMNS
from trainer.pretraining.shards import Pool
from trainer.pretraining.train import LATER, initial_prompts
from trainer.pretraining.vocabulary import build_tokenizer, train_pieces
from trainer.pretraining.wordings import label_words
from trainer.t5 import FrozenT5

SHARES = {k: v for k, v in LATER.items() if k != "distil"}


def make_tokenizer() -> Tokenizer:
    return build_tokenizer(train_pieces(["the film was great"] * 9, 330, label_words()))


def pools(size: int = 120) -> dict[str, Pool]:
    rng = np.random.default_rng(0)
    found = {}
    for name in ("reviews", "windows"):
        lengths = rng.integers(6, 50, size)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        tokens = rng.integers(110, 300, offsets[-1]).astype(np.uint16)
        columns = {c: np.full(size, -1, np.int8) for c in COLUMNS}
        if name == "reviews":
            columns["polarity"] = rng.integers(0, 2, size).astype(np.int8)
            columns["tone"] = rng.integers(0, 3, size).astype(np.int8)
            columns["star"] = rng.integers(0, 5, size).astype(np.int8)
        found[name] = Pool(name, tokens, offsets, columns)
    return found


def setting(tokenizer: Tokenizer) -> tuple[FrozenT5, Auxiliary, Mixture]:
    mixture = Mixture(pools(), tokenizer, 200, seed=3)
    model = new_model(tokenizer.get_vocab_size(), width=32, layers=2, decoder_layers=1, heads=4,
                      feed_forward=64, deviation=0.05, seed=0)  # fmt: skip
    words = sorted({mixture.asker.ids(w)[0] for w in label_words()})
    prompts = initial_prompts(mixture.tasks, mixture.asker.ids, model.shared.weight, 100, 0)
    return (FrozenT5(model, trainable=True), Auxiliary(prompts, 32, torch.tensor(words)), mixture)
