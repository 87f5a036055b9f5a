"""What a bundle keeps of a prompt folder, read without torch.

`python -m exporter add` must run where only onnxruntime is installed, so this file, `edit.py`
and `__main__.py` import neither torch nor transformers; the exporter itself uses the same
functions, so that a task added later is tokenised exactly as one exported at first.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from tokenizers import Tokenizer

from serve.errors import Failure, UserError
from serve.files import read_json
from serve.prompt import prompt_rows, read_arrays
from serve.task import COOLEST, HOTTEST, NAME, is_count, is_temperature, is_text, need

WEIGHTS = "adapter_model.safetensors"
TEXT, BLANK, END = "{text}", "<extra_id_0>", "</s>"

Arrays = dict[str, np.ndarray]


def read_folder(folder: Path) -> tuple[dict[str, Any], Arrays]:
    """A prompt folder's `task.json` and its arrays as float32.

    Raises:
        UserError: it is no prompt folder of this project, or its numbers are of a type that is not
            read. Failure: a file is damaged.
    """
    if not folder.is_dir():
        raise UserError(f"prompt folder {folder} does not exist: check the path")
    for name in (WEIGHTS, "task.json"):
        if not (folder / name).is_file():
            raise UserError(f"{folder} holds no {name}: it is not a prompt folder of the trainer")
    task = read_json(folder / "task.json")
    if not isinstance(task, dict):
        raise Failure(f"{folder / 'task.json'} must hold a JSON object: train the prompt again")
    try:
        arrays = read_arrays((folder / WEIGHTS).read_bytes(), str(folder / WEIGHTS))
    except (SafetensorError, OSError, ValueError) as error:
        raise Failure(
            f"{folder / WEIGHTS} is damaged or cut short ({error}): copy it again"
        ) from None
    virtual = _virtual_tokens(folder / "adapter_config.json")
    prompt = arrays.get("prompt_embeddings")
    if prompt is not None and prompt.ndim == 2:  # another shape is refused with the bundle's
        own = prompt_rows(len(prompt), virtual, folder / WEIGHTS)
        arrays["prompt_embeddings"] = prompt[:own]
    return task, {name: np.ascontiguousarray(value, np.float32) for name, value in arrays.items()}


def _virtual_tokens(path: Path) -> int | None:
    if not path.is_file():
        return None
    config = read_json(path)
    if not isinstance(config, dict):
        raise Failure(f"{path} must hold a JSON object: train the prompt again")
    virtual = config.get("num_virtual_tokens")
    need(
        virtual is None or is_count(virtual),
        f"{path}: 'num_virtual_tokens' must be a positive whole number",
    )
    return virtual


def bundle_arrays(arrays: Mapping[str, np.ndarray]) -> Arrays:
    """Of a prompt's arrays those that `serve.bundle.add_task` takes: in mode `deep` the trained
    keys, values and states are all there is."""
    kept = ("kv", "states") if "kv" in arrays else ("prompt_embeddings",)
    return {name: arrays[name] for name in kept if name in arrays}  # what is missing is told there


def task_record(task: Mapping[str, Any], tokenizer: Tokenizer, source: object) -> dict[str, Any]:
    """The record of a task for `serve.bundle.add_task`.

    Args:
        task: the fields of `task.json`.
        source: the prompt's path, named in errors.

    Raises:
        UserError: a field is not of its type, labels and words do not fit, a word is not one token,
            or the template lacks a part.
    """
    labels, words = (_texts(task, key, source) for key in ("labels", "words"))
    if len(labels) < 2 or len(labels) != len(words):
        raise UserError(
            f"{source} has {len(labels)} labels and {len(words)} label words in its task.json: a "
            "task needs at least two labels with one word each"
        )
    template, temperature = task.get("template") or "", task.get("temperature") or 1.0
    most = task.get("max_tokens") or 0
    need(is_text(template), f"{source}: 'template' in its task.json must be text")
    need(
        is_temperature(temperature),
        f"{source}: 'temperature' in its task.json must be a number from {COOLEST:g} to "
        f"{HOTTEST:g}, not {str(temperature)[:40]}",
    )
    need(is_count(most, 0), f"{source}: 'max_tokens' in its task.json must be a whole number")
    before, after = template_ids(template, tokenizer, source)
    kept = ("method", "seed", "figures", "backbone")
    return {
        "labels": labels,
        "words": words,
        "word_ids": word_ids(words, tokenizer, source),
        "template": template,
        "prefix_ids": before,
        "suffix_ids": after,
        "temperature": float(temperature),
        "max_tokens": most,  # what `evaluate` measured is what is served
        "info": {name: task[name] for name in kept if task.get(name) not in (None, "", {})},
    }


def _texts(task: Mapping[str, Any], key: str, source: object) -> list[str]:
    value = task.get(key) or []
    need(
        isinstance(value, list | tuple) and all(is_text(item) for item in value),
        f"{source}: '{key}' in its task.json must be a list of words",
    )
    return list(value)


def template_ids(
    template: str, tokenizer: Tokenizer, source: object
) -> tuple[list[int], list[int]]:
    """Token ids before and after the text, the end-of-sequence token included.

    Raises:
        UserError: `{text}` or `<extra_id_0>` is not in the template exactly once.
        Failure: the tokenizer has no `</s>`.
    """
    for part in (TEXT, BLANK):
        if template.count(part) != 1:
            raise UserError(f"{source}: template {template!r} must contain {part} exactly once")
    end = tokenizer.token_to_id(END)
    if end is None:
        raise Failure(f"the tokenizer has no {END}: it is not T5's, export with another backbone")
    before, after = (part.strip() for part in template.split(TEXT))
    return (_encode(tokenizer, before) if before else []), [*_encode(tokenizer, after), end]


def word_ids(words: Sequence[str], tokenizer: Tokenizer, source: object) -> list[int]:
    """The one token of each label word.

    Raises:
        UserError: a word is not one token (with its pieces), or two words share a token.
    """
    unknown = tokenizer.token_to_id("<unk>")
    ids: list[int] = []
    for word in words:
        pieces = _encode(tokenizer, word)
        if len(pieces) != 1 or pieces[0] == unknown:
            shown = " + ".join(repr(tokenizer.id_to_token(piece)) for piece in pieces)
            raise UserError(
                f"{source}: label word '{word}' is {len(pieces)} tokens of this backbone "
                f"({shown}): train the task with a word that is one token"
            )
        if pieces[0] in ids:
            other = words[ids.index(pieces[0])]
            raise UserError(f"{source}: label words '{other}' and '{word}' are the same token")
        ids.append(pieces[0])
    return ids


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


def task_name(name: str, flag: str = "--names") -> str:
    """`name` as the name of a bundle's task: small letters without accents, the rest as dashes.

    Raises:
        UserError: nothing of it is left; the message names `flag`, which sets another.
    """
    plain = "".join(c for c in unicodedata.normalize("NFKD", name) if not unicodedata.combining(c))
    slug = re.sub(r"[^a-z0-9._-]+", "-", plain.lower()).strip("-._")[:64]
    if not NAME.fullmatch(slug):
        raise UserError(f"'{name}' cannot be made a task's name: pass another as {flag}")
    return slug
