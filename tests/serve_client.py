"""Requests to a server in process, on a fake classifier."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
from serve_fake import FakeClassifier

from serve.http import App, Limits

TOKEN = "secret"
ADMIN = {"authorization": f"Bearer {TOKEN}"}


def serve(
    story: Callable[[httpx.AsyncClient, FakeClassifier, App], Awaitable[None]],
    token: str | None = TOKEN,
    **limits: Any,
) -> None:
    async def main() -> None:
        fake = FakeClassifier()
        app = App(fake, Limits(**({"max_wait": 0.0, "max_queue": 20} | limits)), token)  # type: ignore[arg-type]
        await app.start()
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            try:
                await asyncio.wait_for(story(client, fake, app), 20)
            finally:
                fake.gate.set()
                await app.stop()

    asyncio.run(main())


def ask(method: str, path: str, status: int, token: str | None = TOKEN, **request: Any) -> Any:
    """One request to a fresh server; its JSON, after the status was checked."""
    result: list[Any] = []

    async def story(client: httpx.AsyncClient, fake: FakeClassifier, app: App) -> None:
        response = await client.request(method, path, **request)
        assert response.status_code == status, response.text
        assert response.headers["content-type"] == "application/json"
        result.append(response.json())

    serve(story, token)
    if status >= 400:
        assert set(result[0]) == {"error"} and isinstance(result[0]["error"], str)
    return result[0]


def infer(*texts: Any, **more: Any) -> dict[str, Any]:
    tensor = {"name": "text", "shape": [len(texts)], "datatype": "BYTES", "data": list(texts)}
    return {"inputs": [tensor], **more}
