"""A task as a bundle describes it: labels, verbalizer, template, and where its prompt lies."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field
from typing import Any

import numpy as np

from serve.errors import UserError

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")  # of a task: also a URL segment and a file name

# Of temperatures. A logit divided by the lowest is within single precision; the score of what is no
# class, -6e4 in half precision, divided by the highest still is one of no chance.
COOLEST, HOTTEST = 1e-6, 1e3


@dataclass(frozen=True)
class Task:
    """What serving needs to know of a task; the prompt itself lies in the file `prompt`."""

    name: str
    labels: list[str]  # [C], what the user reads
    words: list[str]  # [C], the verbalizer's words
    word_ids: list[int]  # [C], their rows in the vocabulary
    template: str
    prefix_ids: list[int]  # token ids before the text
    suffix_ids: list[int]  # token ids after the text, </s> included
    temperature: float = 1.0
    max_tokens: int = 0  # longest row that the prompt was tuned and measured on; 0: the bundle's
    prompt: str = ""
    sha256: str = ""
    size_bytes: int = 0
    info: dict[str, Any] = field(default_factory=dict)  # validation figures, origin, ...
    arrays: Mapping[str, np.ndarray] | None = field(default=None, repr=False, compare=False)
    """The prompt, where it lies in memory only; never written to `bundle.json`."""


def need(condition: bool, message: str) -> None:
    """Raises: UserError with `message` unless `condition` holds."""
    if not condition:
        raise UserError(message)


def is_count(value: Any, at_least: int = 1) -> bool:
    """Whether `value` is a whole number, not a bool, and at least `at_least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= at_least


def is_text(value: Any) -> bool:
    """Whether `value` is a string that has a UTF-8 form, which half of a surrogate pair has not."""
    if not isinstance(value, str):
        return False
    if value.isascii():
        return True
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_temperature(value: Any) -> bool:
    """Whether logits can be divided by `value`."""
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and COOLEST <= value <= HOTTEST
    )


def which(names: Iterable[str], start: str = "it has") -> str:
    """Which tasks there are: the end of a message about one that is not named, or not there."""
    return f"{start} {', '.join(names) or 'none, add one with python -m exporter add'}"


def make_task(name: str, record: Mapping[str, Any], header: Mapping[str, Any]) -> Task:
    """A checked `Task` from its record in `bundle.json`.

    Raises:
        UserError: naming the key that is wrong.
    """
    check_name(name)
    known = {item.name for item in dataclasses.fields(Task)}
    values = {key: value for key, value in record.items() if key in known - {"name", "arrays"}}
    for item in dataclasses.fields(Task):
        optional = item.default is not MISSING or item.default_factory is not MISSING
        need(optional or item.name in {"name", *values}, f"task '{name}': '{item.name}' is missing")
    task = Task(name=name, **values)
    vocabulary, longest = header["backbone"]["vocab_size"], header["max_tokens"]

    def texts(value: Any) -> bool:
        return isinstance(value, list) and all(is_text(item) for item in value)

    def ids(value: Any) -> bool:
        return isinstance(value, list) and all(
            is_count(item, 0) and item < vocabulary for item in value
        )

    need(is_text(task.template), f"task '{name}': 'template' must be text")
    need(texts(task.labels) and len(task.labels) >= 2, f"task '{name}': 'labels' needs two words")
    need(len(set(task.labels)) == len(task.labels), f"task '{name}': a label stands there twice")
    need(texts(task.words), f"task '{name}': 'words' must be a list of words")
    need(
        ids(task.word_ids) and len(task.word_ids) == len(task.labels) == len(task.words),
        f"task '{name}': 'words' and 'word_ids' need one entry for each of the "
        f"{len(task.labels)} labels, with ids below {vocabulary}",
    )
    need(
        ids(task.prefix_ids) and ids(task.suffix_ids) and bool(task.suffix_ids),
        f"task '{name}': 'prefix_ids' and 'suffix_ids' must be token ids below {vocabulary}",
    )
    need(
        len(task.prefix_ids) + len(task.suffix_ids) < longest,
        f"task '{name}': its template leaves no room for a text within {longest} tokens",
    )
    need(
        is_temperature(task.temperature),
        f"task '{name}': 'temperature' must be a number from {COOLEST:g} to {HOTTEST:g}, not "
        f"{str(task.temperature)[:40]}",
    )
    need(
        is_count(task.max_tokens, 0)
        and (not task.max_tokens or task.max_tokens > len(task.prefix_ids) + len(task.suffix_ids)),
        f"task '{name}': 'max_tokens' must be a whole number that leaves room for a text, or 0",
    )
    need(is_count(task.size_bytes, 0), f"task '{name}': 'size_bytes' must be a whole number")
    need(isinstance(task.info, dict), f"task '{name}': 'info' must be an object")
    need(isinstance(task.prompt, str), f"task '{name}': 'prompt' must be a path")
    need(isinstance(task.sha256, str), f"task '{name}': 'sha256' must be a hash")
    return task


def check_name(name: str) -> None:
    """Raises: UserError when `name` cannot be a task's name."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise UserError(
            f"'{name}' cannot be a task's name: use up to 64 of a-z 0-9 . _ -, "
            "starting with a letter or digit"
        )
