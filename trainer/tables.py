"""Rows of CSV, TSV, JSONL and Parquet files, one at a time, with errors that name the place.

A file is never held whole: the pseudo-labelling corpus may be larger than memory.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import itertools
import json
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import IO, Any

from serve.errors import Failure, UserError
from trainer.remote import Source, is_url, listing, name_of, open_binary, reached, size_of

TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
_PACKED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_LINE_LIMIT = 1 << 26  # bytes; a longer line is no row, and would defeat the flat memory
_BATCH = 4096  # Parquet rows, or lines between two reports of progress
_BUFFER = 1 << 20  # bytes of a Parquet column read at a time

# What to do about a missing column, by the flag that named the file.
_COLUMN_FLAGS = {
    "--corpus": "pass --corpus-column",
    "--exclude": "pass --exclude-column",
    "--data-dir": "name its columns so",
    "--source": "name its columns text and label",
    "--source-y": "name its columns text and label",
}
_ADVICE = "pass --text-column and --label-column"

Row = dict[str, Any]
Advance = Callable[[int], None]


def kind_of(path: str | Path) -> str:
    """The suffix that tells the format, without that of a compression: ".csv" for "a.csv.gz"."""
    path = Path(path)
    if path.suffix.lower() in _PACKED:
        path = path.with_suffix("")
    return path.suffix.lower()


def _unpacked(path: Source, raw: IO[bytes]) -> IO[bytes]:
    """The bytes of an open file, through gzip, bzip2 or xz by its suffix."""
    opener = _PACKED.get(Path(path).suffix.lower())
    return opener(raw, "rb") if opener else raw


def shards_of(path: Source, flag: str = "--data") -> list[Source]:
    """The Parquet files of a folder, or of an address that is no file's, sorted by name; none if
    the path is neither. Folders within are not looked at."""
    if is_url(path):
        return [] if kind_of(path) in TABLES else listing(f"{path}".rstrip("/"), flag)
    return sorted(Path(path).glob("*.parquet")) if Path(path).is_dir() else []


def check_source(source: Source, flag: str = "--data") -> Source:
    """A file that is there and not empty (see `check_file`), or an address as it stands."""
    return source if is_url(source) else check_file(source, flag)


def check_file(path: str | Path, flag: str = "--data") -> Path:
    """The path, once it is known to be a file with something in it.

    Raises:
        UserError: it is missing, a folder, or empty.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{flag} {path} is a folder: pass a file inside it")
    if not path.is_file():
        raise UserError(f"{flag} {path} does not exist: check the path")
    if path.stat().st_size == 0:
        raise UserError(f"{flag} {path} is empty: pass a file with rows")
    return path


def decoded_lines(
    path: Source,
    limit: int = _LINE_LIMIT,
    on_bad: Callable[[str], None] | None = None,
    advance: Advance | None = None,
) -> Iterator[str]:
    """The lines of a UTF-8 file, line ends kept; a byte-order mark is dropped.

    Args:
        path: the file.
        limit: bytes that a line may have.
        on_bad: told of a line that is not UTF-8, which is then left out; None raises instead.
        advance: told how many bytes of the file were read since the last call.

    Raises:
        UserError: text that is not UTF-8 (with line and byte), a line of over `limit` bytes.
        Failure: a compressed file that is damaged or cut short.
    """
    offset = 0
    number = 0
    told = 0
    try:
        with open_binary(path) as compressed, _unpacked(path, compressed) as file:
            while raw := file.readline(limit + 1):
                number += 1
                if advance and number % _BATCH == 0:
                    told, before = compressed.tell(), told
                    advance(told - before)
                if len(raw) > limit:
                    raise UserError(
                        f"{path}, line {number} is longer than {limit >> 20} MiB: "
                        "break the file into lines"
                    )
                if number == 1 and raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
                    raise UserError(f"{path} is UTF-16: save it as UTF-8")
                try:
                    line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    message = (
                        f"{path}, line {number}: byte 0x{raw[error.start]:02x} at offset "
                        f"{offset + error.start} is not UTF-8: save the file as UTF-8"
                    )
                    if on_bad is None:
                        raise UserError(message) from None
                    on_bad(message)
                else:
                    yield line
                offset += len(raw)
            if advance:
                advance(compressed.tell() - told)
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        raise Failure(f"{path} is damaged or cut short ({error}): get it again") from None


def _require(path: Source, columns: Sequence[str], present: Sequence[str], advice: str) -> None:
    for name in columns:
        if name not in present:
            raise UserError(
                f"{path} has no column '{name}': it has {', '.join(present) or 'none'}; {advice}"
            )


def _names(line: str, delimiter: str) -> list[str]:
    """The column names in the first line of a file; none if it is no line of such a file."""
    try:
        return [name.strip() for name in next(csv.reader([line], delimiter=delimiter), [])]
    except csv.Error:
        return []


