"""Class labels as people write them in files, and the class indices that they stand for."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from serve.errors import Failure, UserError
from trainer.remote import Source, is_url, open_binary
from trainer.tables import kind_of, shards_of
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
_NUMBER = re.compile(r"[-+]?[0-9]*\.?[0-9]+")  # half stars too: 4.5

_CLASS_NAMES = b"class_names"  # in a Parquet file's metadata: a JSON list, class 0 first
ADVICE = "pass --labels, or another --label-column"

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


def scale_order(names: Sequence[str]) -> list[int] | None:
    """The place of each name on the scale that the names form, from 0 for the lowest.

    A scale is known names without case ("negative", "neutral", "positive") in any order, or the
    numbers from 0 or 1 in theirs. None where the names form none.
    """
    folded = [name.strip().casefold() for name in names]
    for scale in _SCALES:
        if sorted(folded) == sorted(scale):
            return [scale.index(name) for name in folded]
    for first in (0, 1):
        if folded and folded == [str(first + index) for index in range(len(folded))]:
            return list(range(len(folded)))
    return None


def class_order(labels: Sequence[str], words: Sequence[str]) -> list[int] | None:
    """The place of each class on the scale of its names or else of its label words, or None.

    Args:
        labels: the C class names; words: the C words that they are read out as.
    """
    if all(as_index(label) is not None for label in labels):
        # Numbers come last: a class "0" that is read out as "good" is the upper one.
        return scale_order(words) or scale_order(labels)
    return scale_order(labels) or scale_order(words)


@dataclass(frozen=True)
class Classes:
    """C classes: what they are called, and the label words that they are read out as, if any."""

    labels: Sequence[str]
    words: Sequence[str] = ()


@dataclass(frozen=True)
class Match:
    """Which class of one side each class of another is.

    Attributes:
        order: [C], the index among ours of each of theirs.
        by_name: whether the names say so; otherwise the places on the scales that they form.
    """

    order: list[int]
    by_name: bool

    def said(self, theirs: Sequence[str], ours: Sequence[str]) -> str:
        """The pairs in words: "bad is negative, good is positive"."""
        pairs = zip(theirs, self.order, strict=True)
        return ", ".join(f"{name} is {ours[index]}" for name, index in pairs)


def match_classes(theirs: Classes, ours: Classes) -> Match | None:
    """The classes of a data set against those of a prompt or a bundle's task.

    By their names, without case; where these differ, by their places on the scale that the names
    or the label words of each side form. None where neither tells.
    """
    if len(theirs.labels) != len(ours.labels):
        return None
    names, own = ([name.strip().casefold() for name in x.labels] for x in (theirs, ours))
    if sorted(names) == sorted(own):
        return Match([own.index(name) for name in names], by_name=True)
    places = class_order(theirs.labels, theirs.words)
    own_places = class_order(ours.labels, ours.words)
    if places is None or own_places is None:
        return None
    return Match([own_places.index(place) for place in places], by_name=False)


def tell_words(labels: Sequence[str], words: Sequence[str]) -> None:
    """Say which label word is which class's, where the order of the classes was found."""
    pairs = zip(labels, words, strict=True)
    logger.info("label words: %s", ", ".join(f"{word} for '{label}'" for label, word in pairs))


def class_metadata(names: Sequence[str]) -> dict[bytes, bytes]:
    """The metadata by which a Parquet file of class indices says what they are called."""
    return {_CLASS_NAMES: json.dumps(list(names), ensure_ascii=False).encode()}


def class_names(path: Source) -> list[str] | None:
    """What `label` and `cluster` say that the class indices in their Parquet files are called.

    It stands in the file's metadata, or in the record of the run: `X.run.json` beside `X.parquet`,
    `_run.json` in a folder of shards, which may also hold files that say it themselves.

    Returns:
        The C names; None where there are none.

    Raises:
        UserError: a folder's files do not agree.
    """
    path = path if is_url(path) else Path(path)
    if shards := shards_of(path):
        names = _recorded(f"{path}/_run.json") or names_inside(shards)
    elif kind_of(path) == ".parquet":
        names = names_inside([path]) or _recorded(str(path).removesuffix(".parquet") + ".run.json")
    else:
        names = []
    return names or None


def names_inside(paths: Sequence[Source]) -> list[str]:
    """The class names in the metadata of Parquet files; none where they carry none.

    Raises:
        UserError: the files do not agree, so that an index is one class here and another there.
    """
    tables = [path for path in paths if kind_of(path) == ".parquet"]
    with ThreadPoolExecutor(16) as pool:  # a store takes its time for each
        found = zip(tables, pool.map(_named_inside, tables), strict=True)
        known = [(path, names) for path, names in found if names is not None]
    for path, names in known:
        if names != known[0][1]:
            raise UserError(
                f"{path} calls its classes {', '.join(names) or 'nothing'}, but {known[0][0]} "
                f"{', '.join(known[0][1]) or 'nothing'}: label the texts with one classifier"
            )
    return known[0][1] if known else []


def _named_inside(path: Source) -> list[str] | None:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    try:
        with open_binary(path) as raw:
            metadata = parquet.read_schema(raw).metadata or {}
    except (arrow.ArrowInvalid, OSError, UserError, Failure):
        return None  # whoever reads the rows says what is wrong with the file
    return json.loads(metadata.get(_CLASS_NAMES, b"[]"))


