"""Files that lie elsewhere: `s3://bucket/part-*.parquet`, `https://...`, `hdfs://...` (fsspec).

A local file is a `Path`, one that lies elsewhere a `str` with `://` in it; both are a `Source`.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from serve.errors import Failure, UserError

Source = Path | str


def is_url(name: str | Path) -> bool:
    """Whether a name is an address such as `s3://bucket/file`."""
    return isinstance(name, str) and "://" in name


def _named(url: str, flag: str) -> str:
    return f"{flag} {url}" if flag else url


def file_system(url: str, flag: str = "") -> tuple[Any, str]:
    """The fsspec file system behind an address, and the path within it.

    Args:
        flag: what named the address, for errors; here and below.

    Raises:
        UserError: an address of a kind that is not known, or whose package is missing.
    """
    from fsspec.core import url_to_fs

    try:
        return url_to_fs(url)
    except ImportError as error:  # fsspec's message names the package, as s3fs or gcsfs
        raise UserError(f"{_named(url, flag)}: {error}") from None
    except ValueError as error:
        raise UserError(f"{_named(url, flag)}: {error}: check the address") from None


@contextmanager
def reached(url: str, flag: str = "") -> Iterator[None]:
    """What a store raises while it is asked is one line of advice; stores have errors of their own.

    Raises:
        UserError: nothing is there. Failure: the store did not answer, or not as it should.
    """
    name = _named(url, flag)
    try:
        yield
    except (UserError, Failure):
        raise
    except FileNotFoundError:
        raise UserError(f"{name} does not exist: check the address") from None
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise Failure(
            f"{name} could not be reached ({reason[0]}): check the address, the network and the "
            "credentials"
        ) from error


def listing(url: str, flag: str) -> list[Source]:
    """The addresses of the Parquet files in a folder, sorted; none if it is not there."""
    system, path = file_system(url, flag)
    with reached(url, flag):
        return sorted(system.unstrip_protocol(name) for name in system.glob(f"{path}/*.parquet"))


def expand(url: str, flag: str) -> list[str]:
    """The addresses that a folder, a glob or a single address stands for, sorted.

    Raises:
        UserError: see `file_system`; nothing is there.
    """
    system, path = file_system(url, flag)
    with reached(url, flag):
        if any(mark in path for mark in "*?["):
            found = system.glob(path)
        elif not system.exists(path):
            found = []
        elif system.isdir(path):
            found = system.find(path)
        else:
            found = [path]
    if not found:
        raise UserError(f"{flag} {url} does not exist, nor matches a file")
    return sorted(system.unstrip_protocol(name) for name in found)


def open_binary(source: Source) -> IO[bytes]:
    """The file's bytes, from its start.

    Raises:
        UserError, Failure: see `file_system` and `reached`; no such file at an address.
    """
    if isinstance(source, Path):
        return source.open("rb")
    system, path = file_system(source)
    with reached(source):
        # Buffered by the standard library, whose readline takes a limit, unlike fsspec's.
        return io.BufferedReader(system.open(path, "rb"))


def size_of(source: Source) -> int:
    """The file's size in bytes; 0 where a server does not tell it.

    Raises:
        UserError, Failure: as for `open_binary`.
    """
    if isinstance(source, Path):
        return source.stat().st_size
    system, path = file_system(source)
    with reached(source):
        return int(system.info(path).get("size") or 0)


def name_of(source: Source) -> str:
    """The file's name without its folders."""
    return source.name if isinstance(source, Path) else source.rstrip("/").rsplit("/", 1)[-1]
