"""Running the application with uvicorn, and ending it without losing a request."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import functools
import logging
import os
import resource
import signal
import socket
import struct
import sys
import threading
from typing import Any

import uvicorn
from prometheus_client import disable_created_metrics

from serve import protocol
from serve.batcher import THREADS
from serve.classifier import Classifier
from serve.errors import Failure
from serve.http import App, Limits, Receive, Scope, Send, respond
from serve.wire import Wire

log = logging.getLogger(__name__)

_CONNECTIONS = 4096  # open at once; beyond it the server answers 503
_HANDSHAKE = 0.05  # seconds for connections that are being made to be complete
_ARRIVAL = 0.3  # seconds between connecting and sending, for who connects at the very end
_FAREWELL = 1.0  # seconds for the last answers, after --drain


def serve_forever(
    classifier: Classifier,
    limits: Limits,
    host: str,
    port: int,
    admin_token: str | None = None,
    access_log: bool = False,
) -> int:
    """Serve until SIGTERM or SIGINT.

    The first signal makes the server not ready at once; for `limits.linger` seconds it still
    answers what comes, and asks every client to close its connection, so that none loses a request
    that is on its way. Then it stops listening, answers what it has accepted, and ends.
    A second signal ends it without waiting.

    Returns:
        0 when every accepted request was answered, otherwise 1. When a batch hangs, it ends the
        process with that code itself.

    Raises:
        Failure: the address cannot be listened on.
    """
    # Until uvicorn's handlers stand: filling the bank takes seconds and leaves nothing half-made.
    # Not SIG_DFL: the kernel ignores that for a container's first process.
    signal.signal(signal.SIGTERM, lambda number, _: os._exit(128 + number))
    disable_created_metrics()  # a second series for each counter that nobody reads
    app = App(classifier, limits, admin_token)
    last = _LastAnswers(app)
    listener = _listen(host, port)
    _allow_connections()
    wire: Any = functools.partial(Wire, deadline=limits.deadline)
    config = uvicorn.Config(
        last,
        http=wire,
        ws="none",
        log_config=None,
        log_level="info" if access_log else "warning",
        access_log=access_log,
        lifespan="off",
        server_header=False,
        date_header=False,
        limit_concurrency=_CONNECTIONS,
        backlog=2048,
        timeout_graceful_shutdown=limits.drain,  # type: ignore[arg-type]  # a fraction will do
    )
    server = _Server(config, app, listener)
    with listener, asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(server.run_to_end())
    code = 0 if app.all_answered and not last.late else 1
    if _hanging():  # Python would wait for it, and `--drain` would bound nothing
        log.warning("a thread is still at work: ending without it")
        logging.shutdown()
        os._exit(code)
    return code


def _hanging() -> bool:
    """Whether a thread that this server started is still at work."""
    ours = [t for t in threading.enumerate() if t.name.startswith(THREADS)]
    for thread in ours:
        thread.join(0.1)  # one without work ends by itself
    return any(thread.is_alive() for thread in ours)


def _allow_connections() -> None:
    """Raise the soft limit of open files, often 1024, so that it is not what bounds connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * _CONNECTIONS if hard == resource.RLIM_INFINITY else min(2 * _CONNECTIONS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise Failure(
            f"cannot listen on {host} port {port} ({error.strerror or error}): "
            "pass another --host or --port"
        ) from None


def _turn_away(listener: socket.socket) -> None:
    """Let the kernel drop what knocks from now on, so that taking the last connection ends.

    Between the last `accept` and `close` a busy machine may let milliseconds pass, in which a
    client would be connected and then reset. A socket filter that drops SYN (socket(7),
    SO_ATTACH_FILTER) makes it wait instead, until the closed port refuses it. Elsewhere than on
    Linux that moment remains.
    """
    if sys.platform != "linux":
        return
    code = [
        (0x30, 0, 0, 13),  # load the byte of TCP's flags
        (0x45, 0, 1, 0x02),  # is SYN among them?
        (0x06, 0, 0, 0),  # then keep nothing,
        (0x06, 0, 0, 0xFFFFFFFF),  # else all: handshakes that have begun come to their end
    ]
    packed = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
    program = struct.pack("HL", len(code), ctypes.addressof(packed))
    with contextlib.suppress(OSError):  # a sandbox may forbid it
        listener.setsockopt(socket.SOL_SOCKET, 26, program)  # SO_ATTACH_FILTER


class _LastAnswers:
    """The application, but what uvicorn cancels when `--drain` has passed is answered all the same.

    Attributes:
        late: requests that were.
    """

    def __init__(self, app: App) -> None:
        self._app = app
        self.late = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One ASGI connection."""
        try:
            await self._app(scope, receive, send)
        except asyncio.CancelledError:
            self.late += 1
            body = protocol.dump({"error": "the server had to end first: try again"})
            with contextlib.suppress(RuntimeError, TimeoutError):  # it has begun to answer
                async with asyncio.timeout(_FAREWELL):
                    await respond(send, 504, body)


class _Server(uvicorn.Server):
    """uvicorn with our signals, and an end that loses no connection."""

    def __init__(self, config: uvicorn.Config, app: App, listener: socket.socket) -> None:
        super().__init__(config)
        self._app, self._listener = app, listener
        self._lingering: asyncio.Task[None] | None = None

    async def run_to_end(self) -> None:
        """Start the application, serve, stop it."""
        await self._app.start()
        # A second descriptor keeps the socket alive when uvicorn closes its own.
        await self.serve(sockets=[self._listener.dup()])
        await self._app.stop(0)  # uvicorn has waited already

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        loop = asyncio.get_running_loop()
        # uvicorn's own handlers would raise the signal again at the end, for an exit code of 143.
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        host, port = self._listener.getsockname()[:2]
        address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        log.info("ready on %s, documentation on %s/docs", address, address)

    def _on_signal(self) -> None:
        if self._lingering is not None:
            self.should_exit = self.force_exit = True
            return
        log.info("stopping: not ready any more, answering what comes")
        self._app.drain()
        self._lingering = asyncio.create_task(self._linger())

    async def _linger(self) -> None:
        await asyncio.sleep(self._app.limits.linger)
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # A client may have connected, and sent its request, while the kernel still keeps the
        # connection for us: closing the socket would reset it. Take all of them, then close.
        for server in self.servers:
            server.close()
        for item in sockets or []:
            item.close()
        _turn_away(self._listener)
        await asyncio.sleep(_HANDSHAKE)
        self._listener.setblocking(False)
        taken = []
        with contextlib.suppress(BlockingIOError):
            while True:  # until there is none left
                taken.append(self._listener.accept()[0])
        self._listener.close()
        loop = asyncio.get_running_loop()
        for connection in taken:
            connection.setblocking(False)
            await loop.connect_accepted_socket(self._protocol, connection)
        # A connection without a request is closed next; the newest get time to send theirs.
        await asyncio.sleep(_ARRIVAL)
        await super().shutdown()
        if self.server_state.tasks and not self.force_exit:  # they were cancelled, and answer
            await asyncio.wait(self.server_state.tasks, timeout=_FAREWELL)

    def _protocol(self) -> asyncio.Protocol:
        kind: Any = self.config.http_protocol_class
        return kind(
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
