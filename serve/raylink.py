"""Connecting to Ray with an answer within seconds.

Left alone, `ray.init` tries for two minutes to reach an address where nobody answers, and then
ends the process.
"""

from __future__ import annotations

import logging
import os
import re
import socket
from typing import Any

import grpc
import ray

from serve.errors import Failure, UserError

_PATIENCE = 5.0  # seconds for a head node to answer
_ADDRESS = re.compile(r"(?:ray://)?(?P<host>[^:/\s]+|\[[0-9a-fA-F:]+\]):(?P<port>\d{1,5})")


def connect(address: str, level: int = logging.WARNING) -> None:
    """Connect this process to Ray.

    Args:
        address: `local` starts a Ray of its own, which ends with the process; `auto` finds the one
            that runs on this machine; otherwise `HOST:PORT` or `ray://HOST:PORT` of a head node.
        level: of Ray's own log.

    Raises:
        UserError: `address` is none of these.
        Failure: nothing that is Ray answers there within seconds.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # what runs here is nobody's business
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": level}
    if address == "local":
        quiet["include_dashboard"] = False
    elif address != "auto":
        _probe(address)
    try:
        ray.init(address=address, **quiet)
    except Exception as error:  # Ray raises the bare Exception when its processes do not start
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        if address == "local":
            raise Failure(f"Ray does not start on this machine: {first}") from error
        raise Failure(
            f"cannot connect to Ray at '{address}' ({first}): is the cluster up (ray status), of "
            "the same versions of Ray and Python, and has this process its token "
            "(RAY_AUTH_TOKEN_PATH, or RAY_AUTH_MODE=disabled on both sides)?"
        ) from None


def _probe(address: str) -> None:
    match = _ADDRESS.fullmatch(address)
    if match is None or int(match["port"]) > 65535:
        raise UserError(
            f"'{address}' is no address of a Ray cluster: pass local, auto, HOST:PORT or "
            "ray://HOST:PORT"
        )
    target = f"{match['host']}:{match['port']}"
    try:
        with socket.create_connection((match["host"].strip("[]"), int(match["port"])), _PATIENCE):
            pass
        if os.environ.get("RAY_USE_TLS") != "1":  # a port that is open need not be Ray's
            channel = grpc.insecure_channel(target)
            try:
                grpc.channel_ready_future(channel).result(_PATIENCE)
            finally:
                channel.close()
    except (OSError, grpc.FutureTimeoutError) as error:
        reason = getattr(error, "strerror", None) or "nobody speaks Ray's protocol there"
        raise Failure(
            f"no Ray cluster answers at '{address}' ({reason}): check the address, or start a "
            "head node with ray start --head"
        ) from None
