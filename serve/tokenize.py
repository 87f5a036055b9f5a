"""Texts to token ids: the template around the text, and the text cut where it is too long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from serve.errors import Failure
from serve.task import Task

_GENEROUS = 24  # characters of English per token are about 4; a text this much longer is cut first


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

    def __init__(self, path: Path, max_tokens: int) -> None:
        """Args:
            path: `tokenizer.json`.
            max_tokens: the longest row, template included.

        Raises:
            Failure: the file is not a tokenizer's.
        """
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises the bare Exception
            raise Failure(f"{path} is not a tokenizer ({error}): export the bundle again") from None
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
        """The tokens of text that fit into a row of `task`."""
        return self.max_tokens - len(task.prefix_ids) - len(task.suffix_ids)

    def encode(self, texts: Sequence[str], tasks: Sequence[Task]) -> list[Encoded]:
        """Encode each text for its task; only the text is ever cut, never the template."""
        rooms = [self.room(task) for task in tasks]
        shorter = [self._shorten(text, room) for text, room in zip(texts, rooms, strict=True)]
        if len(shorter) == 1:
            pieces = [self._tokenizer.encode(shorter[0], add_special_tokens=False)]
        else:
            pieces = self._tokenizer.encode_batch_fast(shorter, add_special_tokens=False)
        result = []
        for index, (piece, room, task) in enumerate(zip(pieces, rooms, tasks, strict=True)):
            ids = piece.ids
            if len(ids) <= room and len(shorter[index]) < len(texts[index]):
                # The part that was looked at held fewer tokens than fit: look at all of it.
                ids = self._tokenizer.encode(texts[index], add_special_tokens=False).ids
            if not self._special.isdisjoint(ids):
                ids = [self._unknown if number in self._special else number for number in ids]
            result.append(
                Encoded([*task.prefix_ids, *ids[:room], *task.suffix_ids], len(ids) > room, task)
            )
        return result

    def _shorten(self, text: str, room: int) -> str:
        """The start of a text that is far too long, cut at a space; the tokens of a word do not
        depend on the words after it, so the ids that fit stay the same."""
        limit = _GENEROUS * (room + 1)
        if len(text) <= limit:
            return text
        cut = text.rfind(" ", 0, limit)
        return text[:cut] if cut > 0 else text
