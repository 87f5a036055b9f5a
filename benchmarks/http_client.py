"""A lean HTTP/1.1 load client: prepared requests over kept connections, one request at a time each.

It shares the machine with the server that it measures, so it does as little as it can.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Sample:
    """What a run of load gave.

    Attributes:
        seconds: how long it ran; latencies: seconds of each request that was answered with 200, in
            order of their ends: a refusal is quick, and no service.
        statuses: how often each status came; lost: requests without an answer.
        bodies: the last body by position of its text, for comparing answers.
    """

    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    statuses: dict[int, int] = field(default_factory=dict)
    lost: int = 0
    bodies: dict[int, bytes] = field(default_factory=dict)

    def percentile(self, share: float) -> float:
        """Milliseconds that `share` of the requests took at most (nearest rank)."""
        ordered = sorted(self.latencies)
        return 1000 * ordered[max(0, math.ceil(share * len(ordered)) - 1)]


class Connection(asyncio.Protocol):
    """One kept connection.

    Attributes:
        closed: whether the server has closed it.
    """

    def __init__(self) -> None:
        self.closed = False
        self._buffer = b""
        self._answer: asyncio.Future[tuple[int, bytes]] | None = None
        self._transport: asyncio.WriteTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, found, rest = self._buffer.partition(b"\r\n\r\n")
        if not found or self._answer is None:
            return
        lower = head.lower()
        place = lower.index(b"content-length:") + 15
        length = int(lower[place:].split(b"\r\n", 1)[0])
        if len(rest) >= length:
            self._buffer = b""
            answer, self._answer = self._answer, None
            answer.set_result((int(head[9:12]), rest[:length]))

    def connection_lost(self, error: Exception | None) -> None:
        self.closed = True
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(ConnectionError("closed without an answer"))

    def ask(self, request: bytes) -> asyncio.Future[tuple[int, bytes]]:
        """Send a request; the future gives its status and body, or ConnectionError."""
        assert self._transport is not None
        answer = self._answer = asyncio.get_running_loop().create_future()
        if self.closed:  # nobody would ever answer
            answer.set_exception(ConnectionError("closed"))
        else:
            self._transport.write(request)
        return answer

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


def prepare(path: str, bodies: Sequence[object]) -> list[bytes]:
    """The bytes of one POST request per body."""
    result = []
    for body in bodies:
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nhost: bench\r\ncontent-length: {len(data)}\r\n\r\n"
        result.append(head.encode() + data)
    return result


async def closed_loop(port: int, requests: Sequence[bytes], clients: int, seconds: float) -> Sample:
    """Every client sends its next request when it has the answer to its last."""
    sample = Sample()
    loop = asyncio.get_running_loop()
    end = time.perf_counter() + seconds
    numbers = iter(range(10**12))

    async def client() -> None:
        _, connection = await loop.create_connection(Connection, "127.0.0.1", port)
        while time.perf_counter() < end:
            if connection.closed:
                _, connection = await loop.create_connection(Connection, "127.0.0.1", port)
            await _one(connection, requests, next(numbers), sample, time.perf_counter())
        connection.close()

    begun = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    sample.seconds = time.perf_counter() - begun
    return sample


async def open_loop(
    port: int, requests: Sequence[bytes], rate: float, seconds: float, seed: int = 0
) -> Sample:
    """Requests arrive by chance (Poisson) at `rate` a second, whether or not others are answered;
    a latency counts from the planned arrival, so that a slow server cannot hide its queue."""
    sample = Sample()
    loop = asyncio.get_running_loop()
    chance = random.Random(seed)
    free: list[Connection] = []
    running: set[asyncio.Task[None]] = set()

    async def one(number: int, planned: float) -> None:
        connection = None
        while free and (connection is None or connection.closed):
            connection = free.pop()  # the server closes what has been idle for seconds
        if connection is None or connection.closed:
            try:
                _, connection = await loop.create_connection(Connection, "127.0.0.1", port)
            except OSError:
                sample.lost += 1
                return
        await _one(connection, requests, number, sample, planned)
        free.append(connection)

    begun = planned = time.perf_counter()
    number = 0
    while planned < begun + seconds:
        planned += chance.expovariate(rate)
        await asyncio.sleep(max(0.0, planned - time.perf_counter()))
        task = asyncio.create_task(one(number, planned))
        running.add(task)
        task.add_done_callback(running.discard)
        number += 1
    await asyncio.gather(*running)
    sample.seconds = time.perf_counter() - begun
    for connection in free:
        connection.close()
    return sample


async def _one(
    connection: Connection, requests: Sequence[bytes], number: int, sample: Sample, since: float
) -> None:
    try:
        status, body = await connection.ask(requests[number % len(requests)])
    except ConnectionError:
        sample.lost += 1
        return
    sample.statuses[status] = sample.statuses.get(status, 0) + 1
    if status == 200:
        sample.latencies.append(time.perf_counter() - since)
        sample.bodies[number % len(requests)] = body
