"""Labelled texts: read from files, data folders, the VADER set or the hub."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from serve.errors import UserError
from trainer.labels import ADVICE, class_codes, find_labels
from trainer.spelling import fingerprint
from trainer.tables import Row, check_file, iterate_rows
from trainer.tasks import Hub, Task, fill_format, format_columns, get_task, readable_aspect

logger = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
_MARKED = {  # what files call the splits, without case
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "development": "validation",
    # A file of "train" and "eval" is tested on its "eval" rows, as any set without test rows is.
    "eval": "validation", "evaluation": "validation",
    "test": "test", "testing": "test",
}  # fmt: skip


@dataclass(frozen=True)
class Examples:
    """N labelled texts.

    Attributes:
        texts: N strings.
        labels: [N] int64, each in 0..C-1.
        names: the C class names.
        source: where they came from, for errors and records.
    """

    texts: list[str]
    labels: np.ndarray
    names: tuple[str, ...]
    source: str = ""

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def counts(self) -> np.ndarray:
        """[C], the number of texts per class."""
        return np.bincount(self.labels, minlength=len(self.names))

    def take(self, indices: Iterable[int]) -> Examples:
        """The examples at `indices`, in that order."""
        chosen = np.asarray(list(indices), dtype=np.int64)
        texts = [self.texts[i] for i in chosen]
        return replace(self, texts=texts, labels=self.labels[chosen])

    def sample(self, size: int, seed: int) -> Examples:
        """At most `size` examples drawn by `seed`, without repetition."""
        return self.take(_shuffled(len(self), seed)[:size])


def _shuffled(size: int, seed: int) -> np.ndarray:
    # Sorting uniform doubles, not `permutation`: the doubles of PCG64 are the same on every
    # platform and numpy version, and so are the samples that a seed stands for.
    return np.argsort(np.random.Generator(np.random.PCG64(seed)).random(size), kind="stable")


@dataclass(frozen=True)
class LabelledFile:
    """N rows of a local file, read once, before it is said what their classes are.

    Attributes:
        path: the file; label_column: its column of labels.
        texts: N strings.
        values: N labels as they stand; places: where each stands, for errors.
        marks: N values of a column `split`, None where there is none.
        sentences: N texts without aspect or target, by which a file without marks is cut.
        advice: what errors say to do about labels that do not fit.
    """

    path: str
    label_column: str
    texts: list[str]
    values: list[Any]
    places: list[str]
    marks: list[Any]
    sentences: list[str]
    advice: str = ADVICE

    def examples(
        self,
        labels: Sequence[str] | None = None,
        split: str | None = None,
        drop: Sequence[str] = (),
        *,
        indices: bool = False,
    ) -> Examples:
        """The rows of a split; see `load_examples`."""
        if labels is None:
            labels = find_labels(self.values, self.places, self.label_column, self.advice)
        codes = class_codes(
            self.values, self.places, labels, drop, indices=indices, advice=self.advice
        )
        kept = np.flatnonzero(codes >= 0)
        texts = [self.texts[i] for i in kept]
        examples = Examples(texts, codes[kept], tuple(labels), self.path)
        if split is None:
            return examples
        marks, sentences = ([part[i] for i in kept] for part in (self.marks, self.sentences))
        return choose_split(examples, marks, split, sentences)

    @property
    def marks_validation(self) -> bool:
        """Whether rows for validation are marked besides those for testing: they may choose a
        prompt then, while in a file without test rows they are what it is tested on.

        Raises:
            UserError: a mark that is not known.
        """
        return {"validation", "test"} <= {_marked(mark, self.path) for mark in self.marks}


def as_format(text_column: str) -> str:
    """--text-column as a format. A brace makes one of it; any other name, "reviews.text" too, is a
    column's as it stands."""
    return text_column if "{" in text_column else "{" + text_column + "}"


def read_file(
    path: str | Path,
    text_column: str = "text",
    label_column: str = "label",
    *,
    marks: bool = True,
    flag: str = "--data",
    advice: str = ADVICE,
) -> LabelledFile:
    """Read a local file's texts, labels and (unless told not to) marks; see `load_examples`."""
    text_format = as_format(text_column)
    columns = format_columns(text_format)
    wanted = [*columns, label_column]
    rows: list[Row] = []
    places: list[str] = []
    marked: list[Any] = []
    # The split column is optional, so it is looked for only when a split may be asked for.
    for place, row in iterate_rows(path, wanted, keep_all=marks, flag=flag):
        rows.append({name: row.get(name) for name in wanted})
        places.append(f"{path}, {place}")
        marked.append(next((row[name] for name in row if _plain(name) == "split"), None))
    if not rows:
        raise UserError(f"{flag} {path} has no rows: pass a file with rows below its header")
    texts = [
        row_text(row, columns, text_format, place) for row, place in zip(rows, places, strict=True)
    ]
    values = [row[label_column] for row in rows]
    sentences = _sentences(rows, columns)
    return LabelledFile(str(path), label_column, texts, values, places, marked, sentences, advice)


