"""Rows of Parquet files, and the classes that a recipe reads from their columns."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from serve.errors import Failure, UserError


@contextmanager
def whole(file: Path) -> Iterator[None]:
    """Raises: Failure, in one line, when the Parquet file that is read within is damaged."""
    try:
        yield
    except pa.ArrowInvalid as error:
        raise Failure(f"{file} is damaged or no Parquet file ({error}): get it again") from None


def read_rows(file: Path, limit: int | None = None, seed: int = 0) -> list[dict]:
    """Rows of a Parquet file as dictionaries; a random `limit` of them where given."""
    with whole(file):
        table = pq.read_table(file)
    if "text" not in table.column_names:
        raise UserError(f"{file} has no column `text`")
    if limit is not None and limit < table.num_rows:
        chosen = np.random.default_rng(seed).permutation(table.num_rows)[:limit]
        table = table.take(np.sort(chosen))
    return table.to_pylist()


def class_of(row: dict, source: str, classes: dict[str, int]) -> int:
    """The class of a source column's value, -1 where it has none."""
    value = row.get(source)
    if value is None:
        return -1
    key = str(int(value)) if isinstance(value, float) and value == int(value) else str(value)
    return classes.get(key, -1)


def classes_of(row: dict, columns: dict[str, tuple[str, dict[str, int]]]) -> dict[str, int]:
    """Label column -> class, as `Labelled.columns` describes them."""
    return {name: class_of(row, *spec) for name, spec in columns.items()}
