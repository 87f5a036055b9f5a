"""Every route and status of the server, in process, on a fake classifier."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
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
    assert (model["name"], model["versions"]) == ("food", ["food00000000"])
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


@pytest.mark.parametrize("name", ["nothing", "", "x" * 5000, "\ud800", "\0", "../film"])
def test_404_for_an_unknown_task_of_classify(name: str) -> None:
    body = json.dumps({"text": "a", "task": name}).encode()
    assert len(ask("POST", "/classify", 404, content=body)["error"]) < 200


def test_an_id_that_is_no_text_does_not_break_the_answer() -> None:
    body = json.dumps(infer("good", id="\ud800")).encode()
    assert ask("POST", "/v2/models/film/infer", 200, content=body)["id"] == "?"


def test_405_for_a_wrong_method() -> None:
    assert "error" in ask("GET", "/classify", 405)


def test_413_for_a_long_body_with_and_without_a_length() -> None:
    async def pieces() -> Any:
        for _ in range(30):
            yield b"x" * 100

    async def story(client: httpx.AsyncClient, fake: FakeClassifier, app: App) -> None:
        for content in (b"x" * 1001, pieces()):
            response = await client.post("/classify", content=content)
            assert response.status_code == 413 and "1000 bytes" in response.json()["error"]

    serve(story, max_body=1000)


def test_415_for_a_compressed_body() -> None:
    ask("POST", "/classify", 415, content=b"x", headers={"content-encoding": "gzip"})


def test_a_long_text_is_cut_or_refused_as_the_caller_says() -> None:
    text = "good " * 60
    cut = ask("POST", "/classify", 200, json={"text": text, "task": "film"})["results"][0]
    assert cut["truncated"] is True
    refused = ask(
        "POST", "/classify", 422, json={"texts": ["a", text], "task": "film", "truncate": False}
    )
    assert "text 1 " in refused["error"] and "49 tokens" in refused["error"]
    body = infer(text, parameters={"truncate": False})
    ask("POST", "/v2/models/film/infer", 422, json=body)


def test_422_for_more_texts_than_the_queue_holds() -> None:
    ask("POST", "/classify", 422, json={"texts": ["a"] * 21, "task": "film"})


def test_429_past_the_queue_and_nothing_is_lost() -> None:
    async def story(client: httpx.AsyncClient, fake: FakeClassifier, app: App) -> None:
        fake.gate.clear()
        body = {"text": "good", "task": "film"}
        first = asyncio.create_task(client.post("/classify", json=body))
        await asyncio.sleep(0.1)
        waiting = [asyncio.create_task(client.post("/classify", json=body)) for _ in range(20)]
        await asyncio.sleep(0.1)
        refused = await client.post("/classify", json=body)
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        many = await client.post("/classify", json={"texts": ["a", "b"], "task": "film"})
        assert many.status_code == 429
        fake.gate.set()
        answers = await asyncio.gather(first, *waiting)
        assert [a.status_code for a in answers] == [200] * 21

    serve(story)


def test_504_past_the_deadline() -> None:
    async def story(client: httpx.AsyncClient, fake: FakeClassifier, app: App) -> None:
        fake.gate.clear()
        response = await client.post("/classify", json={"text": "a", "task": "film"})
        assert response.status_code == 504

    serve(story, deadline=0.2)


def test_408_for_a_body_that_does_not_come() -> None:
    async def slow() -> Any:
        yield b"{"
        await asyncio.sleep(5)

    async def story(client: httpx.AsyncClient, fake: FakeClassifier, app: App) -> None:
        assert (await client.post("/classify", content=slow())).status_code == 408

    serve(story, deadline=0.2)


def test_503_for_a_task_that_fails_and_the_others_go_on() -> None:
    async def story(client: httpx.AsyncClient, fake: FakeClassifier, app: App) -> None:
        fake.broken.add("food")
        bad = await client.post("/classify", json={"text": "a", "task": "food"})
        good = await client.post("/classify", json={"text": "a", "task": "film"})
        assert (bad.status_code, good.status_code) == (503, 200)
        assert "damaged" not in bad.text  # the reason is the operator's, not the client's

    serve(story)


def test_a_client_that_disconnects_costs_no_more_work() -> None:
    async def story(client: httpx.AsyncClient, fake: FakeClassifier, app: App) -> None:
        fake.gate.clear()
        body = json.dumps({"text": "good", "task": "film"}).encode()
        busy = asyncio.create_task(client.post("/classify", content=body))
        await asyncio.sleep(0.1)
        left = asyncio.Event()
        sent: list[Any] = []
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Any:
            if messages:
                return messages.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/classify", "headers": []}
        gone = asyncio.create_task(app(scope, receive, send))
        await asyncio.sleep(0.1)
        assert app.batcher.waiting == 1
        left.set()
        await gone
        assert app.batcher.waiting == 0 and sent == []
        fake.gate.set()
        assert (await busy).status_code == 200
        assert len(fake.batches) == 1
        assert 'outcome="cancelled"' in (await client.get("/metrics")).text

    serve(story)


def test_not_ready_while_draining_but_what_comes_is_answered() -> None:
    async def story(client: httpx.AsyncClient, fake: FakeClassifier, app: App) -> None:
        app.drain()
        ready = await client.get("/v2/health/ready")
        model = await client.get("/v2/models/film/ready")
        live = await client.get("/v2/health/live")
        assert (ready.status_code, model.status_code, live.status_code) == (503, 503, 200)
        answer = await client.post("/classify", json={"text": "good", "task": "film"})
        assert answer.status_code == 200 and answer.headers["connection"] == "close"

    serve(story)


def test_not_ready_while_a_batch_hangs() -> None:
    async def story(client: httpx.AsyncClient, fake: FakeClassifier, app: App) -> None:
        fake.gate.clear()
        await client.post("/classify", json={"text": "a", "task": "film"})
        await asyncio.sleep(0.05)
        assert (await client.get("/v2/health/ready")).status_code == 503

    serve(story, deadline=0.1)


# ---- metrics -------------------------------------------------------------------------------------


def test_metrics_count_requests_by_task_and_outcome() -> None:
    async def story(client: httpx.AsyncClient, fake: FakeClassifier, app: App) -> None:
        await client.post("/classify", json={"texts": ["a b", "c"], "task": "film"})
        await client.post("/v2/models/film/infer", json=infer("a"))
        await client.post("/classify", json={"texts": ["a", "b"], "task": ["film", "food"]})
        await client.post("/classify", json={"text": "a", "task": "made-up-by-a-client"})
        page = (await client.get("/metrics")).text
        lines = dict(line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#"))
        assert lines['metapt_requests_total{outcome="ok",task="film"}'] == "2.0"
        assert lines['metapt_requests_total{outcome="ok",task="mixed"}'] == "1.0"
        assert lines['metapt_requests_total{outcome="404",task=""}'] == "1.0"
        assert lines['metapt_texts_total{task="film"}'] == "3.0"
        assert lines["metapt_batch_texts_sum"] == "5.0"
        # Each of the fake's texts is its words and one suffix token.
        assert lines["metapt_batch_tokens_sum"] == "11.0"
        assert lines["metapt_queue_seconds_count"] == "5.0"
        assert lines["metapt_run_seconds_count"] == lines["metapt_batch_texts_count"]
        assert lines["metapt_tokenize_seconds_count"] == "3.0"
        assert (lines["metapt_queue_depth"], lines["metapt_tasks"]) == ("0.0", "2.0")
        assert "made-up" not in page

    serve(story)


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
