"""A connection to Ray, bounded in time, and the settings that every run here shares."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from serve.errors import Failure, UserError, install

logger = logging.getLogger(__name__)

BLOCK_BYTES = 2 << 20  # of text in a block: what is done again when a worker is lost
_SECONDS = 5.0  # to reach a cluster; Ray itself tries for minutes and then ends the process
_FILES_PER_TASK = 16  # at most, with very many files
_TASKS = 1000
READ_CPUS = 0.1  # decoding is little work, and must find room beside actors on every core
ACTOR_CPUS = 0.9


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


def check_reachable(address: str) -> None:
    """See that something answers at `host:port` or `ray://host:port` as Ray's servers do.

    Raises:
        UserError: no such form of address.
        Failure: nothing answers within seconds, or what does is no Ray.
    """
    import grpc

    place = address.removeprefix("ray://")
    host, colon, port = place.rpartition(":")
    if not (host and colon and port.isdigit()):
        raise UserError(f"--ray {address}: pass local, auto, HOST:PORT or ray://HOST:PORT")
    with grpc.insecure_channel(place) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=_SECONDS)
        except grpc.FutureTimeoutError:
            raise Failure(
                f"--ray {address}: no Ray cluster answered within {_SECONDS:g} s: check the "
                "address (`ray start --head` prints it), or pass local"
            ) from None


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
    if address not in ("local", "auto"):
        check_reachable(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    settings: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **settings)
    except Exception as error:  # Ray raises bare ones here
        raise Failure(f"--ray {address}: {str(error).strip().splitlines()[0]}") from error
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


def first_line(error: BaseException) -> str:
    """What a Ray error says at its root: the exception in the worker, not Ray's wrapping."""
    cause = getattr(error, "cause", None) or error
    lines = [line.strip() for line in str(cause).strip().splitlines() if line.strip()]
    return lines[-1] if lines else type(cause).__name__
