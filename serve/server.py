"""Running the application with uvicorn, and ending it without losing a request."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket

import uvicorn
from prometheus_client import disable_created_metrics

from serve.classifier import Classifier
from serve.errors import Failure
from serve.http import App, Limits

log = logging.getLogger(__name__)

_CONNECTIONS = 4096  # open at once; beyond it the server answers 503


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
        0 when every accepted request was answered, otherwise 1.

    Raises:
        Failure: the address cannot be listened on.
    """
    disable_created_metrics()  # a second series for each counter that nobody reads
    app = App(classifier, limits, admin_token)
    listener = _listen(host, port)
    config = uvicorn.Config(
        app,
        log_config=None,
        log_level="info" if access_log else "warning",
        access_log=access_log,
        lifespan="on",
        server_header=False,
        date_header=False,
        limit_concurrency=_CONNECTIONS,
        backlog=2048,
        timeout_graceful_shutdown=max(1, round(limits.drain)),
    )
    server = uvicorn.Server(config)
    name = f"[{host}]" if ":" in host else host
    address = f"http://{name}:{listener.getsockname()[1]}"
    with listener, asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        return runner.run(_serve(app, server, listener, address))


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise Failure(
            f"cannot listen on {host} port {port} ({error.strerror or error}): "
            "pass another --host or --port"
        ) from None


async def _serve(app: App, server: uvicorn.Server, listener: socket.socket, address: str) -> int:
    loop = asyncio.get_running_loop()
    lingering: list[asyncio.Task[None]] = []

    async def end() -> None:
        await asyncio.sleep(app.limits.linger)
        server.should_exit = True

    def on_signal() -> None:
        if lingering:
            server.should_exit = server.force_exit = True
            return
        log.info("stopping: not ready, answering what has come")
        app.drain()
        lingering.append(asyncio.create_task(end()))

    async def announce() -> None:
        while not server.started:
            await asyncio.sleep(0.01)
        # uvicorn's own handlers would raise the signal again at the end, for an exit code of 143.
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, on_signal)
        log.info("ready on %s, documentation on %s/docs", address, address)

    announcing = asyncio.create_task(announce())
    await server.serve(sockets=[listener])
    announcing.cancel()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.remove_signal_handler(number)
    if not server.started:
        raise Failure("the server did not start; the reason stands above")
    return 0 if app.all_answered else 1
