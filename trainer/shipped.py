"""Prompts that ship with a backbone: answers to common questions, and starts for tuning.

    soft_prompts.safetensors    prompts trained jointly with the backbone, "question: label words"
                                -> [P, D]; template `{text} It was <extra_id_0>.`
    NAME_start/                 a prompt folder: a start that MetaPT or PPT found (optional)

On the command line they are `--init shipped:polarity:bad,good` and `--init shipped:NAME`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from serve.errors import Failure, UserError
from trainer.prompt import WEIGHTS, Prompt, TaskRecord, check_fits, load_prompt

if TYPE_CHECKING:
    from trainer.backbone import Backbone

SHIPPED = "shipped:"  # before the name, in `--init`
FILE = "soft_prompts.safetensors"
_START = "_start"


def name_of(key: str) -> str:
    """The file's "polarity: bad good" as the command line has it, `polarity:bad,good`."""
    question, _, words = key.partition(":")
    return f"{question.strip()}:{','.join(words.split())}"


def question_of(name: str) -> tuple[str, list[str]]:
    """`polarity:bad,good` -> ("polarity", ["bad", "good"])."""
    question, _, words = name.partition(":")
    return question, words.split(",")


def shipped_names(folder: Path) -> list[str]:
    """The jointly trained prompts of a backbone folder by name; none where it has no such file.

    Raises:
        Failure: the file is damaged.
    """
    return [name_of(key) for key in _keys(folder / FILE)]


def shipped_starts(folder: Path) -> dict[str, Path]:
    """The starts that MetaPT or PPT found for this backbone: name (`metapt`) -> prompt folder."""
    folders = sorted(folder.glob("*" + _START)) if folder.is_dir() else []
    return {f.name.removesuffix(_START): f for f in folders if (f / WEIGHTS).is_file()}


def load_shipped(backbone: Backbone, name: str, mode: str = "prefix") -> Prompt:
    """A prompt that ships with a backbone, with a record that it can be served by.

    Args:
        name: `metapt`, or question and label words in any of the forms `polarity:bad,good` and
            `polarity: bad good`.
        mode: of the record; the jointly trained prompts were trained in `prefix` and `full` alike.

    Raises:
        UserError: the backbone ships none of that name, with the names that it has.
        Failure: the file is damaged.
    """
    starts = shipped_starts(backbone.folder)
    if name in starts:
        prompt = load_prompt(starts[name])
        check_fits(prompt, backbone, starts[name])
        return prompt
    keys = {_parts(key): key for key in _keys(backbone.folder / FILE)}
    key = keys.get(_parts(name))
    if key is None:
        names = [*starts, *map(name_of, keys.values())]
        raise UserError(
            f"backbone '{backbone.name}' ships no prompt '{name}': "
            + (f"there are {' '.join(names)}" if names else "it ships none at all")
        )
    path = backbone.folder / FILE
    try:
        with safe_open(path, "pt") as file:
            value = file.get_tensor(key).float()
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from None
    question, words = question_of(name_of(key))
    record = TaskRecord(
        name=question, labels=words, words=words, mode=mode if mode == "full" else "prefix",
        backbone=backbone.name, backbone_sha256=backbone.sha256, method="shipped",
    )  # fmt: skip
    prompt = Prompt({"prompt_embeddings": value}, record)
    if value.dim() != 2:
        raise Failure(f"{path}: '{key}' is {list(value.shape)}, not [P, D]: fetch it again")
    check_fits(prompt, backbone, f"{path} ('{key}')")
    return prompt


def _parts(name: str) -> tuple[str, ...]:
    return tuple(part for part in re.split(r"[:,\s]+", name) if part)


def _keys(path: Path) -> list[str]:
    if not path.is_file():
        return []
    try:
        with safe_open(path, "np") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> Failure:
    return Failure(f"{path} is damaged or cut short ({error}): fetch the backbone again")
