"""The HTTP application: Open Inference Protocol v2, `POST /classify`, `/metrics`, OpenAPI.

Classification requests are handled on the bare ASGI interface: at milliseconds per text, a
framework's work per request would show. FastAPI has the other routes and the OpenAPI page.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from serve import protocol
from serve.batcher import (
    THREADS,
    Batcher,
    ClientGone,
    DeadlinePassed,
    QueueFull,
    Request,
    TooManyTexts,
)
from serve.classifier import Classifier
from serve.errors import Failure
from serve.metrics import Metrics
from serve.protocol import Query, RequestError
from serve.readout import Result
from serve.routes import INTERNAL, make_routes
from serve.task import Task
from serve.tokenize import Encoded

log = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_INLINE = 4000  # characters that are tokenized on the loop's thread (under a millisecond)
_PART = 8  # texts that are tokenized elsewhere before it is looked whether anybody still waits
_JSON = (b"content-type", b"application/json")


@dataclass(frozen=True)
class Limits:
    """What a client may ask for; see `python -m serve http --help`. Seconds and bytes."""

    max_wait: float = 0.002
    max_queue: int = 1024
    deadline: float = 10.0
    max_body: int = 2**20
    linger: float = 1.0
    drain: float = 30.0


class App:
    """The ASGI application around one classifier.

    Attributes:
        draining: set when the server was told to stop; it is then not ready, and every answer
            asks the client to close its connection.
        all_answered: after `stop`, whether every accepted request was answered.
    """

    def __init__(
        self,
        classifier: Classifier,
        limits: Limits,
        admin_token: str | None = None,
        metrics: type[Metrics] = Metrics,
    ) -> None:
        """Args:
        classifier: what answers.
        limits: bounds of the queue and of a request.
        admin_token: what adding and removing tasks takes; without one it is off.
        metrics: what is told about requests and batches.
        """
        self.classifier, self.limits = classifier, limits
        self.draining = False
        self.metrics = metrics(lambda: self.batcher.waiting, lambda: len(classifier.tasks))
        self.batcher = Batcher(
            classifier.run,
            limits=classifier.limits,
            max_wait=limits.max_wait,
            max_queue=limits.max_queue,
            deadline=limits.deadline,
            workers=classifier.workers,
            observer=self.metrics,
        )
        self.side = ThreadPoolExecutor(1, thread_name_prefix=f"{THREADS}side")  # long texts
        # New tasks: in a cluster they wait for all replicas, which no text has to wait for.
        self.admin = ThreadPoolExecutor(1, thread_name_prefix=f"{THREADS}admin")
        self.all_answered = True
        self._started = False
        self._rest = make_routes(self, admin_token)

    async def start(self) -> None:
        """Fill the bank, run once, and take requests from now on."""
        await asyncio.get_running_loop().run_in_executor(self.side, self.classifier.warm)
        await self.batcher.start()
        self._started = True

    async def stop(self, seconds: float = 30.0) -> None:
        """Answer what was accepted within so many seconds, and end."""
        self.drain()
        self.all_answered = await self.batcher.stop(seconds)
        self.side.shutdown(wait=False, cancel_futures=True)
        self.admin.shutdown(wait=False)

    def drain(self) -> None:
        """Say that the server is not ready any more."""
        self.draining = True
        self.batcher.drain()

    def ready(self) -> bool:
        """Whether requests are wanted, and get answered."""
        return self._started and not self.draining and self.batcher.alive()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One ASGI connection."""
        if scope["type"] == "http":
            if self.draining:
                send = _closing(send)
            path = scope["path"]
            if scope["method"] == "POST" and (
                path == "/classify" or (path.startswith("/v2/models/") and path.endswith("/infer"))
            ):
                await self.infer(scope, receive, send)
            else:
                try:
                    await self._rest(scope, receive, send)
                except ClientGone:
                    pass
                except Exception:  # it was answered; starlette raises it again for the log
                    log.exception("%s %s failed", scope["method"], path)
        else:
            await send({"type": "websocket.close", "code": 1000})

    # ---- a classification request ------------------------------------------------------------

    async def infer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer `POST /classify` or `POST /v2/models/{task}/infer`."""
        begun = time.perf_counter()
        headers: list[tuple[bytes, bytes]] = []
        label, texts = "", 0
        try:
            named = None if scope["path"] == "/classify" else _task_in(scope["path"])
            if named in self.classifier.tasks:
                label = named  # whatever is wrong with the body
            body = await self.read_body(scope, receive, self.limits.max_body)
            if named is None:
                query = protocol.parse_classify(body, self.classifier.tasks)
            else:
                self._find({named})
                query = protocol.parse_infer(body, named)
            names = set(query.tasks)
            tasks = self._find(names)
            label = query.tasks[0] if len(names) == 1 else "mixed"
            results = await self._classify(query, [tasks[n] for n in query.tasks], receive)
            if named is None:
                answer = protocol.format_classify(results)
            else:
                answer = protocol.format_infer(results, query, protocol.version_of(tasks[named]))
            status, outcome, texts = 200, "ok", len(results)
        except ClientGone:
            self.metrics.request(label, "cancelled", 0, 0)
            return
        except Exception as error:  # every other end of a request is an answer
            status, message, headers = _explain(error)
            outcome, answer = str(status), protocol.dump({"error": message})
        self.metrics.request(label, outcome, texts, time.perf_counter() - begun)
        await respond(send, status, answer, headers)

    def _find(self, names: set[str]) -> dict[str, Task]:
        served = self.classifier.tasks
        for name in names:
            if name not in served:
                raise RequestError(404, f"no task '{name[:80]}': GET / lists the tasks")
        return {name: served[name] for name in names}

    async def _classify(self, query: Query, tasks: list[Task], receive: Receive) -> list[Result]:
        """Queue a query's texts and wait for the answers, or for the client to go."""
        request = self.batcher.admit(len(query.texts))
        gone = asyncio.ensure_future(receive())  # after the body, only a disconnect comes
        gone.add_done_callback(lambda _: self.batcher.fail(request, ClientGone()))
        try:
            await self._tokenize(request, query, tasks)
            return await request.future
        except BaseException as error:
            self.batcher.fail(request, error if isinstance(error, Exception) else ClientGone())
            raise
        finally:
            gone.cancel()

    async def _tokenize(self, request: Request, query: Query, tasks: list[Task]) -> None:
        begun = time.perf_counter()
        encode = self.classifier.encoder.encode
        if sum(map(len, query.texts)) <= _INLINE:
            encoded = encode(query.texts, tasks)
        else:
            work = self.side.submit(self._encode_parts, request, query.texts, tasks)
            done = asyncio.wrap_future(work)
            try:  # the deadline holds while it waits for its turn, too
                await asyncio.wait((done, request.future), return_when=asyncio.FIRST_COMPLETED)
            finally:
                if not done.done():
                    done.cancel()  # and with it the work, unless it has begun
            if request.future.done():
                return
            encoded = done.result()
        self.metrics.tokenized(time.perf_counter() - begun)
        if not query.truncate:
            for index, item in enumerate(encoded):
                if item.truncated:
                    raise RequestError(
                        422, f"text {index} is longer than "
                        f"{self.classifier.encoder.room(item.task)} tokens: shorten it, or send "
                        "'truncate': true"
                    )  # fmt: skip
        self.batcher.enqueue(request, encoded)

    def _encode_parts(self, request: Request, texts: list[str], tasks: list[Task]) -> list[Encoded]:
        """Tokenize in a thread, for as long as somebody waits for the request's answer."""
        encoded: list[Encoded] = []
        for start in range(0, len(texts), _PART):
            if request.future.done():
                break
            part = slice(start, start + _PART)
            encoded += self.classifier.encoder.encode(texts[part], tasks[part])
        return encoded

    async def read_body(self, scope: Scope, receive: Receive, limit: int) -> bytes:
        """A request's body.

        Raises:
            RequestError: 413, it is longer than `limit` bytes; 408, it does not arrive in time;
                415, it is compressed; 400, it is binary tensor data.
            ClientGone: the client left while it was sending.
        """
        for name, value in scope["headers"]:
            if name == b"content-length" and value.isdigit() and int(value[:18]) > limit:
                raise RequestError(413, f"the body is longer than {limit} bytes")
            if name == b"content-encoding" and value not in (b"", b"identity"):
                raise RequestError(415, "a compressed body is not understood: send plain JSON")
            if name == b"inference-header-content-length":
                raise RequestError(400, "binary tensor data is not understood: send JSON")
        parts: list[bytes] = []
        size, more = 0, True
        try:
            async with asyncio.timeout(self.limits.deadline):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > limit:
                        raise RequestError(413, f"the body is longer than {limit} bytes")
                    more = message.get("more_body", False)
        except TimeoutError:
            raise RequestError(408, "the body did not arrive in time") from None
        return b"".join(parts)


