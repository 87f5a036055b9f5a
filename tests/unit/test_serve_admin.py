"""Adding and removing tasks over HTTP, in process, on a fake classifier."""

from __future__ import annotations

import base64
import threading
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors.numpy import save
from serve_client import ADMIN, ask, serve
from serve_fake import FakeClassifier

from serve import routes
from serve.http import App
from serve.options import ServerConfig, admin_token

# ---- administration ------------------------------------------------------------------------------


def test_administration_is_off_without_a_token() -> None:
    for path in ("index", "models/film/load", "models/film/unload"):
        ask("POST", f"/v2/repository/{path}", 404, None, headers=ADMIN)


@pytest.mark.parametrize(
    "given",
    [
        {}, {"authorization": "Bearer wrong"}, {"authorization": "é"}, {"authorization": "secret"},
        {"authorization": "Basic secret"},
    ],
)  # fmt: skip
def test_administration_needs_the_token(given: dict[str, str]) -> None:
    headers = {key: value.encode() for key, value in given.items()}
    for path in ("index", "models/film/load", "models/film/unload"):
        ask("POST", f"/v2/repository/{path}", 401, headers=headers)


def test_tasks_are_added_and_removed_while_it_runs() -> None:
    async def story(client: httpx.AsyncClient, fake: FakeClassifier, app: App) -> None:
        async def post(path: str, status: int) -> Any:
            response = await client.post(f"/v2/repository/{path}", headers=ADMIN)
            assert response.status_code == status
            return response.json()

        assert (await post("models/new/load", 200))["name"] == "new"
        assert [m["name"] for m in await post("index", 200)] == ["film", "food", "new"]
        body = {"text": "good", "task": "new"}
        assert (await client.post("/classify", json=body)).status_code == 200
        await post("models/new/unload", 200)
        assert (await client.post("/classify", json=body)).status_code == 404
        assert "no task 'unknown'" in (await post("models/unknown/load", 404))["error"]
        await post("models/unknown/unload", 404)

    serve(story)


def test_the_name_of_the_scheme_may_be_written_in_any_case() -> None:
    ask("POST", "/v2/repository/index", 200, headers={"authorization": "bearer secret"})


@pytest.mark.parametrize("token", ["géheim", "秘密à", "a b"])
def test_a_token_is_compared_by_its_bytes(token: str) -> None:
    given = {b"authorization": f"Bearer {token}".encode()}
    ask("POST", "/v2/repository/index", 200, token, headers=given)
    ask("POST", "/v2/repository/index", 401, token + "x", headers=given)


def test_white_space_around_the_token_is_not_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert admin_token(ServerConfig("b", admin_token="secret\n")) == "secret"
    monkeypatch.setenv("METAPT_ADMIN_TOKEN", " \n")
    assert admin_token(ServerConfig("b")) is None
    monkeypatch.setenv("METAPT_ADMIN_TOKEN", "secret\r\n")
    assert admin_token(ServerConfig("b")) == "secret"


def test_the_openapi_document_defines_the_scheme_of_the_token() -> None:
    document = ask("GET", "/openapi.json", 200)
    scheme = document["components"]["securitySchemes"]["admin"]
    assert (scheme["type"], scheme["scheme"]) == ("http", "bearer")
    for path in ("index", "models/{task}/load", "models/{task}/unload"):
        assert document["paths"][f"/v2/repository/{path}"]["post"]["security"] == [{"admin": []}]


def test_an_error_that_nobody_thought_of_is_json_too() -> None:
    async def story(client: httpx.AsyncClient, fake: FakeClassifier, app: App) -> None:
        def fail(*_: object) -> None:
            raise PermissionError(13, "Permission denied", "/bundle/bundle.json")

        fake.add_task = fail  # type: ignore[method-assign, assignment]
        response = await client.post("/v2/repository/models/film/load", headers=ADMIN)
        assert response.status_code == 500
        assert response.json() == {"error": "internal error; the server's log says why"}

    serve(story)


@pytest.mark.parametrize("body", [b"", b"{}", b'{"parameters": null}'])
def test_a_load_without_parameters_reads_the_folder(body: bytes) -> None:
    ask("POST", "/v2/repository/models/new/load", 200, content=body, headers=ADMIN)


@pytest.mark.parametrize(
    "parameters",
    [
        3, [], {"config": "{}"}, {"config": "{", "file:prompt.safetensors": ""},
        {"config": "[]", "file:prompt.safetensors": ""},
        {"config": "{}", "file:prompt.safetensors": "?"},
        {"config": "{}", "file:prompt.safetensors": "AAAA"},
    ],
)  # fmt: skip
def test_a_malformed_upload_is_refused(parameters: Any) -> None:
    body = {"parameters": parameters}
    ask("POST", "/v2/repository/models/new/load", 400, json=body, headers=ADMIN)


def test_an_upload_may_be_in_lines_and_is_decoded_beside_the_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = save({"prompt_embeddings": np.ones((5, 8), np.float32)})
    found: list[tuple[bytes, str]] = []

    def parse(content: bytes, *_: object) -> None:
        found.append((content, threading.current_thread().name))

    monkeypatch.setattr(routes, "parse_prompt", parse)
    text = base64.encodebytes(data).decode()
    assert "\n" in text.strip()
    body = {"parameters": {"config": "{}", "file:prompt.safetensors": text.replace("\n", "\r\n")}}
    ask("POST", "/v2/repository/models/new/load", 200, json=body, headers=ADMIN)
    assert [content for content, _ in found] == [data]
    assert found[0][1] != threading.main_thread().name


@pytest.mark.parametrize(
    ("config", "file", "message"),
    [("{", "AAAA", "'config' is not JSON"),
     ("{}", "A?==", "'file:prompt.safetensors' is not base64"),
     ("[" * 10**6, "", "'config' is not JSON: nested too deeply")],
)  # fmt: skip
def test_what_is_wrong_with_an_upload_is_told_apart(config: str, file: str, message: str) -> None:
    body = {"parameters": {"config": config, "file:prompt.safetensors": file}}
    answer = ask("POST", "/v2/repository/models/new/load", 400, json=body, headers=ADMIN)
    assert answer["error"].startswith(message)
