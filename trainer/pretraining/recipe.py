"""The recipe file: which labelled sets and plain texts are read, and which are held out."""

import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from serve.errors import UserError
from trainer.pretraining.rows import whole

COLUMNS = ("polarity", "tone", "star", "subjective", "genre", "ware", "follows")


@dataclass(frozen=True)
class Labelled:
    """One labelled set.

    file: Parquet with a `text` column. columns: label column of the pool -> (source column,
    {source value: class}); a value that is missing means "no label". split: cut into sentences.
    share: weight of the set among the examples of one question. degrees: columns that only the
    judge of sentences learns from, in the same form.
    """

    name: str
    file: Path
    columns: dict[str, tuple[str, dict[str, int]]]
    genre: int = -1
    split: bool = False
    share: float = 1.0
    degrees: dict[str, tuple[str, dict[str, int]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Plain:
    """Plain text: Parquet with a `text` column, of which `documents` rows are used.

    judged: from so many of its documents sentences are labelled by the judge, where there is one.
    """

    file: Path
    documents: int
    genre: int = -1
    neutral: bool = False
    judged: int = 0


@dataclass(frozen=True)
class Recipe:
    """What is read and what is kept out."""

    labelled: list[Labelled]
    plain: list[Plain]
    held_out: list[Path] = field(default_factory=list)


def load_recipe(path: Path, folder: Path) -> Recipe:
    """Read a recipe; file names are relative to `folder`.

    Raises UserError naming the file and the key for anything that is not as described above.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing: pass a recipe file with --labelled")
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path} is not valid TOML: {error}") from None
    try:
        labelled = [_labelled(entry, folder) for entry in data.get("labelled", [])]
        plain = [
            Plain(folder / e["file"], int(e["documents"]), int(e.get("genre", -1)),
                  bool(e.get("neutral", False)), int(e.get("judged", 0)))
            for e in data.get("plain", [])
        ]  # fmt: skip
    except KeyError as error:
        raise UserError(f"{path}: an entry lacks {error}") from None
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: an entry is not as described in the file that ships ({error})"
                        ) from None  # fmt: skip
    recipe = Recipe(labelled, plain, [folder / name for name in data.get("held_out", [])])
    for file in [e.file for e in labelled] + [e.file for e in plain] + recipe.held_out:
        if not file.is_file():
            raise UserError(f"{file}, named by {path}, is missing: correct --data-dir")
    for entry in labelled:
        read = [*entry.columns.values(), *entry.degrees.values()]
        _check_columns(entry.file, ["text", *(source for source, _ in read)], path)
    for file in [e.file for e in plain] + recipe.held_out:
        _check_columns(file, ["text"], path)
    return recipe


def _check_columns(file: Path, columns: list[str], recipe: Path) -> None:
    with whole(file):
        there = pq.read_schema(file).names
    for column in columns:
        if column not in there:
            raise UserError(f"{file} has no column '{column}', which {recipe} reads")


def _labelled(entry: dict[str, Any], folder: Path) -> Labelled:
    columns, degrees = (
        {name: (source, dict(classes)) for name, (source, classes) in table.items()}
        for table in (entry["columns"], entry.get("degrees", {}))
    )
    if unknown := sorted({*columns, *degrees} - set(COLUMNS)):
        raise UserError(f"recipe entry {entry['name']}: no label column is called {unknown[0]}; "
                        f"there are {', '.join(COLUMNS)}")  # fmt: skip
    return Labelled(entry["name"], folder / entry["file"], columns, int(entry.get("genre", -1)),
                    bool(entry.get("split", False)), float(entry.get("share", 1.0)),
                    degrees)  # fmt: skip
