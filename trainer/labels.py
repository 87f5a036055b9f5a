"""Class labels as people write them in files, and the class indices that they stand for."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from serve.errors import UserError
from trainer.tasks import (
    FIVE_LABELS,
    FIVE_STARS,
    FIVE_WORDS,
    THREE_LABELS,
    THREE_WORDS,
    TWO_LABELS,
    TWO_WORDS,
)

logger = logging.getLogger(__name__)

_MOST_CLASSES = 200  # more distinct values than this are no class column
_MOST_STARS = 10  # indices from 1 up to this are taken for a rating
_INDEX = re.compile(r"-?[0-9]{1,9}(\.0+)?")  # 1.0 is how pandas writes a class beside a gap

# Names whose order is known; by the alphabet "very negative" would come after "positive".
_SCALES = (
    TWO_LABELS, THREE_LABELS, FIVE_LABELS, FIVE_STARS, TWO_WORDS, THREE_WORDS, FIVE_WORDS,
)  # fmt: skip


def as_index(value: Any) -> int | None:
    """A class index written as an int, an integral float, or either as text; else None."""
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and _INDEX.fullmatch(value.strip()):
        return int(value.strip().partition(".")[0])
    return None


def find_labels(values: Sequence[Any], places: Sequence[str], column: str) -> list[str]:
    """The class names of a file that are not given.

    Indices give "0", "1", ... up to the largest; indices that start at 1, as star ratings do, give
    "1", "2", .... Names are taken in the order of a scale that they form ("negative", "neutral",
    "positive"), and sorted otherwise.

    Args:
        values: N label values.
        places: where each stands, for errors.
        column: the column's name, for errors.

    Raises:
        UserError: values that are no classes.
    """
    indices = [as_index(value) for value in values]
    numbers = [index for index in indices if index is not None]
    if len(numbers) == len(values):
        low, high = min(numbers), max(numbers)
        if low < 0 or high >= _MOST_CLASSES:
            at = next(i for i, n in enumerate(numbers) if n < 0 or n >= _MOST_CLASSES)
            raise UserError(
                f"{places[at]}: label {values[at]!r} is no class index: class indices count from "
                "0; pass --labels, or another --label-column"
            )
        if low == 1 and high <= _MOST_STARS:
            logger.info("labels 1 to %d are taken for %d classes", high, high)
            return [str(index) for index in range(1, high + 1)]
        return [str(index) for index in range(high + 1)]
    for value, place in zip(values, places, strict=True):
        if not isinstance(value, str) or not value.strip():
            raise UserError(
                f"{place}: label {value!r} is neither a class name nor a class index: correct the "
                "row, or pass another --label-column"
            )
    names = sorted({value.strip() for value in values})
    if len(names) > _MOST_CLASSES:
        raise UserError(
            f"column '{column}' has {len(names)} different values: that is no column of classes; "
            "pass another --label-column"
        )
    for scale in _SCALES:
        if {name.casefold() for name in names} == set(scale) and len(names) == len(scale):
            return sorted(names, key=lambda name: scale.index(name.casefold()))
    return names


def class_codes(
    values: Sequence[Any], places: Sequence[str], labels: Sequence[str], drop: Sequence[str]
) -> np.ndarray:
    """The class index of each value, by name (without case) or, for numbers that are no names, as
    it stands.

    Args:
        values: N label values.
        places: where each stands, for errors.
        labels: the C class names.
        drop: names whose rows are to be left out; written as indices, they follow `labels`.

    Returns:
        [N] int64 in 0..C-1, or -1 where the row is to be left out.

    Raises:
        UserError: a value that is no class; the message names its place.
    """
    known = {name.strip().casefold(): index for index, name in enumerate(labels)}
    left_out = {name.casefold() for name in drop}
    classes = len(labels)
    codes = np.empty(len(values), dtype=np.int64)
    for position, (value, place) in enumerate(zip(values, places, strict=True)):
        number = as_index(value)
        name = str(number) if number is not None else str(value).strip().casefold()
        index = known.get(name, number)
        if name in left_out or (index is not None and classes <= index < classes + len(drop)):
            codes[position] = -1
            continue
        if index is None or not 0 <= index < classes:
            hint = " (indices count from 0)" if index == classes else ""
            raise UserError(
                f"{place}: label {value!r} is not one of {', '.join(labels)}, nor an index from 0 "
                f"to {classes - 1}{hint}: correct the row, or pass --labels"
            )
        codes[position] = index
    return codes
