"""Generated hostile requests against the whole application on a toy bundle: never a 500, always one
JSON object with an error or an answer. `benchmarks/hostile.py` sends many more to a real process.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import serve_toy as toy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serve_requests import ALLOWED, bodies, headers, methods, paths, texts

from serve.classifier import Classifier
from serve.http import App, Limits

COUNT = 200


class Server:
    """The application on its own loop, kept over all examples, as a server would be."""

    def __init__(self, folder: Path) -> None:
        classifier = Classifier(folder, threads=1)
        self.app = App(classifier, Limits(max_wait=0, max_queue=30, max_body=200_000), "secret")
        self.runner = asyncio.Runner()
        self.runner.run(self.app.start())

    def ask(self, method: str, path: str, body: bytes, given: dict[str, str]) -> httpx.Response:
        async def go() -> httpx.Response:
            transport = httpx.ASGITransport(self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await client.request(method, path, content=body, headers=given)

        return self.runner.run(go())

    def close(self) -> None:
        self.runner.run(self.app.stop())
        self.runner.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(toy.make_bundle(tmp_path_factory.mktemp("hostile") / "b"))
    yield server
    server.close()


@settings(max_examples=COUNT, deadline=None, suppress_health_check=list(HealthCheck))
@given(method=methods, path=paths, body=bodies, given_headers=headers)
def test_no_request_breaks_the_server(
    server: Server, method: str, path: str, body: Any, given_headers: dict[str, str]
) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = server.ask(method, path, content, given_headers)
    assert response.status_code in ALLOWED, response.text
    if method != "HEAD":
        value = response.json()
        assert ("error" in value) == (response.status_code != 200)
    assert server.app.batcher.waiting == 0


@settings(max_examples=COUNT, deadline=None, suppress_health_check=list(HealthCheck))
@given(given_texts=st.lists(texts, min_size=1, max_size=20))
def test_whatever_is_text_is_answered_in_order(server: Server, given_texts: list[str]) -> None:
    body = json.dumps({"texts": given_texts, "task": "food"}).encode()
    response = server.ask("POST", "/classify", body, {})
    if any("\ud800" <= character <= "\udfff" for text in given_texts for character in text):
        assert response.status_code in (200, 400)  # halves that meet make a character
    elif len(body) > 200_000:
        assert response.status_code == 413
    else:
        assert response.status_code == 200, response.text
        results = response.json()["results"]
        assert len(results) == len(given_texts)
        for text, result in zip(given_texts, results, strict=True):
            (alone,) = server.app.classifier.classify([text], task="food")
            assert result["probabilities"] == pytest.approx(alone.probabilities, abs=1e-5)
            assert sum(result["probabilities"].values()) == pytest.approx(1, abs=1e-4)
