"""Label words: one token of the backbone's vocabulary for each label that a visitor names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from serve.errors import UserError

if TYPE_CHECKING:
    from trainer.backbone import Backbone


def choose_words(backbone: Backbone, labels: Sequence[str]) -> list[str]:
    """One token of the vocabulary for each label, all different.

    A label that is one token stands for itself. Otherwise the first of its words that is one, and
    failing that the whole word of the vocabulary whose embedding is nearest to the mean of the
    label's pieces.

    Raises:
        UserError: the vocabulary has no word left.
    """
    tokenizer = backbone.tokenizer
    taken: set[int] = set()
    words: list[str] = []
    for label in labels:
        found = None
        for word in (label, label.lower(), *re.findall(r"\w+", label.lower())):
            pieces = tokenizer.encode(word, add_special_tokens=False)
            if len(pieces) == 1 and pieces[0] != tokenizer.unk_token_id and pieces[0] not in taken:
                found = (word, pieces[0])
                break
        word, token = found or _nearest_word(backbone, label, taken)
        words.append(word)
        taken.add(token)
    return words


def whole_words(vocabulary: dict[str, int]) -> dict[str, int]:
    """The lower-case words of three letters and more that are one token, with their ids.

    SentencePiece marks where a word begins (`\u2581word`), WordPiece where one goes on (`##ing`).
    """
    marked = any(piece.startswith("\u2581") for piece in vocabulary)
    found = {}
    for piece, number in vocabulary.items():
        word = piece.removeprefix("\u2581")
        begins = piece.startswith("\u2581") if marked else not piece.startswith("##")
        if begins and len(word) > 2 and word.isalpha() and word.islower():
            found[word] = number
    return found


@lru_cache(maxsize=1)
def _whole_words(backbone_sha256: str, tokenizer: Any) -> dict[str, int]:
    return whole_words(tokenizer.get_vocab())


def _nearest_word(backbone: Backbone, label: str, taken: set[int]) -> tuple[str, int]:
    import torch

    known = _whole_words(backbone.sha256, backbone.tokenizer)
    free = [(word, number) for word, number in known.items() if number not in taken]
    if not free:
        raise UserError(f"The vocabulary has no word left for the label “{label}”. Rename it.")
    table = backbone.t5.model.shared.weight.detach().float()
    pieces = backbone.tokenizer.encode(label.lower(), add_special_tokens=False)
    mean = table[pieces].mean(0)
    vectors = table[[number for _, number in free]]
    near = torch.nn.functional.cosine_similarity(vectors, mean[None], dim=1)
    for position in near.argsort(descending=True).tolist():
        word, number = free[position]
        if backbone.tokenizer.encode(word, add_special_tokens=False) == [number]:
            return word, number
    raise UserError(f"The vocabulary has no word for the label “{label}”. Rename it.")
