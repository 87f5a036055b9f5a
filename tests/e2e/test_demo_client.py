"""The demo's endpoints through gradio_client, as another program would call them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import serve_toy as toy
from demo_page import served_page

from serve.classifier import Classifier

pytest.importorskip("gradio")
gradio_client = pytest.importorskip("gradio_client")

TEXT = "the film was very long and great"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Any]]:
    with served_page(toy.make_bundle(tmp_path_factory.mktemp("demo") / "bundle")) as found:
        yield found


def client(address: str) -> Any:
    # A busy machine may take longer than the five seconds that are the default.
    return gradio_client.Client(address, verbose=False, httpx_kwargs={"timeout": 120})


def test_the_endpoints_have_names_and_no_others_are_open(page: tuple[str, Any]) -> None:
    found = client(page[0]).view_api(return_format="dict")
    assert set(found["named_endpoints"]) == {"/tasks", "/classify", "/classify_many", "/explain",
                                             "/compare"}  # fmt: skip
    assert not found["unnamed_endpoints"]


def test_classify_answers_as_serve_does(page: tuple[str, Any]) -> None:
    address, room = page
    result = client(address).predict(TEXT, "food", api_name="/classify")
    direct = Classifier(room.classifier.bundle.folder, threads=1).classify([TEXT], "food")[0]
    assert result["label"] == direct.label
    assert result["probabilities"] == pytest.approx(direct.probabilities, abs=1e-6)
    assert result["milliseconds"] > 0


def test_many_texts_keep_their_order(page: tuple[str, Any]) -> None:
    address, room = page
    texts = [" ".join(["good"] * (1 + i % 7) + ["bad"] * (i % 3)) for i in range(40)]
    found = client(address).predict(texts, "film", api_name="/classify_many")
    direct = room.classifier.classify(texts, "film")
    assert [r["label"] for r in found["results"]] == [r.label for r in direct]


@pytest.mark.parametrize(
    ("arguments", "endpoint", "message"),
    [
        (("x", "nothing"), "/classify", "no task “nothing” here"),
        (("x" * 5001, "film"), "/classify", "5,001 characters"),
        ((["x"] * 1001, "film"), "/classify_many", "at most 1000 texts"),
        ((["x", 5], "film"), "/classify_many", "list of strings"),
        ((" ", "film"), "/explain", "no word"),
        (("",), "/compare", "Type a text"),
    ],
)
def test_wrong_input_gets_a_sentence(
    page: tuple[str, Any], arguments: tuple[Any, ...], endpoint: str, message: str
) -> None:
    with pytest.raises(Exception, match=message) as raised:
        client(page[0]).predict(*arguments, api_name=endpoint)
    assert "Traceback" not in str(raised.value)


def test_explain_and_compare(page: tuple[str, Any]) -> None:
    address, _ = page
    found = client(address).predict(TEXT, "film", api_name="/explain")
    assert [word["word"] for word in found["words"]] == TEXT.split()
    table = client(address).predict(TEXT, api_name="/compare")
    assert set(table["answers"]) == {"film", "food"}
    assert set(table["answers"]["film"]) == {"tuned", "random"}


def test_a_clients_task_is_not_seen_by_another(page: tuple[str, Any]) -> None:
    address, room = page
    ada, bob = client(address), client(address)
    assert ada.session_hash != bob.session_hash
    record = toy.record(["left", "right"], ["dull", "nice"])
    room.add(ada.session_hash, "side", record, {"prompt_embeddings": toy.prompt_of(5)})
    assert ada.predict(api_name="/tasks") == {
        "film": ["negative", "positive"], "food": ["no", "so-so", "yes"],
        "side": ["left", "right"],
    }  # fmt: skip
    assert set(ada.predict(TEXT, "side", api_name="/classify")["probabilities"]) == {
        "left", "right"
    }  # fmt: skip
    assert "side" not in bob.predict(api_name="/tasks")
    with pytest.raises(Exception, match="no task “side” here"):
        bob.predict(TEXT, "side", api_name="/classify")
    room.leave(ada.session_hash)


def test_eight_users_at_once_get_their_own_answers(page: tuple[str, Any]) -> None:
    address, room = page
    clients = [client(address) for _ in range(8)]
    tasks = ["film", "food"] * 4
    texts = [f"{'good ' * (i + 1)}film" for i in range(8)]

    def visit(number: int) -> list[Any]:
        return [
            clients[number].predict(texts[number], tasks[number], api_name="/classify")
            for _ in range(3)
        ]

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(visit, range(8)))
    for number in range(8):
        direct = room.classifier.classify([texts[number]], tasks[number])[0]
        for answer in found[number]:
            assert answer["label"] == direct.label
            assert answer["probabilities"] == pytest.approx(direct.probabilities, abs=1e-6)
