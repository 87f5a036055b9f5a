"""Bytes on a connection, over sockets: upgrades that are offered, heads without end, silence."""

from __future__ import annotations

import asyncio
import functools
import json
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import pytest
import uvicorn
from serve_fake import FakeClassifier
from uvicorn.server import ServerState

from serve.http import App, Limits
from serve.wire import HEAD, Wire

H2C = (
    b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
    b"HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA\r\n"
)
BODY = json.dumps({"text": "good", "task": "film"}).encode()
LIVE = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n"


class Client:
    """A connection that sends bytes as they are."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def send(self, *parts: bytes, pause: float = 0.001) -> None:
        for part in parts:
            self._writer.write(part)
            await self._writer.drain()
            await asyncio.sleep(pause)  # a packet of its own

    async def answer(self) -> tuple[int, Any]:
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = int(head.split("content-length: ")[1].split("\r\n")[0])
        return int(head.split()[1]), json.loads(await self._reader.readexactly(length))

    async def rest(self) -> bytes:
        """What comes until the server closes."""
        try:
            return await self._reader.read()
        except ConnectionResetError:
            return b""


Connect: TypeAlias = Callable[..., Awaitable[Client]]


def over_sockets(
    story: Callable[[Connect, FakeClassifier], Awaitable[None]],
    deadline: float = 5.0,
    keep_alive: int = 5,
) -> None:
    """A server in process; `deadline` is the connection's only, not the application's."""

    async def main() -> None:
        fake = FakeClassifier()
        app = App(fake, Limits(max_wait=0.0))  # type: ignore[arg-type]
        await app.start()
        wire: Any = functools.partial(Wire, deadline=deadline)
        config = uvicorn.Config(
            app, http=wire, ws="none", lifespan="off", log_config=None,
            timeout_keep_alive=keep_alive,
        )  # fmt: skip
        config.load()
        state = ServerState()
        make = lambda: wire(config=config, server_state=state, app_state={})  # noqa: E731
        server = await asyncio.get_running_loop().create_server(make, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]

        async def connect(limit: int = 2**22) -> Client:
            end = socket.socket()
            if limit < 2**16:
                end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, limit)
            end.connect(("127.0.0.1", port))
            return Client(*await asyncio.open_connection(sock=end, limit=limit))

        try:
            await asyncio.wait_for(story(connect, fake), 20)
        finally:
            fake.gate.set()
            server.close()
            for connection in list(state.connections):
                connection.transport.abort()  # type: ignore[union-attr]
            await app.stop()

    asyncio.run(main())


def post(body: bytes = BODY, extra: bytes = b"", path: bytes = b"/classify") -> bytes:
    return (
        b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n%s\r\n%s"
        % (path, len(body), extra, body)
    )  # fmt: skip


def chunked(body: bytes = BODY, extra: bytes = b"") -> bytes:
    half = len(body) // 2
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in (body[:half], body[half:]))
    head = b"POST /classify HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
    return head + extra + b"\r\n" + chunks + b"0\r\n\r\n"


# ---- an upgrade that is offered ------------------------------------------------------------------


@pytest.mark.parametrize("size", [10_000, 1, 7, 50])
@pytest.mark.parametrize("make", [post, chunked])
def test_a_request_that_offers_an_upgrade_keeps_its_body(make: Any, size: int) -> None:
    async def story(connect: Connect, fake: FakeClassifier) -> None:
        client = await connect()
        data = make(extra=H2C)
        await client.send(*(data[i : i + size] for i in range(0, len(data), size)))
        status, value = await client.answer()
        assert status == 200 and value["results"][0]["label"] == "positive"
        await client.send(make())  # and the connection goes on
        assert (await client.answer())[0] == 200
        await client.send(make(extra=H2C))
        assert (await client.answer())[0] == 200

    over_sockets(story)


def test_requests_behind_an_offer_are_answered_in_order() -> None:
    async def story(connect: Connect, fake: FakeClassifier) -> None:
        client = await connect()
        offer = b"GET /v2 HTTP/1.1\r\nHost: x\r\n" + H2C + b"\r\n"
        await client.send(offer + post(extra=H2C) + LIVE + chunked(extra=H2C) + LIVE)
        answers = [await client.answer() for _ in range(5)]
        assert [status for status, _ in answers] == [200] * 5
        assert [next(iter(value)) for _, value in answers] == [
            "name", "results", "live", "results", "live",
        ]  # fmt: skip

    over_sockets(story)


@pytest.mark.parametrize("size", [10_000, 1])
def test_a_body_behind_an_offer_is_no_request(size: int) -> None:
    async def story(connect: Connect, fake: FakeClassifier) -> None:
        client = await connect()
        data = post(body=LIVE, extra=H2C)
        await client.send(*(data[i : i + size] for i in range(0, len(data), size)))
        status, value = await client.answer()
        assert status == 400 and "not JSON" in value["error"]
        await client.send(b"GET /v2 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert (await client.answer())[1]["name"] == "metapt"  # nothing stood between the two
        assert await client.rest() == b""

    over_sockets(story)


@pytest.mark.parametrize(
    "framing",
    [
        b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
        b"Content-Length: 5\r\nContent-Length: 6\r\n",
        b"Transfer-Encoding: gzip\r\n",
        b"Content-Length: -1\r\n",
    ],
)
def test_a_body_without_a_clear_end_is_refused_with_and_without_an_offer(framing: bytes) -> None:
    async def story(connect: Connect, fake: FakeClassifier) -> None:
        for extra in (b"", H2C):
            client = await connect()
            head = b"POST /classify HTTP/1.1\r\nHost: x\r\n" + framing + extra + b"\r\n"
            await client.send(head + b"5\r\nhello\r\n0\r\n\r\n")
            assert (await client.answer())[0] == 400
            assert await client.rest() == b""

    over_sockets(story)


def test_a_connection_that_is_to_close_closes_behind_an_offer() -> None:
    async def story(connect: Connect, fake: FakeClassifier) -> None:
        client = await connect()
        extra = b"Connection: Upgrade, close\r\nUpgrade: websocket\r\n"
        await client.send(post(extra=extra))
        assert (await client.answer())[0] == 200
        assert await client.rest() == b""

    over_sockets(story)


def test_it_is_no_proxy() -> None:
    async def story(connect: Connect, fake: FakeClassifier) -> None:
        client = await connect()
        await client.send(b"CONNECT x:1 HTTP/1.1\r\nHost: x:1\r\n\r\n" + LIVE)
        assert (await client.answer())[0] == 400
        assert await client.rest() == b""

    over_sockets(story)


# ---- a head without end --------------------------------------------------------------------------

CHUNKED = b"POST /classify HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
START = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n"


@pytest.mark.parametrize(
    ("start", "more"),
    [
        (START + b"X: ", b"a" * 1024),
        (START, b"X: y\r\n" * 170),
        (b"GET /", b"a" * 1024),
        (b"", b"\r\n" * 512),
        (CHUNKED + b"5;", b"a" * 1024),
        (CHUNKED + b"0\r\nX: ", b"a" * 1024),
    ],
)  # fmt: skip
def test_a_head_without_end_is_answered_431(start: bytes, more: bytes) -> None:
    async def story(connect: Connect, fake: FakeClassifier) -> None:
        client = await connect()
        client._writer.write(start + more * (HEAD // len(more) + 9))
        assert (await client.answer())[0] == 431
        assert await client.rest() == b""

    over_sockets(story)


def test_a_head_of_many_megabytes_costs_neither_time_nor_memory() -> None:
    async def story(connect: Connect, fake: FakeClassifier) -> None:
        client, other = await connect(), await connect()
        begun = time.perf_counter()
        client._writer.write(START + b"X: " + b"a" * 2**25)
        with pytest.raises(ConnectionError):
            while True:
                await client.send(b"a" * 2**20)
        await other.send(LIVE)
        assert (await other.answer())[0] == 200
        assert time.perf_counter() - begun < 3  # joined piece by piece it takes minutes

    over_sockets(story)


def test_a_head_within_the_bound_and_a_body_beyond_it_are_taken() -> None:
    async def story(connect: Connect, fake: FakeClassifier) -> None:
        client = await connect()
        for _ in range(3):
            await client.send(START + b"X: " + b"a" * (HEAD - 100) + b"\r\n\r\n")
            assert (await client.answer())[0] == 200
        text = json.dumps({"text": "good " * 40_000, "task": "film"}).encode()
        for data in (post(text), chunked(text), post(text, H2C)):
            await client.send(data)
            assert (await client.answer())[0] == 200
        pieces = b"".join(b"1\r\n%c\r\n" % byte for byte in b" " * 30_000 + BODY)
        await client.send(CHUNKED + pieces + b"0\r\nX: a trailer\r\n\r\n", LIVE)
        assert [(await client.answer())[0] for _ in range(2)] == [200, 200]

    over_sockets(story)


@pytest.mark.parametrize("wrong", [b"rubbish\r\n\r\n", START + b"X: " + b"a" * 2 * HEAD])
def test_what_is_wrong_does_not_cost_the_request_before_it_its_answer(wrong: bytes) -> None:
    async def story(connect: Connect, fake: FakeClassifier) -> None:
        fake.gate.clear()
        client = await connect()
        await client.send(post(), wrong, pause=0.1)
        fake.gate.set()
        assert (await client.answer())[0] == 200
        assert await client.rest() == b""

    over_sockets(story)


# ---- silence -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "status"),
    [(b"", None), (b"\r\n", None), (b"G", 408), (START, 408), (LIVE + START, 408),
     (b"POST /nothing HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n", 404)],
)  # fmt: skip
def test_a_connection_without_a_whole_request_is_closed(sent: bytes, status: int | None) -> None:
    async def story(connect: Connect, fake: FakeClassifier) -> None:
        client, begun = await connect(), time.perf_counter()
        await client.send(sent)
        got = await client.rest()
        assert 0.25 < time.perf_counter() - begun < 3
        last = got.rsplit(b"HTTP/1.1 ", 1)[-1]
        assert last[:3] == (b"" if status is None else b"%d" % status)

    over_sockets(story, deadline=0.3, keep_alive=1)


def test_a_head_that_trickles_is_given_no_more_time() -> None:
    async def story(connect: Connect, fake: FakeClassifier) -> None:
        client = await connect()
        await client.send(LIVE)  # on a new connection, and on one that was used
        assert (await client.answer())[0] == 200
        begun = time.perf_counter()
        with pytest.raises(ConnectionError):
            await client.send(START, *([b"X: y\r\n"] * 400), pause=0.02)
        assert time.perf_counter() - begun < 5

    over_sockets(story, deadline=0.3)


def test_the_rest_of_a_body_that_was_answered_may_not_trickle_for_ever() -> None:
    async def story(connect: Connect, fake: FakeClassifier) -> None:
        client = await connect()
        await client.send(b"POST /nothing HTTP/1.1\r\nHost: x\r\nContent-Length: 999\r\n\r\n")
        assert (await client.answer())[0] == 404
        with pytest.raises(ConnectionError):
            await client.send(*([b"a"] * 400), pause=0.02)

    over_sockets(story, deadline=0.3)


def test_requests_that_come_in_time_are_not_cut_off() -> None:
    async def story(connect: Connect, fake: FakeClassifier) -> None:
        client = await connect()
        for wait in (0.0, 0.9, 0.9):  # longer than the deadline, within uvicorn's own time
            await asyncio.sleep(wait)
            await client.send(LIVE[:20], LIVE[20:], pause=0.05)
            assert (await client.answer())[0] == 200

    over_sockets(story, deadline=0.4, keep_alive=2)


@pytest.mark.parametrize("reads", [True, False])
def test_a_client_that_does_not_read_its_answers_is_given_up(reads: bool) -> None:
    async def story(connect: Connect, fake: FakeClassifier) -> None:
        client = await connect(limit=4096)
        await client.send(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 600)
        if not reads:
            await asyncio.sleep(1.5)
        got = await client.rest()
        assert (got.count(b"HTTP/1.1 200") == 600) == reads

    over_sockets(story, deadline=0.3, keep_alive=1)


def test_a_half_head_behind_a_request_does_not_cost_it_its_answer() -> None:
    async def story(connect: Connect, fake: FakeClassifier) -> None:
        fake.gate.clear()
        client = await connect()
        await client.send(post() + START, pause=0.6)
        fake.gate.set()
        assert (await client.answer())[0] == 200
        assert await client.rest() == b""

    over_sockets(story, deadline=0.3)
