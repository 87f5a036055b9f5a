"""The bounds of the server and its end, in process, on a fake classifier."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Sequence
from typing import Any

import httpx
from serve_client import ask, infer, serve
from serve_fake import FakeClassifier

from serve.http import App
from serve.task import Task
from serve.tokenize import Encoded


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


def test_504_while_long_texts_wait_to_be_tokenized_and_the_work_is_spared() -> None:
    async def story(client: httpx.AsyncClient, fake: FakeClassifier, app: App) -> None:
        gate, seen, encode = threading.Event(), list[str](), fake.encoder.encode

        def slow(texts: Sequence[str], tasks: Sequence[Task]) -> list[Encoded]:
            seen.extend(texts)
            gate.wait(10)
            return encode(texts, tasks)

        fake.encoder.encode = slow  # type: ignore[method-assign]
        bodies = [{"texts": [f"{name} " * 300] * 10, "task": "film"} for name in "ab"]
        answers = await asyncio.gather(*(client.post("/classify", json=b) for b in bodies))
        assert [answer.status_code for answer in answers] == [504, 504]
        assert app.batcher.waiting == 0
        gate.set()
        app.side.submit(lambda: None).result(10)  # what was before it is done
        # The first request's texts were under way; of the second none was begun.
        assert len(seen) < 10 and len(set(seen)) == 1

    serve(story, deadline=0.2)


def test_long_texts_are_tokenized_in_parts_and_in_order() -> None:
    texts = ["good " * 150 if n % 3 else "bad " * 150 for n in range(20)]
    results = ask("POST", "/classify", 200, json={"texts": texts, "task": "film"})["results"]
    labels = ["positive" if n % 3 else "negative" for n in range(20)]
    assert [result["label"] for result in results] == labels


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
        await client.post("/v2/models/film/infer", content=b"{")
        await client.post("/v2/models/food/infer", content=b"x" * 2**21)
        await client.post("/v2/models/made-up-by-a-client/infer", content=b"{")
        page = (await client.get("/metrics")).text
        lines = dict(line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#"))
        assert lines['metapt_requests_total{outcome="ok",task="film"}'] == "2.0"
        assert lines['metapt_requests_total{outcome="ok",task="mixed"}'] == "1.0"
        assert lines['metapt_requests_total{outcome="404",task=""}'] == "2.0"
        assert lines['metapt_requests_total{outcome="400",task="film"}'] == "1.0"
        assert lines['metapt_requests_total{outcome="413",task="food"}'] == "1.0"
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
