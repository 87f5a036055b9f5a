"""Adding and removing tasks over HTTP, in process, on a fake classifier."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from serve_client import ADMIN, ask, serve
from serve_fake import FakeClassifier

from serve.http import App

# ---- administration ------------------------------------------------------------------------------


def test_administration_is_off_without_a_token() -> None:
    for path in ("index", "models/film/load", "models/film/unload"):
        ask("POST", f"/v2/repository/{path}", 404, None, headers=ADMIN)


@pytest.mark.parametrize("given", [{}, {"authorization": "Bearer wrong"}, {"authorization": "é"}])
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


@pytest.mark.parametrize(
    "parameters",
    [
        3, {"config": "{}"}, {"config": "{", "file:prompt.safetensors": ""},
        {"config": "[]", "file:prompt.safetensors": ""},
        {"config": "{}", "file:prompt.safetensors": "?"},
        {"config": "{}", "file:prompt.safetensors": "AAAA"},
    ],
)  # fmt: skip
def test_a_malformed_upload_is_refused(parameters: Any) -> None:
    body = {"parameters": parameters}
    ask("POST", "/v2/repository/models/new/load", 400, json=body, headers=ADMIN)