def load_examples(
    path: str | Path,
    text_column: str = "text",
    label_column: str = "label",
    labels: Sequence[str] | None = None,
    split: str | None = None,
    drop: Sequence[str] = (),
    *,
    indices: bool = False,
    flag: str = "--data",
    advice: str = ADVICE,
) -> Examples:
    """Read a local CSV, TSV, JSONL or Parquet file.

    Args:
        path: the file.
        text_column: the column of texts, or a format over several ("{aspect}: {text}").
        label_column: the column of class indices from 0, or of class names (matched without case).
        labels: the C class names; None finds them in the file, see `trainer.labels.find_labels`.
        split: "train", "validation" or "test": the rows for that purpose, see `choose_split`;
            None takes all rows.
        drop: class names whose rows are left out; written as indices, those that follow `labels`.
        indices: whether numbers are indices whatever the names, see `trainer.labels.class_codes`.
        flag: the flag that named the file, for errors.
        advice: what errors say to do about labels that do not fit, in the command's own flags.

    Raises:
        UserError: the file, a column, a row or a label is not as it must be; the message names the
            file and the row.
        Failure: the file is damaged.
    """
    file = read_file(
        path, text_column, label_column, marks=split is not None, flag=flag, advice=advice
    )
    return file.examples(labels, split, drop, indices=indices)


def _plain(name: str) -> str:
    return name.strip().casefold()


