"""Artifacts appear whole or not at all: written under a temporary name, then renamed."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import select
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from serve.errors import Failure, UserError

_BLOCK = 1 << 16  # bytes read from a stream at a time; a pipe of Linux holds so many
_CHUNK = 1 << 20  # bytes hashed at a time, so that a weights file need not fit in memory


def _sibling(path: Path) -> Path:
    if path.name in ("", ".."):  # not by a name: the current folder, its parent or the root
        raise UserError(f"'{path}' cannot be replaced: pass a name as --out")
    # Beside the target, so that the rename stays on one file system and is atomic.
    return path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_parent(path: Path) -> None:
    """Make the folder that `path` is to stand in.

    Raises:
        UserError: it leads through one that is not there and back again: `path` may be another one
            after that is made, which nobody has looked at.
    """
    for place, part in enumerate(path.parts):
        before = Path(*path.parts[:place])
        if part == ".." and not before.is_dir():
            raise UserError(f"{before} does not exist: pass {path} without '{before.name}/..'")
    path.parent.mkdir(parents=True, exist_ok=True)


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Give a temporary path to write to; rename it to `path` when the block ends well.

    When the block raises, the temporary file goes and whatever stood at `path` stays.
    """
    path = Path(path)
    make_parent(path)
    temporary = _sibling(path)
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Give a temporary folder to fill; rename it to `path` when the block ends well.

    Args:
        path: where the folder shall stand; a symbolic link stays, and what it leads to is replaced.
            POSIX cannot swap two folders in one step, so an old one is moved aside first and
            removed last: a kill between the two leaves both whole beside `path`, under hidden
            names that hold its own.

    Raises:
        UserError: `path` is a file, or "." or "..", or leads through a missing folder and back.
    """
    path = Path(path)
    if path.is_symlink():
        path = Path(os.path.realpath(path))
    if path.exists() and not path.is_dir():
        raise UserError(
            f"{path} is a file, but a folder is to be written there: pass another --out"
        )
    make_parent(path)
    temporary = _sibling(path)
    temporary.mkdir()
    try:
        yield temporary
        for entry in temporary.rglob("*"):
            if entry.is_file():
                _sync(entry)
        if path.exists():
            aside = _sibling(path)
            try:  # SIGTERM raises between any two steps, also right after one that went well
                os.rename(path, aside)
                os.rename(temporary, path)
            finally:
                if aside.exists() and not path.exists():
                    os.rename(aside, path)
                shutil.rmtree(aside, ignore_errors=True)
        else:
            os.rename(temporary, path)
        _sync(path.parent)
    finally:
        if temporary.exists():
            shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: the file is not there.
        Failure: it is not UTF-8 JSON (damaged or truncated).
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist: check the path")
    try:
        return json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise Failure(f"{path} is not valid JSON ({error}): it is damaged, make it again") from None


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file's bytes, as 64 hex digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def text_lines(stream: BinaryIO, name: str) -> Iterator[str]:
    """The lines of a byte stream without their ends; `name` is what errors call it.

    Raises:
        UserError: a line is not UTF-8; it names the line.
    """
    for number, line in enumerate(stream, 1):
        yield _decoded(line, number, name)


def text_chunks(stream: BinaryIO, name: str, most: int) -> Iterator[list[str]]:
    """`text_lines` in lists of at most `most`; of fewer when the next line is not there yet, so
    that who writes line by line, and waits for what becomes of each, does not wait for ever.

    Raises:
        UserError: a line is not UTF-8; those before it have been given.
    """
    number = 0
    for lines in _arriving(stream, most):
        chunk: list[str] = []
        try:
            for line in lines:
                number += 1
                chunk.append(_decoded(line, number, name))
        except UserError:
            if chunk:
                yield chunk
            raise
        yield chunk


def _arriving(stream: BinaryIO, most: int) -> Iterator[list[bytes]]:
    lines: list[bytes] = []
    begun: list[bytes] = []  # pieces of a line whose end has not come
    while block := stream.read1(_BLOCK):  # type: ignore[attr-defined]
        *ended, last = block.split(b"\n")
        if ended:
            ended[0] = b"".join([*begun, ended[0]])
            begun = []
            lines += ended
        begun.append(last)
        while len(lines) >= most:
            yield lines[:most]
            del lines[:most]
        if lines and not _more(stream):
            yield lines
            lines = []
    if rest := b"".join(begun):
        lines.append(rest)
    if lines:
        yield lines


def _more(stream: BinaryIO) -> bool:
    """Whether reading would not wait: there is more, or the end."""
    try:
        return bool(select.select([stream], [], [], 0)[0])
    except (OSError, ValueError):  # bytes in memory
        return True


def _decoded(line: bytes, number: int, name: str) -> str:
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"line {number} of {name} is not UTF-8 (byte {error.start + 1}): convert it, "
            "for example with iconv -f latin1 -t utf-8"
        ) from None
    return text.removesuffix("\n").removesuffix("\r")
