"""Texts to token ids: the template around the text, and the text cut where it is too long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from serve.errors import Failure, UserError
from serve.task import Task, is_text

_GENEROUS = 24  # characters looked at for each token that fits; English has about 4
_FURTHER = 8  # times as many, for a text of which hardly anything is a token


@dataclass(frozen=True, slots=True)
class Encoded:
    """One text, ready to run.

    Attributes:
        ids: [S], prefix, text and suffix ids of the template.
        truncated: whether the text was cut.
        task: the version of the task that the text was accepted for.
    """

    ids: list[int]
    truncated: bool
    task: Task


class Encoder:
    """Encodes texts for tasks. Thread-safe."""

    def __init__(self, source: Path | Tokenizer, max_tokens: int) -> None:
        """Args:
            source: `tokenizer.json`, or a tokenizer, which is copied.
            max_tokens: the longest row, template included.

        Raises:
            Failure: the file is not a tokenizer's.
        """
        if isinstance(source, Tokenizer):
            self._tokenizer = Tokenizer.from_str(source.to_str())
        else:
            try:
                self._tokenizer = Tokenizer.from_file(str(source))
            except Exception as error:  # tokenizers raises the bare Exception
                raise Failure(
                    f"{source} is not a tokenizer ({error}): export the bundle again"
                ) from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        # A text that contains "<extra_id_0>" or "</s>" must not be able to set the mask or end
        # the input: such characters are split like others, and where the vocabulary itself has
        # the piece (T5's does), it becomes the unknown token.
        self._tokenizer.encode_special_tokens = True
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = {number for number, token in added.items() if token.special}
        unknown = self._tokenizer.token_to_id("<unk>")
        self._unknown = unknown if unknown is not None else 0
        self._special.discard(self._unknown)
        self.max_tokens = max_tokens

    def room(self, task: Task) -> int:
        """The tokens of text that fit into a row of `task`: no more than it was tuned on."""
        longest = min(self.max_tokens, task.max_tokens or self.max_tokens)
        return longest - len(task.prefix_ids) - len(task.suffix_ids)

    def encode(self, texts: Sequence[str], tasks: Sequence[Task]) -> list[Encoded]:
        """Encode each text for its task; only the text is ever cut, never the template."""
        rooms = [self.room(task) for task in tasks]
        starts = [start_of(text, room) for text, room in zip(texts, rooms, strict=True)]
        if len(starts) == 1:
            pieces = [self._tokenizer.encode(starts[0], add_special_tokens=False)]
        else:
            pieces = self._tokenizer.encode_batch_fast(starts, add_special_tokens=False)
        result = []
        for text, start, piece, room, task in zip(texts, starts, pieces, rooms, tasks, strict=True):
            ids = piece.ids
            if len(ids) <= room and len(start) < len(text):
                # Hardly any tokens in so many characters; look further, but not without end.
                start = start_of(text, room, _FURTHER)
                ids = self._tokenizer.encode(start, add_special_tokens=False).ids
            if not self._special.isdisjoint(ids):
                ids = [self._unknown if number in self._special else number for number in ids]
            cut = len(ids) > room or bool(text[len(start) :].strip())  # white space is no loss
            result.append(Encoded([*task.prefix_ids, *ids[:room], *task.suffix_ids], cut, task))
        return result


def start_of(text: str, room: int, times: int = 1) -> str:
    """As much of a text as is looked at for `room` tokens, cut at white space where there is some:
    the tokens of a word do not depend on the words after it, so those that fit stay the same.
    Without the cut a megabyte without spaces would take a second to tokenize, for 512 tokens.
    """
    limit = times * _GENEROUS * (room + 1)
    if len(text) <= limit:
        return text
    space = max(text.rfind(mark, limit // 2, limit) for mark in " \n\t\r")
    return text[: space if space > 0 else limit]


def check_text(text: Any, where: str) -> None:
    """Raises: UserError when `text` is not a string that has a UTF-8 form."""
    if not isinstance(text, str):
        raise UserError(f"{where} is not text but {type(text).__name__}")
    if not is_text(text):
        raise UserError(f"{where} holds half of a surrogate pair, which is no character")
