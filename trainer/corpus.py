"""Open text as a stream of sentences: whatever the size of the corpus, a few rows are in memory.

Plain text, CSV, TSV, JSONL and Parquet, alone, in folders or by glob, compressed or not.
"""

from __future__ import annotations

import glob
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from serve.errors import Failure, UserError
from trainer.remote import Source, expand, is_url, name_of
from trainer.tables import TABLES, check_file, decoded_lines, iterate_rows, kind_of

logger = logging.getLogger(__name__)
T = TypeVar("T")

PLAIN = (".txt", ".text", ".md", "")
_BLOCK = 1 << 20  # characters; a longer paragraph is cut, so that memory stays flat

# A mark that ends a sentence, closing quotes or brackets, space, and what a new one starts with.
_END = re.compile(r"[.!?…]+[\"'”’)\]]*\s+(?=[\"'“‘(\[]*[A-Z0-9])")
_ABBREVIATIONS = frozenset(
    "mr mrs ms dr prof st sr jr vs etc inc ltd co corp no vol fig gen col sgt capt lt rev hon gov "
    "sen rep jan feb mar apr jun jul aug sep sept oct nov dec approx dept est cf al e.g i.e a.m p.m"
    .split()
)  # fmt: skip


@dataclass(frozen=True)
class Sentence:
    """A sentence and the file that it is from."""

    text: str
    source: str


def split_sentences(text: str) -> list[str]:
    """Cut a text into sentences: at line ends, and after ".", "!" or "?" before a capital or digit.

    Titles, months and the like ("Dr.", "Sept."), initials ("J. Smith") and dotted letters
    ("U.S.") end no sentence. White space within a sentence becomes one blank.
    """
    found: list[str] = []
    for line in text.splitlines():
        start = 0
        for match in _END.finditer(line):
            dot = match.group().startswith(".") and not match.group().startswith("..")
            if dot and _abbreviated(line[start : match.start()]):
                continue
            found.append(" ".join(line[start : match.end()].split()))
            start = match.end()
        found.append(" ".join(line[start:].split()))
    return [sentence for sentence in found if sentence]


def _abbreviated(before: str) -> bool:
    """Whether the dot after `before` belongs to its last word instead of ending a sentence."""
    word = before.rsplit(None, 1)[-1:]
    bare = word[0].lstrip("\"'“‘([").lower() if word else ""
    if bare == "i":  # the one single letter that ends sentences
        return False
    return bare in _ABBREVIATIONS or re.fullmatch(r"([a-z]\.)*[a-z]", bare) is not None


class BadFiles:
    """Files that could not be read: reported and counted, and fatal past a share of all.

    Args:
        total: files in all.
        share: of them may be unreadable.
    """

    def __init__(self, total: int, share: float):
        self.total, self.share = total, share
        self.found: list[str] = []

    def add(self, message: str) -> None:
        """Report one more.

        Raises:
            Failure: too many by now.
        """
        self.found.append(message)
        logger.warning("%s; going on without it (%d so far)", message, len(self.found))
        if len(self.found) > self.share * self.total:
            raise Failure(
                f"{len(self.found)} of {self.total} files could not be read, more than --bad-files "
                f"{self.share:g} allows; the last one: {message}"
            )

    @property
    def allowed(self) -> bool:
        """Whether a single unreadable file would be let pass."""
        return self.share * self.total >= 1


def find_files(patterns: Sequence[str], flag: str = "--corpus") -> list[Source]:
    """The files that paths, folders, globs and addresses stand for, sorted, each once.

    Raises:
        UserError: a path that is not there or a pattern or folder without a file of a known kind.
    """
    files: list[Source] = []
    for pattern in patterns:
        if is_url(pattern):
            there = [name for name in expand(pattern, flag) if _readable(name)]
            if not there:
                raise UserError(f"{flag} {pattern} holds no text, CSV, JSONL or Parquet file")
            files.extend(there)
            continue
        path = Path(pattern).expanduser()
        if path.is_dir():
            found = [p for p in sorted(path.rglob("*")) if p.is_file() and _readable(p)]
            if not found:
                raise UserError(f"{flag} {pattern} holds no text, CSV, JSONL or Parquet file")
        elif path.exists():
            found = [check_file(path, flag)]
            if not _readable(path):
                raise UserError(
                    f"{flag} {pattern}: the name must end in .txt, .csv, .tsv, .jsonl or .parquet"
                )
        else:
            found = [Path(p) for p in sorted(glob.glob(str(path), recursive=True))]
            found = [p for p in found if p.is_file() and _readable(p)]
            if not found:
                raise UserError(f"{flag} {pattern} does not exist, nor matches a file")
        files.extend(found)
    return list(dict.fromkeys(files))


def _readable(path: Source) -> bool:
    return not name_of(path).startswith(".") and kind_of(path) in (*TABLES, *PLAIN)


def documents(
    path: Source,
    text_column: str,
    units: str = "line",
    advance: Callable[[int], None] | None = None,
) -> Iterator[str]:
    """The texts of one file: a column of a table, or the lines or paragraphs of plain text.

    Lines of plain text that are not UTF-8 are left out, and their number is logged: a crawl of
    10 GB has some, and it need not fail for them. Rows of a table without text are left out too.

    Args:
        path: the file.
        text_column: the column of a table.
        units: for plain text, "line", or "paragraph" where sentences run over line ends.
        advance: told how many bytes of the file were read since the last call.
    """
    if kind_of(path) in TABLES:
        for _, row in iterate_rows(path, [text_column], flag="--corpus", advance=advance):
            if isinstance(row[text_column], str):
                yield row[text_column]
        return
    bad: list[str] = []
    lines = decoded_lines(path, on_bad=bad.append, advance=advance)
    if units == "line":
        yield from lines
    else:
        yield from _paragraphs(lines)
    if bad:
        logger.warning("%s: %d lines are not UTF-8 and were left out", path, len(bad))


def _paragraphs(lines: Iterator[str]) -> Iterator[str]:
    block: list[str] = []
    size = 0
    for line in lines:
        if line.strip() and size < _BLOCK:
            block.append(line.strip())
            size += len(line)
            continue
        if block:
            yield " ".join(block)
        block, size = ([line.strip()], len(line)) if line.strip() else ([], 0)
    if block:
        yield " ".join(block)


def sentences(
    files: Sequence[Source],
    text_column: str = "text",
    units: str = "line",
    min_words: int = 4,
    max_words: int = 60,
    advance: Callable[[int], None] | None = None,
    bad: BadFiles | None = None,
) -> Iterator[Sentence]:
    """The sentences of all files that have a fitting number of words, in the order of the files.

    Args:
        files: from `find_files`.
        text_column, units, advance: see `documents`.
        min_words, max_words: inclusive bounds; shorter ones are headings, longer ones lists.
        bad: told of a file that cannot be read, of which what came before the damage is kept;
            None, or one that allows none, lets the error through.
    """
    for path in files:
        stream = documents(path, text_column, units, advance)
        if bad is not None and bad.allowed:
            stream = tolerant(stream, path, bad.add)
        for document in stream:
            for text in split_sentences(document):
                if min_words <= text.count(" ") + 1 <= max_words:
                    yield Sentence(text, name_of(path))


def tolerant(stream: Iterator[T], path: Source, report: Callable[[str], None]) -> Iterator[T]:
    """A file's rows up to where it cannot be read, which is reported in one line."""
    try:
        yield from stream
    except GeneratorExit:
        raise
    except Exception as error:  # a store's errors are of any class: what they say is passed on
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        report(first if str(path) in first else f"{path}: {first}")
