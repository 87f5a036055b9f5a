"""From texts and a template to class scores: `[P; text; " It was <extra_id_0>."]`, read once.

The decoder reads `[pad, <extra_id_0>]`; the logits at its last position, for the C label words
only, are the class scores (MetaPT's appendix; PPT, Gu et al. 2022).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from serve.errors import UserError
from trainer.modes import Params, steer
from trainer.t5 import FrozenT5

TEXT = "{text}"
BLANK = "<extra_id_0>"


@dataclass(frozen=True)
class Template:
    """A template's parts as token ids.

    Attributes:
        before: ids that stand before the text.
        after: ids that stand after it, the end-of-sequence token included.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """How many tokens the template itself takes."""
        return len(self.before) + len(self.after)


@dataclass
class Batch:
    """Rows for the frozen T5.

    Attributes:
        ids: int64 [B, S], right padded; mask: bool [B, S]; labels: int64 [B], or None.
    """

    ids: Tensor
    mask: Tensor
    labels: Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        """The same rows on another device."""
        labels = None if self.labels is None else self.labels.to(device)
        return Batch(self.ids.to(device), self.mask.to(device), labels)


def compile_template(tokenizer: Any, template: str) -> Template:
    """Split a template at `{text}` and tokenise both sides.

    Raises:
        UserError: `{text}` or `<extra_id_0>` is not in it exactly once.
    """
    for part in (TEXT, BLANK):
        if template.count(part) != 1:
            raise UserError(
                f"template {template!r} must contain {part} exactly once, as in "
                "'{text} It was <extra_id_0>.'"
            )
    before, after = template.split(TEXT)
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    return Template(
        tuple(encode(before.strip())) if before.strip() else (),
        (*encode(after.strip()), tokenizer.eos_token_id),
    )


def word_ids(tokenizer: Any, words: Sequence[str]) -> list[int]:
    """The one token of each label word.

    Raises:
        UserError: a word is not one token (with its pieces), or two words share a token.
    """
    ids: list[int] = []
    for word in words:
        pieces = tokenizer(word, add_special_tokens=False)["input_ids"]
        # SentencePiece may put a lone word-start mark before a word; such a pair is not one token.
        if len(pieces) != 1 or pieces[0] == tokenizer.unk_token_id:
            shown = " + ".join(repr(t) for t in tokenizer.convert_ids_to_tokens(pieces))
            raise UserError(
                f"label word '{word}' is {len(pieces)} tokens of this backbone ({shown}): choose a "
                "word that is one token with --words"
            )
        if pieces[0] in ids:
            other = words[ids.index(pieces[0])]
            raise UserError(f"label words '{other}' and '{word}' are the same token: change one")
        ids.append(pieces[0])
    return ids


def encode_texts(
    tokenizer: Any, template: Template, texts: Sequence[str], max_tokens: int
) -> list[list[int]]:
    """Token ids of each text within its template. Truncation cuts the text, never the template.

    As where it is served (`serve.tokenize.Encoder`), a text cannot set the mask or end the input:
    "<extra_id_0>" or "</s>" in it is split like other characters, and where the vocabulary has
    the piece itself (T5's does), it is the unknown token.

    Raises:
        UserError: `max_tokens` has no room for the template and one token of text.
    """
    room = max_tokens - template.tokens
    if room < 1:
        raise UserError(
            f"--max-tokens {max_tokens} leaves no room for text beside the template's "
            f"{template.tokens} tokens: raise it"
        )
    pieces = tokenizer(
        list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False
    )["input_ids"]
    unknown = tokenizer.unk_token_id
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    special.discard(unknown)
    plain = [
        piece if special.isdisjoint(piece) else [unknown if i in special else i for i in piece]
        for piece in pieces
    ]
    return [[*template.before, *piece[:room], *template.after] for piece in plain]


def collate(rows: Sequence[Sequence[int]], labels: Any = None) -> Batch:
    """Pad rows on the right with 0, T5's pad token; labels: int [B], of any kind."""
    length = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(length)[None, :] < lengths[:, None]
    return Batch(ids, mask, None if labels is None else torch.as_tensor(labels, dtype=torch.long))


def class_scores(
    t5: FrozenT5, mode: str, params: Params, batch: Batch, words: Tensor, decoder_ids: Tensor
) -> Tensor:
    """The scores of the classes.

    Args:
        params: the prompt's tensors with a leading group axis G (`trainer.modes`).
        batch: B rows, ordered by group.
        words: int64 [C] or [G, C], token ids of the label words.
        decoder_ids: int64 [Q], `[pad, <extra_id_0>]`.

    Returns:
        [B, C] logits.
    """
    memory = steer(mode)(t5, params, t5.embed(batch.ids), batch.mask)
    return t5.scores(t5.decode(decoder_ids, memory), words)