def _sentences(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> list[str]:
    """What a text is about without its aspect or target, so that a cut keeps a sentence whole.

    The column `text` of the format, or else its longest one: "{review} ({product})" must be cut by
    reviews, not by products.
    """
    if "text" in columns:
        column = "text"
    else:
        column = max(columns, key=lambda name: sum(len(row[name]) for row in rows))
    return [row[column] for row in rows]


def row_text(row: Row, columns: Sequence[str], text_format: str, place: str) -> str:
    """The text of a row, `place` being where it stands; UserError if there is none."""
    values: dict[str, str] = {}
    for name in columns:
        value = row[name]
        if value is None:
            raise UserError(f"{place}: '{name}' is missing: fill it in, or remove the row")
        if not isinstance(value, str):
            raise UserError(
                f"{place}: '{name}' is {type(value).__name__} {str(value)[:40]!r}, not text: pass "
                "another --text-column"
            )
        values[name] = readable_aspect(value) if name == "aspect" else value
    text = fill_format(text_format, values).strip()
    if not text:
        raise UserError(f"{place}: '{columns[-1]}' is empty: fill it in, or remove the row")
    return text


def choose_split(
    examples: Examples, marks: Sequence[Any], split: str, sentences: Sequence[str] | None = None
) -> Examples:
    """The rows for training, validation or testing, by the marks of a `split` column.

    A set without test rows is tested on its validation rows. One without either is cut by the
    sentences themselves: a fifth of the distinct ones, chosen by hash, is for testing and the rest
    for training, so that a sentence never is on both sides, whatever the order of the rows and
    however many aspects of it are asked about.

    Args:
        examples: N examples.
        marks: N values: "train", "dev", "validation", "test" and what else files call them,
            without case; None or an empty text for a row without a mark.
        split: "train", "validation" or "test".
        sentences: N texts without aspect or target, which the cut goes by; None takes the texts.

    Raises:
        UserError: another split, a mark that is not known, or no rows for this split.
    """
    if split not in SPLITS:
        raise UserError(f"--split {split}: there are {', '.join(SPLITS)}")
    names = [_marked(mark, examples.source) for mark in marks]
    present = {name for name in names if name}
    if not present & {"test", "validation"}:
        if split == "validation":
            raise UserError(
                f"{examples.source} marks no validation rows: pass --split test, for the fifth "
                "that is chosen by hash, or mark rows in a column 'split'"
            )
        parts = examples.texts if sentences is None else sentences
        tested = [fingerprint(part) % 5 == 0 for part in parts]
        if split == "test":
            logger.info("%s marks no test rows: a fifth, chosen by hash, is used", examples.source)
        keep = [is_test == (split == "test") for is_test in tested]
    else:
        wanted = split
        if split == "test" and "test" not in present:
            logger.info("%s has no test rows: its validation rows are used", examples.source)
            wanted = "validation"
        keep = [name == wanted for name in names]
        if unmarked := names.count(None):
            logger.warning(
                "%s: %d rows have no mark in the column 'split': they are left out of every split",
                examples.source, unmarked,
            )  # fmt: skip
    chosen = examples.take(np.flatnonzero(keep))
    if not len(chosen):
        has = "it is too small to be cut: add rows"
        if present:
            has = f"its column 'split' marks {', '.join(sorted(present))}: mark some {split}"
        raise UserError(f"{examples.source} has no rows for --split {split}: {has}")
    return chosen


def _marked(mark: Any, source: str) -> str | None:
    """The split that a mark names, None for no mark; UserError for one that is not known."""
    if mark is None or mark != mark:  # NaN is how pandas leaves a gap
        return None
    name = _plain(str(mark))
    if name and name not in _MARKED:
        raise UserError(
            f"{source}: the column 'split' marks a row {mark!r}, but a mark is one of "
            f"{', '.join(_MARKED)}, or empty: correct it, or rename a column that is about "
            "something else"
        )
    return _MARKED.get(name)


def load_task(
    task: Task | str,
    split: str | None = None,
    *,
    data: str | Path | None = None,
    data_dir: str | Path | None = None,
    text_column: str | None = None,
    label_column: str = "label",
    advice: str = ADVICE,
) -> Examples:
    """The examples of a task, from the first of: `data`, `data_dir`, VADER, the hub.

    Args:
        task: a task or the name of a registered one.
        split: "train", "validation", "test", or None for all rows.
        data: a local file (`--data`).
        data_dir: a folder of files named after the sets, `sst2.parquet` (`--data-dir`).
        text_column: see `load_examples`; None takes the task's own text format.
        label_column: the file's label column.
        advice: as for `load_examples`.

    Raises:
        UserError, Failure: see `load_examples`, `trainer.vader.load` and `trainer.hub.load`.
    """
    if isinstance(task, str):
        task = get_task(task)
    flag = "--data"
    if data is None and data_dir is not None:
        flag = "--data-dir"
        if not Path(data_dir).is_dir():
            raise UserError(f"--data-dir {data_dir} is not a folder: check the path")
        data = _in_folder(Path(data_dir), task) if task.files else None
    if data is not None:
        form = text_column or task.text_format
        return load_examples(
            data, form, label_column, task.labels, split, task.drop, flag=flag, advice=advice
        )
    if task.vader is not None:
        from trainer.vader import load as load_vader  # it builds on this module

        examples = load_vader(task.vader, task.classes)
        return examples if split is None else choose_split(examples, [None] * len(examples), split)
    if task.hub is not None:
        from trainer.hub import load as load_rows

        return _from_hub(task, load_rows(task.hub, split, task.name), split)
    raise UserError(f"task '{task.name}' has no data of its own: pass --data FILE")


def _in_folder(folder: Path, task: Task) -> Path:
    for stem in task.files:
        for suffix in (".parquet", ".jsonl", ".csv", ".tsv"):
            if (path := folder / f"{stem}{suffix}").is_file():
                return check_file(path)
    raise UserError(
        f"--data-dir {folder} has no {' or '.join(f'{stem}.parquet' for stem in task.files)} for "
        f"task '{task.name}': add it (columns {', '.join(format_columns(task.text_format))}, "
        "label)"
    )


def _from_hub(task: Task, rows: Sequence[Mapping[str, Any]], split: str | None) -> Examples:
    """Examples of hub rows; rows without text, which no user can correct, are left out."""
    source: Hub = task.hub  # type: ignore[assignment]
    columns = format_columns(source.text_format)
    rows = [row for row in rows if all(isinstance(row[name], str) for name in columns)]
    rows = [row for row in rows if row[columns[-1]].strip()]
    places = [f"{source.id}, row {number}" for number in range(1, len(rows) + 1)]
    texts = [
        row_text(dict(row), columns, source.text_format, place)
        for row, place in zip(rows, places, strict=True)
    ]
    codes = class_codes([row[source.label_column] for row in rows], places, task.labels, task.drop)
    kept = np.flatnonzero(codes >= 0)
    examples = Examples([texts[i] for i in kept], codes[kept], task.labels, source.id)
    if split is None or split in source.splits:  # then only its rows were loaded
        return examples
    parts = _sentences(rows, columns)
    marks = [rows[i]["split"] for i in kept]
    return choose_split(examples, marks, split, [parts[i] for i in kept])