def _task_in(path: str) -> str:
    """The task of `/v2/models/{task}/infer`."""
    parts = path.split("/")
    if len(parts) != 5:
        raise RequestError(404, "not found")
    return parts[3]


def _explain(error: Exception) -> tuple[int, str, list[tuple[bytes, bytes]]]:
    """Status, message and headers for what ended a request."""
    if isinstance(error, RequestError):
        return error.status, str(error), []
    if isinstance(error, QueueFull):
        seconds = str(error.retry_after)
        return 429, "the queue is full: try again later", [(b"retry-after", seconds.encode())]
    if isinstance(error, TooManyTexts):
        return 422, str(error), []
    if isinstance(error, DeadlinePassed):
        return 504, "the deadline has passed: send fewer texts, or try again later", []
    if isinstance(error, Failure):
        log.error("%s", error)
        return 503, "the task cannot be run at the moment; the server's log says why", []
    log.error("a request failed", exc_info=error)
    return 500, INTERNAL, []


def _closing(send: Send) -> Send:
    async def send_closing(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
        await send(message)

    return send_closing


async def respond(
    send: Send, status: int, body: bytes, headers: list[tuple[bytes, bytes]] | None = None
) -> None:
    """Send a JSON answer."""
    length = (b"content-length", str(len(body)).encode())
    start = {"type": "http.response.start", "status": status}
    await send({**start, "headers": [_JSON, length, *(headers or [])]})
    await send({"type": "http.response.body", "body": body})
