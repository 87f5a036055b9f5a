"""Files as a stream of blocks of rows: the reading side of every Ray Data pipeline here.

The readers of the one-machine path do the parsing, so both paths see the same rows, formats,
compressions and errors. A row knows its place (file and row), which puts rows in the order of one
machine again. A file that cannot be read ends in a row that carries the error instead of a text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as arrow

from serve.errors import UserError
from trainer.corpus import documents, tolerant
from trainer.data import as_format, row_text
from trainer.distributed.engine import READ_CPUS, read_tasks
from trainer.labels import as_index
from trainer.remote import Source, is_url
from trainer.tables import iterate_rows
from trainer.tasks import format_columns

_PLACE_BITS = 40  # rows of a file, at most; 2**23 files
_ROWS = 4096  # of a block at most
_CHARACTERS = 1 << 20


class Reader(Protocol):
    """Yields the rows of a file: a text for each of `columns`, the first of which is `text`."""

    @property
    def columns(self) -> tuple[str, ...]: ...

    def __call__(self, source: Source) -> Iterator[tuple[str, ...]]: ...


@dataclass(frozen=True)
class Documents:
    """Reads the documents of corpus files: see `trainer.corpus.documents`."""

    column: str
    units: str
    columns: tuple[str, ...] = ("text",)

    def __call__(self, source: Source) -> Iterator[tuple[str, ...]]:
        for text in documents(source, self.column, self.units):
            yield (text,)


@dataclass(frozen=True)
class LabelledTexts:
    """Reads texts and labels of a table: see `trainer.data.load_examples`; a label as text."""

    text_column: str
    label_column: str
    columns: tuple[str, ...] = ("text", "label")

    def __call__(self, source: Source) -> Iterator[tuple[str, ...]]:
        form = as_format(self.text_column)
        parts = format_columns(form)
        for place, row in iterate_rows(source, [*parts, self.label_column]):
            value = row[self.label_column]
            index = as_index(value)
            if index is None and not (isinstance(value, str) and value.strip()):
                raise UserError(f"{source}, {place}: label {value!r} is no class: correct the row")
            label = str(value).strip() if index is None else str(index)
            if isinstance(value, bool):
                label = str(value).lower()  # the name that one machine gives it
            yield row_text(row, parts, form, f"{source}, {place}"), label


def read_files(ray: Any, files: Sequence[Source], reader: Reader) -> Any:
    """A Ray dataset of the files' rows: `reader`'s columns, `place` and `bad`.

    `bad` is empty, except in the last row of a file that could not be read to its end.
    """

    def blocks(batch: dict[str, np.ndarray]) -> Iterator[arrow.Table]:
        for number, name in zip(batch["file"].tolist(), batch["name"].tolist(), strict=True):
            yield from _blocks_of(number, name if is_url(name) else Path(name), reader)

    # Workers stand in other folders than the command does.
    items = [
        {"file": number, "name": str(name) if is_url(name) else str(Path(name).absolute())}
        for number, name in enumerate(files)
    ]
    dataset = ray.data.from_items(items, override_num_blocks=read_tasks(len(items)))
    return dataset.map_batches(blocks, batch_size=1, num_cpus=READ_CPUS)


def _blocks_of(number: int, source: Source, reader: Reader) -> Iterator[arrow.Table]:
    errors: list[str] = []
    rows: list[tuple[Any, ...]] = []
    size = count = 0
    for row in tolerant(reader(source), source, errors.append):
        rows.append((*row, number << _PLACE_BITS | count, ""))
        count += 1
        size += len(row[0])
        if len(rows) >= _ROWS or size >= _CHARACTERS:
            yield _table(rows, reader)
            rows, size = [], 0
    for message in errors:
        blank = ("",) * len(reader.columns)
        rows.append((*blank, number << _PLACE_BITS | count, message))
    if rows:
        yield _table(rows, reader)


def _table(rows: list[tuple[Any, ...]], reader: Reader) -> arrow.Table:
    names = (*reader.columns, "place", "bad")
    kinds = [arrow.string()] * len(reader.columns) + [arrow.int64(), arrow.string()]
    columns = [
        arrow.array(values, kind)
        for values, kind in zip(zip(*rows, strict=True), kinds, strict=True)
    ]
    return arrow.Table.from_arrays(columns, names=names)


def file_of(place: int) -> int:
    """The number of the file that a row's place is in."""
    return place >> _PLACE_BITS
