"""The two kinds of failure a command reports in one line, and their exit codes."""

from __future__ import annotations

import errno


class UserError(Exception):
    """What the user asked for cannot be done as asked; the message says what to change. Exit 2."""

    exit_code = 2


class Failure(Exception):
    """Something failed that was asked for correctly; the message says what to try. Exit 1."""

    exit_code = 1


def install(extra: str) -> str:
    """What brings an extra that is missing; the project is on no package index."""
    return f'pip install ".[{extra}]" in the checkout'


def explain_os_error(error: OSError) -> str:
    """One line for an operating-system error, with the advice that fits the usual ones."""
    where = error.filename or "the output"
    if error.errno in (errno.ENOSPC, errno.EFBIG):
        where = error.filename2 or where  # of a copy it is the second
    if error.errno == errno.ENOSPC:
        return f"the disk that holds {where} is full: free some space, or write elsewhere"
    if error.errno == errno.EFBIG:
        return f"{where} is larger than this user may write: see `ulimit -f`"
    if error.errno == errno.EMFILE:
        return "this process may open no more files: raise `ulimit -n`"
    if error.errno == errno.EACCES:
        return f"no permission for {where}: check its owner, or pass another path"
    if error.errno == errno.ENOENT:
        return f"{where} does not exist: check the path"
    if error.errno == errno.EISDIR:
        return f"{where} is a folder, but a file is needed there"
    if error.errno == errno.ENOTDIR:
        return f"{where} is not a folder: a part of its path is a file"
    return f"{where}: {error.strerror or error}"
