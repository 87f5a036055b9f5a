"""Tables of texts: reading what a visitor pastes or uploads, filtering, sorting, writing."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from serve.errors import UserError

TEXT_NAMES = ("text", "sentence", "review", "content", "comment", "message", "tweet", "body")
LABEL_NAMES = ("label", "class", "category", "sentiment", "target", "stars")
_SUFFIXES = (".csv", ".tsv", ".txt")
_LONGEST = 1_000_000  # characters of a cell; csv's own bound is 131,072 and fails with a riddle


@dataclass(frozen=True)
class Sheet:
    """Rows of strings under their header."""

    header: list[str]
    rows: list[list[str]]

    def column(self, name: str) -> list[str]:
        """The values of a column. Raises: UserError when there is none of that name."""
        if name not in self.header:
            raise UserError(f"The file has no column “{name}”, it has {', '.join(self.header)}.")
        index = self.header.index(name)
        return [row[index] for row in self.rows]

    def guess(self, names: Sequence[str], *, not_this: str | None = None) -> str:
        """The column whose name is among `names`, otherwise the one with the longest values."""
        lower = {name.strip().lower(): name for name in reversed(self.header) if name != not_this}
        for name in names:
            if name in lower:
                return lower[name]
        rest = [name for name in self.header if name != not_this] or self.header
        return max(rest, key=lambda name: sum(len(value) for value in self.column(name)[:100]))


def read_lines(text: str, most: int) -> list[str]:
    """One text a line; empty lines are left out.

    Raises:
        UserError: there is none, or more than `most`.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    _check_count(len(lines), most, "Paste one text a line, or upload a file.")
    return lines


def read_sheet(path: str | Path, most: int, megabytes: float) -> Sheet:
    """Read a CSV, TSV or text file (one text a line).

    Raises:
        UserError: wrong kind, size, encoding or form, no rows, or more than `most`.
    """
    path = Path(path)
    if path.suffix.lower() not in _SUFFIXES:
        raise UserError(f"“{path.name}” is not a CSV, TSV or text file. Upload one of these.")
    if path.stat().st_size > megabytes * 1e6:
        raise UserError(
            f"“{path.name}” has {path.stat().st_size / 1e6:.1f} MB; this page takes "
            f"{megabytes:g} MB. Upload a part of it."
        )
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"“{path.name}” is not UTF-8 text (byte {error.start + 1}). Save it as UTF-8."
        ) from None
    if "\0" in text:
        raise UserError(f"“{path.name}” holds NUL characters: it is not a text file.")
    if path.suffix.lower() == ".txt":
        return Sheet(["text"], [[line] for line in read_lines(text, most)])
    return _parse(text, "\t" if path.suffix.lower() == ".tsv" else None, path.name, most)


def _parse(text: str, delimiter: str | None, name: str, most: int) -> Sheet:
    first_line = text.lstrip().split("\n", 1)[0]
    if delimiter is None:
        delimiter = max(",;\t", key=first_line.count)
    csv.field_size_limit(_LONGEST)
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
    except csv.Error as error:
        raise UserError(f"“{name}” is not a well-formed CSV file: {error}.") from None
    placed = [(n, row) for n, row in enumerate(rows, 1) if any(cell.strip() for cell in row)]
    if not placed:
        raise UserError(f"“{name}” is empty.")
    header = [cell.strip() or f"column {i + 1}" for i, cell in enumerate(placed[0][1])]
    known = {cell.lower() for cell in header} & {*TEXT_NAMES, *LABEL_NAMES}
    if len(header) == 1 and not known:  # a list of texts without a header
        header = ["text"]
    else:
        placed = placed[1:]
    if len(set(header)) < len(header):
        raise UserError(f"“{name}” has two columns of one name. Rename one.")
    _check_count(len(placed), most, f"“{name}” has a header and no rows.")
    for number, row in placed:
        if len(row) != len(header):
            raise UserError(
                f"Row {number} of “{name}” has {len(row)} cells, its header {len(header)}. Put "
                "quotes around texts that contain the separator."
            )
    return Sheet(header, [row for _, row in placed])


def _check_count(count: int, most: int, empty: str) -> None:
    if count == 0:
        raise UserError(empty)
    if count > most:
        raise UserError(f"There are {count:,} rows; this page takes {most:,}. Give it a part.")


ORDERS = {
    "as given": ("row", True),
    "least sure first": ("confidence", True),
    "most sure first": ("confidence", False),
    "by text": ("text", True),
}


def view(
    table: pd.DataFrame, label: str | None, at_most: float, contains: str, order: str
) -> pd.DataFrame:
    """The rows that a filter keeps, sorted.

    Args:
        table: columns row, text, label, confidence.
        label: keep this label only, None for all.
        at_most: keep rows of at most this confidence.
        contains: keep texts that contain it, whatever the case.
        order: one of `ORDERS`.
    """
    keep = table["confidence"] <= at_most
    if label is not None:
        keep &= table["label"] == label
    if contains.strip():
        keep &= table["text"].str.contains(contains.strip(), case=False, regex=False)
    column, ascending = ORDERS[order]
    return table[keep].sort_values(column, ascending=ascending, kind="stable")
