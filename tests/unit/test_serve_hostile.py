"""Generated hostile requests against the whole application on a toy bundle: never a 500, always one
JSON object with an error or an answer. `METAPT_HOSTILE=10000` sets how many (docs/robustness.md).
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import serve_toy as toy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve.classifier import Classifier
from serve.http import App, Limits

COUNT = int(os.environ.get("METAPT_HOSTILE", "200"))
ALLOWED = {200, 400, 404, 405, 413, 415, 422, 429, 503, 504}

# Characters of every plane, lone surrogates included (JSON can spell them, UTF-8 cannot).
characters = st.characters()
texts = st.one_of(
    st.text(characters, max_size=60),
    st.sampled_from(["", " ", "\0", "</s>", "<extra_id_0>", "<pad>" * 50, "\u202e", "a" * 20_000,
                     "\U0010ffff" * 300, "e\u0301" * 4000, "\n" * 5000, "good " * 5000]),
)  # fmt: skip
values: st.SearchStrategy[Any] = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)
tasks = st.one_of(st.sampled_from(["film", "food", "nothing", "../film"]), texts, values)
tensors = st.fixed_dictionaries(
    {},
    optional={
        "name": values,
        "shape": st.one_of(st.lists(st.integers(-2, 5), max_size=3), values),
        "datatype": st.one_of(st.just("BYTES"), values),
        "data": st.one_of(st.lists(texts, max_size=5), values),
    },
)
bodies = st.one_of(
    st.binary(max_size=200),
    st.fixed_dictionaries(
        {},
        optional={
            "text": st.one_of(texts, values),
            "texts": st.one_of(st.lists(texts, max_size=40), values),
            "task": tasks,
            "truncate": st.one_of(st.booleans(), values),
        },
    ),
    st.fixed_dictionaries({"texts": st.lists(texts, max_size=40), "task": st.just("film")}),
    st.fixed_dictionaries(
        {"inputs": st.one_of(st.lists(tensors, max_size=2), values)},
        optional={"id": values, "outputs": values, "parameters": values},
    ),
    values,
)
segments = st.sampled_from(["film", "food", "nothing", "..", "%2e%2e", "a" * 300, "\u00e9"])
paths = st.one_of(
    st.sampled_from(["/classify", "/v2/models/film/infer", "/v2/models/food/infer", "/v2", "/"]),
    st.builds("/v2/models/{}/infer".format, segments),
    st.builds("/v2/models/{}/ready".format, segments),
    st.builds("/v2/repository/models/{}/load".format, segments),
    st.builds("/{}/{}".format, segments, segments),
)
methods = st.sampled_from(["POST"] * 8 + ["GET", "PUT", "DELETE", "OPTIONS", "HEAD"])
headers = st.dictionaries(
    st.sampled_from(["content-type", "content-encoding", "authorization", "accept", "x-odd"]),
    st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=30),
    max_size=2,
)


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
    assert response.status_code in ALLOWED | {401}, response.text
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
        for result in results:
            assert sum(result["probabilities"].values()) == pytest.approx(1, abs=1e-4)