def _recorded(path: str) -> list[str]:
    """The class names in the record of a run, if it is there and is one of these commands'."""
    try:
        with open_binary(path if is_url(path) else Path(path)) as raw:
            record = json.loads(raw.read())
    except (OSError, UserError, Failure):  # absent, or a store says so by forbidding it
        return []
    except ValueError as error:
        raise Failure(f"{path} is not valid JSON ({error}): it is damaged, make it again") from None
    if isinstance(record, dict) and record.get("command") in ("label", "cluster"):
        return record.get("labels", [])
    return []


def _check_there(value: Any, place: str) -> None:
    if value is None or value != value or (isinstance(value, str) and not value.strip()):
        raise UserError(f"{place}: the label is empty: fill it in, or remove the row")


def find_labels(
    values: Sequence[Any], places: Sequence[str], column: str, advice: str = ADVICE
) -> list[str]:
    """The class names of a file that are not given.

    Indices give "0", "1", ... up to the largest; indices that start at 1, as star ratings do, give
    "1", "2", ...; true and false give "false", "true". Names that differ in case only are one,
    spelt as it is met first. They are taken in the order of a scale that they form ("negative",
    "neutral", "positive"), and sorted otherwise.

    Args:
        values: N label values.
        places: where each stands, for errors.
        column: the column's name, for errors.
        advice: what errors tell the user to do, in the command's own flags.

    Raises:
        UserError: values that are no classes.
    """
    for value, place in zip(values, places, strict=True):
        _check_there(value, place)
    if all(isinstance(value, bool) for value in values):
        return ["false", "true"]
    indices = [as_index(value) for value in values]
    numbers = [index for index in indices if index is not None]
    if len(numbers) == len(values):
        low, high = min(numbers), max(numbers)
        met = [str(number) for number in sorted(set(numbers))]
        if low < 0 or high >= _MOST_CLASSES:
            at = next(i for i, n in enumerate(numbers) if n < 0 or n >= _MOST_CLASSES)
            if high < _MOST_CLASSES and len(met) <= _MOST_STARS and advice == ADVICE:
                advice = f"to take them for names pass --labels {' '.join(met)}"
                if len(met) == 2:
                    advice += " (and to tune --words bad good)"
            raise UserError(
                f"{places[at]}: label {values[at]!r} is no class index: class indices count from "
                f"0; {advice}"
            )
        first = 1 if low == 1 and high <= _MOST_STARS else 0
        names = [str(index) for index in range(first, high + 1)]
        if first:
            logger.info("labels 1 to %d are taken for %d classes", high, high)
        if len(met) < len(names) and advice == ADVICE:
            logger.info(
                "column '%s' has no %s: where there is no such class, pass --labels %s",
                column, ", ".join(name for name in names if name not in met), " ".join(met),
            )  # fmt: skip
        return names
    for value, place in zip(values, places, strict=True):
        if not isinstance(value, str):
            raise UserError(
                f"{place}: label {value!r} is neither a class name nor a class index: correct the "
                f"row, or {advice}"
            )
    spelling: dict[str, str] = {}
    for value in values:
        spelling.setdefault(value.strip().casefold(), value.strip())
    names = [spelling[name] for name in sorted(spelling)]
    if len(names) > _MOST_CLASSES:
        raise UserError(
            f"column '{column}' has {len(names)} different values: that is no column of classes; "
            f"{advice}"
        )
    if order := scale_order(names):
        return [names[index] for index in np.argsort(order)]
    return names


def class_codes(
    values: Sequence[Any],
    places: Sequence[str],
    labels: Sequence[str],
    drop: Sequence[str],
    *,
    indices: bool = False,
    advice: str = ADVICE,
) -> np.ndarray:
    """The class index of each value: by name, without case, or else as the number that it is.

    A value that is spelt as a name is that class, and 1.0 is the class "1". A number that is no
    name is an index only where no name is a number, nor true or false: among the classes "1" to
    "5" a stray 0 is a mistake, not the class "1". In a file that names its classes a number is an
    index before it is a name.

    Args:
        values: N label values.
        places: where each stands, for errors.
        labels: the C class names.
        drop: names whose rows are to be left out; written as indices, they follow `labels`.
        indices: whether numbers are indices whatever the names, as in a file that carries both
            (see `class_names`).
        advice: as for `find_labels`.

    Returns:
        [N] int64 in 0..C-1, or -1 where the row is to be left out.

    Raises:
        UserError: a value that is no class, the message names its place; a class named twice.
    """
    known = {name.strip().casefold(): index for index, name in enumerate(labels)}
    if len(known) < len(labels):
        raise UserError(
            f"the classes {', '.join(labels)} have a name twice (case does not count): pass other "
            "--labels"
        )
    left_out = {name.casefold() for name in drop}
    classes = len(labels)
    declared = indices
    indices = indices or not any(_NUMBER.fullmatch(n) or n in ("true", "false") for n in known)
    codes = np.empty(len(values), dtype=np.int64)
    for position, (value, place) in enumerate(zip(values, places, strict=True)):
        _check_there(value, place)
        name = str(value).strip().casefold()
        number = as_index(value)
        if name not in known and number is not None and not isinstance(value, bool):
            name = str(number)
        index = known.get(name, number if indices else None)
        if declared and number is not None:
            index = number
        if name in left_out or (index is not None and classes <= index < classes + len(drop)):
            codes[position] = -1
            continue
        if index is None or not 0 <= index < classes:
            hint = " (indices count from 0)" if index == classes else ""
            nor = f", nor an index from 0 to {classes - 1}{hint}" if indices else ""
            other = ", or pass --labels" if advice == ADVICE else ""
            raise UserError(
                f"{place}: label {value!r} is not one of {', '.join(labels)}{nor}: correct the "
                f"row{other}"
            )
        codes[position] = index
    return codes