def _separated(
    path: Source, columns: Sequence[str], delimiter: str, advice: str, advance: Advance | None
) -> Iterator[tuple[str, Row]]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # reviews can be longer than 128 KiB
    lines = decoded_lines(path, advance=advance)
    first = next(lines, "")
    # A spreadsheet writes a .csv with the list separator of its user's language.
    delimiter = next(
        (d for d in (delimiter, *";\t,|") if {*columns} <= {*_names(first, d)}), delimiter
    )
    reader = csv.reader(itertools.chain([first], lines), delimiter=delimiter, strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        _require(path, columns, header, advice)
        named = [name for name in header if name]  # a spreadsheet's empty columns have no name
        if len(set(named)) < len(named):
            twice = next(name for name in named if named.count(name) > 1)
            raise UserError(f"{path} has the column '{twice}' twice: rename one")
        begun = reader.line_num + 1
        for fields in reader:
            at, begun = begun, reader.line_num + 1
            # Such a field is legal, but rows run together are what it nearly always is.
            if delimiter == "\t" and any("\t" in field and "\n" in field for field in fields):
                raise UserError(
                    f"{path}, line {at}: a quote is opened and not closed before line "
                    f"{reader.line_num}: write a field's own quotes as two, and quotes around it"
                )
            if not any(field.strip() for field in fields):  # a blank line, or only separators
                continue
            if len(fields) != len(header):
                raise UserError(
                    f"{path}, line {reader.line_num} has {len(fields)} fields, but the header has "
                    f"{len(header)}: put quotes around a field that holds the separator"
                )
            yield f"line {reader.line_num}", dict(zip(header, fields, strict=True))
    except csv.Error as error:
        if "new-line character" in str(error):
            raise UserError(
                f"{path}, line {reader.line_num} holds a carriage return that ends no line: save "
                "the file with ordinary line ends (LF or CRLF)"
            ) from None
        raise UserError(
            f"{path}, line {reader.line_num}: {error}: inside a quoted field, write a quote as two"
        ) from None


def _json_lines(
    path: Source, columns: Sequence[str], advice: str, advance: Advance | None
) -> Iterator[tuple[str, Row]]:
    for number, line in enumerate(decoded_lines(path, advance=advance), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:  # a number of thousands of digits is one of its own
            reason = getattr(error, "msg", None) or str(error).partition(":")[0]
            raise UserError(
                f"{path}, line {number} is not JSON ({reason}): each line must be one object"
            ) from None
        except RecursionError:
            raise UserError(
                f"{path}, line {number} is nested too deeply: each line must be one object of "
                "texts and numbers"
            ) from None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number} is not a JSON object")
        for name in columns:
            if name not in row:
                raise UserError(
                    f"{path}, line {number} has no '{name}': it has {', '.join(row) or 'none'}; "
                    f"{advice}"
                )
        if "\\ud" in line.lower() and (half := [k for k, v in row.items() if _broken(v)]):
            raise UserError(
                f"{path}, line {number}: '{half[0]}' holds half of a character (one of the two "
                "\\ud... escapes that make it): write it whole, or remove it"
            )
        yield f"line {number}", row


def _broken(value: Any) -> bool:
    """Whether a text cannot be written as UTF-8: JSON may spell a lone half of a pair."""
    try:
        return isinstance(value, str) and not value.encode()
    except UnicodeEncodeError:
        return True


def _parquet(
    path: Source, columns: Sequence[str], keep_all: bool, advice: str, advance: Advance | None
) -> Iterator[tuple[str, Row]]:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    try:
        # Buffered and not read ahead, so that a row group larger than memory is streamed as well.
        with (
            open_binary(path) as raw,
            parquet.ParquetFile(raw, buffer_size=_BUFFER, pre_buffer=False) as file,
        ):
            names = file.schema_arrow.names
            _require(path, columns, names, advice)
            number = 0
            bytes_a_row = size_of(path) / max(1, file.metadata.num_rows)
            batches = file.iter_batches(_BATCH, columns=None if keep_all else list(columns))
            for batch in batches:
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", row
                if advance:
                    advance(round(batch.num_rows * bytes_a_row))
    except (arrow.ArrowInvalid, OSError, UnicodeDecodeError) as error:
        first = str(error).splitlines()[0]
        raise Failure(f"{path} is damaged or no Parquet file ({first}): get it again") from None


def iterate_rows(
    path: Source,
    columns: Sequence[str],
    *,
    keep_all: bool = False,
    flag: str = "--data",
    advice: str | None = None,
    advance: Advance | None = None,
) -> Iterator[tuple[str, Row]]:
    """Yield (place, row) of a CSV, TSV, JSONL or Parquet file; place reads "line 3" or "row 3".

    Args:
        path: a file, the address of one, or a folder of Parquet shards; CSV, TSV and JSONL may be
            compressed (.gz, .bz2, .xz).
        columns: the columns that every row must have.
        keep_all: whether a row carries the other columns as well.
        flag: the flag that named the file, for errors.
        advice: what to do about a missing column; None names the flags that go with `flag`.
        advance: told how many bytes of the file were read since the last call.

    Raises:
        UserError: a missing or empty file, another format, a missing column, a ragged row, text
            that is not UTF-8.
        Failure: a damaged file.
    """
    if shards := shards_of(path, flag):
        for shard in shards:
            for place, row in iterate_rows(
                shard, columns, keep_all=keep_all, flag=flag, advice=advice, advance=advance
            ):
                yield f"{name_of(shard)}, {place}", row
        return
    path = check_source(path, flag)
    kind = kind_of(path)
    advice = advice or _COLUMN_FLAGS.get(flag, _ADVICE)
    if kind in (".csv", ".tsv"):
        rows = _separated(path, columns, "," if kind == ".csv" else "\t", advice, advance)
    elif kind in (".jsonl", ".ndjson"):
        rows = _json_lines(path, columns, advice, advance)
    elif kind == ".parquet":
        rows = _parquet(path, columns, keep_all, advice, advance)
    else:
        raise UserError(
            f"{flag} {path}: the name must end in .csv, .tsv, .jsonl or .parquet, or be that of a "
            "folder with Parquet files"
        )
    with reached(str(path), flag) if is_url(path) else nullcontext():
        yield from rows
