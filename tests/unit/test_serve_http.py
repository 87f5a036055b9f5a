"""Every route of the server and what it refuses, in process, on a fake classifier."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import pytest
from serve_client import ask, infer, serve
from serve_fake import FakeClassifier

from serve.http import App
from serve.metrics import Metrics

# ---- answers -------------------------------------------------------------------------------------


def test_classify_many_texts_of_mixed_tasks() -> None:
    body = {"texts": ["good good", "bad", "good"], "task": ["film", "food", "food"]}
    results = ask("POST", "/classify", 200, json=body)["results"]
    assert results[0] == {
        "task": "film",
        "label": "positive",
        "score": 0.75,
        "probabilities": {"negative": 0.25, "positive": 0.75},
        "truncated": False,
    }
    assert [r["label"] for r in results] == ["positive", "no", "yes"]


def test_classify_one_text() -> None:
    results = ask("POST", "/classify", 200, json={"text": "", "task": "film"})["results"]
    assert [r["score"] for r in results] == [0.5]


def test_the_task_may_be_left_out_when_there_is_one() -> None:
    async def story(client: httpx.AsyncClient, fake: FakeClassifier, app: App) -> None:
        assert (await client.post("/classify", json={"text": "x"})).status_code == 400
        fake.remove_task("food")
        response = await client.post("/classify", json={"text": "good"})
        assert response.json()["results"][0]["task"] == "film"

    serve(story)


def test_infer_answers_tensors() -> None:
    answer = ask("POST", "/v2/models/food/infer", 200, json=infer("good", "bad bad", id="7"))
    assert answer["model_name"] == "food" and answer["id"] == "7"
    outputs = {item["name"]: item for item in answer["outputs"]}
    assert outputs["label"]["data"] == ["yes", "no"]
    assert outputs["probabilities"]["shape"] == [2, 3]
    assert outputs["probabilities"]["data"] == pytest.approx([1 / 3, 0, 2 / 3, 3 / 4, 0, 1 / 4])
    assert outputs["score"] == {
        "name": "score", "datatype": "FP32", "shape": [2], "data": pytest.approx([2 / 3, 3 / 4]),
    }  # fmt: skip
    assert outputs["truncated"] == {
        "name": "truncated", "datatype": "BOOL", "shape": [2], "data": [False, False],
    }  # fmt: skip


def test_infer_gives_the_outputs_that_were_asked_for() -> None:
    body = infer("good", outputs=[{"name": "score"}])
    outputs = ask("POST", "/v2/models/film/infer", 200, json=body)["outputs"]
    assert [item["name"] for item in outputs] == ["score"]


def test_infer_takes_rows_of_one_column() -> None:
    tensor = {"name": "t", "shape": [2, 1], "datatype": "BYTES", "data": [["good"], ["bad"]]}
    answer = ask("POST", "/v2/models/film/infer", 200, json={"inputs": [tensor]})
    assert answer["outputs"][0]["data"] == ["positive", "negative"]


def test_metadata_and_health() -> None:
    assert ask("GET", "/v2", 200)["extensions"] == ["model_repository"]
    assert ask("GET", "/v2", 200, None)["extensions"] == []
    assert ask("GET", "/v2/health/live", 200) == {"live": True}
    assert ask("GET", "/v2/health/ready", 200) == {"ready": True}
    assert ask("GET", "/v2/models/film/ready", 200) == {"name": "film", "ready": True}
    assert ask("GET", "/", 200)["tasks"]["food"] == ["no", "so", "yes"]
    model = ask("GET", "/v2/models/food", 200)
    assert (model["name"], model["parameters"]["version"]) == ("food", "food00000000")
    assert "versions" not in model  # no route takes one
    assert model["inputs"] == [{"name": "text", "datatype": "BYTES", "shape": [-1]}]
    assert {o["name"]: o["shape"] for o in model["outputs"]}["probabilities"] == [-1, 3]


def test_the_openapi_document_has_every_route_with_an_example() -> None:
    paths = ask("GET", "/openapi.json", 200)["paths"]
    assert {"/classify", "/v2/models/{task}/infer", "/v2/health/ready", "/metrics"} <= set(paths)
    for path in ("/classify", "/v2/models/{task}/infer"):
        body = paths[path]["post"]["requestBody"]["content"]["application/json"]
        assert body["example"] and paths[path]["post"]["responses"]["429"]
    assert "/v2/repository/models/{task}/load" in paths
    assert not any("repository" in p for p in ask("GET", "/openapi.json", 200, None)["paths"])


def test_the_page_of_the_routes_loads_nothing_from_elsewhere() -> None:
    async def story(client: httpx.AsyncClient, fake: FakeClassifier, app: App) -> None:
        page = await client.get("/docs")
        assert page.status_code == 200
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert "default-src 'none'" in page.headers["content-security-policy"]
        assert "//" not in re.sub(r"^\s*//.*$", "", page.text, flags=re.MULTILINE)
        assert (await client.get("/redoc")).status_code == 404

    serve(story)


def test_null_is_as_good_as_nothing() -> None:
    body = infer("good", id=None, parameters=None, outputs=None)
    answer = ask("POST", "/v2/models/film/infer", 200, json=body)
    assert "id" not in answer and len(answer["outputs"]) == 4


@pytest.mark.parametrize("path", ["live", "ready"])
def test_health_answers_head_as_it_does_get(path: str) -> None:
    async def story(client: httpx.AsyncClient, fake: FakeClassifier, app: App) -> None:
        assert (await client.head(f"/v2/health/{path}")).status_code == 200
        app.drain()
        status = (await client.get(f"/v2/health/{path}")).status_code
        assert (await client.head(f"/v2/health/{path}")).status_code == status

    serve(story)
    assert ask("POST", f"/v2/health/{path}", 405)["error"].endswith("takes GET")


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b'"text"', b"\xff\xfe", b'{"text": "\xe9", "task": "film"}',
        b"[" * 100_000, b'{"text": "a", "task": "film", "x": ' + b"9" * 5000 + b"}",
        b'{"texts": [], "task": "film"}', b'{"texts": "a", "task": "film"}',
        b'{"texts": ["a", 1], "task": "film"}', b'{"text": null, "task": "film"}',
        b'{"text": "a", "texts": ["a"], "task": "film"}', b'{"task": "film"}',
        b'{"text": "a", "task": 3}', b'{"text": "a", "task": ["film", "film"]}',
        b'{"text": "\\ud800", "task": "film"}', b'{"text": "a", "task": "film", "truncate": 1}',
    ],
)  # fmt: skip
def test_classify_answers_400_to_what_is_not_json_or_not_text(body: bytes) -> None:
    ask("POST", "/classify", 400, content=body)


@pytest.mark.parametrize(
    "change",
    [
        {"inputs": []}, {"inputs": "a"}, {"inputs": [3]}, {"parameters": []}, {"id": 3},
        {"outputs": [{"name": "logits"}]}, {"outputs": ["label"]}, {"outputs": 3},
        {"parameters": {"truncate": "yes"}},
    ],
)  # fmt: skip
def test_infer_answers_400_to_a_malformed_request(change: dict[str, Any]) -> None:
    ask("POST", "/v2/models/film/infer", 400, json=infer("a") | change)


@pytest.mark.parametrize(
    "change",
    [
        {"datatype": "FP32"}, {"shape": [2]}, {"shape": []}, {"shape": [1, 2]}, {"shape": "1"},
        {"shape": [True]}, {"shape": None}, {"data": [1]}, {"data": []}, {"data": "a"},
        {"shape": [-1]}, {"data": None}, {"data": {}},
    ],
)  # fmt: skip
def test_infer_answers_400_to_a_malformed_tensor(change: dict[str, Any]) -> None:
    body = infer("a")
    body["inputs"][0] |= change
    ask("POST", "/v2/models/film/infer", 400, json=body)


def test_infer_answers_400_to_binary_tensors() -> None:
    headers = {"inference-header-content-length": "10"}
    ask("POST", "/v2/models/film/infer", 400, json=infer("a"), headers=headers)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/nothing"),
        ("GET", "/v2/models/nothing"),
        ("GET", "/v2/models/nothing/ready"),
        ("POST", "/v2/models/nothing/infer"),
        ("POST", "/v2/models/a/b/infer"),
        ("POST", "/v2/models/film/versions/1/infer"),
        ("POST", "/v2/models/infer"),
        ("POST", "/v2/models//infer"),
    ],
)
def test_404_for_what_is_not_there(method: str, path: str) -> None:
    ask(method, path, 404, json=infer("a"))


def test_an_unknown_task_is_404_whatever_the_body() -> None:
    ask("POST", "/v2/models/nothing/infer", 404, content=b"{")
    ask("POST", "/v2/models/film/infer", 400, content=b"{")


def test_405_names_the_method_that_a_route_takes() -> None:
    assert ask("GET", "/classify", 405)["error"] == "/classify takes POST"
    assert ask("POST", "/metrics", 405)["error"] == "/metrics takes GET"


def test_404_of_no_route_says_where_the_routes_are() -> None:
    assert ask("GET", "/clasify", 404)["error"] == "nothing is at /clasify: /docs lists the routes"
    assert len(ask("GET", "/" + "x" * 5000, 404)["error"]) < 200


@pytest.mark.parametrize("name", ["nothing", "", "x" * 5000, "\ud800", "\0", "../film"])
def test_404_for_an_unknown_task_of_classify(name: str) -> None:
    body = json.dumps({"text": "a", "task": name}).encode()
    assert len(ask("POST", "/classify", 404, content=body)["error"]) < 200


def test_an_id_that_is_no_text_does_not_break_the_answer() -> None:
    body = json.dumps(infer("good", id="\ud800")).encode()
    assert ask("POST", "/v2/models/film/infer", 200, content=body)["id"] == "?"


def test_padding_is_what_was_run_beyond_the_texts_own_tokens() -> None:
    metrics = Metrics(lambda: 7, lambda: 3)
    metrics.batch(rows=2, tokens=10, padded=12, seconds=0.25)
    metrics.batch(rows=3, tokens=9, padded=15, seconds=0.5)
    lines = metrics.page().decode().splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    wanted = {
        "padding_tokens_total": 2 + 6, "batch_tokens_sum": 19, "batch_texts_sum": 5,
        "batch_texts_count": 2, "run_seconds_sum": 0.75, "queue_depth": 7, "tasks": 3,
    }  # fmt: skip
    assert {name: float(values[f"metapt_{name}"]) for name in wanted} == wanted
