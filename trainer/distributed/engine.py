"""A connection to Ray, bounded in time, and the settings that every run here shares."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from serve.errors import UserError, install

logger = logging.getLogger(__name__)

BLOCK_BYTES = 2 << 20  # of text in a block: what is done again when a worker is lost
_FILES_PER_TASK = 16  # at most, with very many files
_TASKS = 1000
READ_CPUS = 0.1  # decoding is little work, and must find room beside actors on every core
ACTOR_CPUS = 0.9
_OURS = re.compile(r"(?:\w+\.)*(?:UserError|Failure): (.+)")  # the last line of a traceback


def import_ray() -> Any:
    """The `ray` package, with its `data` module.

    Raises:
        UserError: it is not installed.
    """
    try:
        import ray
        import ray.data
    except ImportError:
        raise UserError(f"--ray needs Ray: {install('ray')}") from None
    return ray


@contextmanager
def session(address: str) -> Iterator[Any]:
    """Ray, connected; what was started here is stopped at the end.

    Args:
        address: "local" starts Ray on this machine; "auto" takes the cluster that this machine
            belongs to; otherwise HOST:PORT (from a machine of the cluster) or ray://HOST:PORT.

    Raises:
        UserError: Ray is not installed, or a malformed address.
        Failure: no cluster there.
    """
    ray = import_ray()
    if ray.is_initialized():  # by a program that calls us
        yield ray
        return
    from serve.raylink import connect

    connect(address, logging.ERROR)
    try:
        yield ray
    finally:
        ray.shutdown()


def cpus(ray: Any) -> int:
    """The cluster's processor cores."""
    return max(1, int(ray.cluster_resources().get("CPU", 1)))


@contextmanager
def data_settings(block_bytes: int = BLOCK_BYTES) -> Iterator[None]:
    """Ray Data's settings for datasets that are made within."""
    from ray.data import DataContext

    context = DataContext.get_current()
    before = (context.target_max_block_size, context.enable_progress_bars)
    context.target_max_block_size, context.enable_progress_bars = block_bytes, False
    for name in ("ray.data", "ray.data._internal"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        context.target_max_block_size, context.enable_progress_bars = before


def read_tasks(count: int) -> int:
    """How many tasks read `count` files: one each, until there are very many."""
    return min(count, max(_TASKS, count // _FILES_PER_TASK))


def root_message(error: BaseException) -> str:
    """What a Ray error says at its root: the exception in the worker, not Ray's wrapping."""
    cause = getattr(error, "cause", None) or error
    lines = [line.strip() for line in str(cause).strip().splitlines() if line.strip()]
    # Ray's own advice may stand below the traceback whose last line says what is wrong.
    ours = [found[1] for line in lines if (found := _OURS.match(line))]
    if ours:
        return ours[-1]
    return lines[-1] if lines else type(cause).__name__
