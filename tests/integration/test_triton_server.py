"""The model repository in Triton's own server."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import serve_toy as toy
from triton_server import Server, installed
from triton_stand import TEXTS, TritonError, assert_answers, column

from exporter.triton import Settings, export_triton
from serve.classifier import Classifier

COMPANY = 50.0  # milliseconds that a request waits for others


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    installed()
    made = toy.make_bundle(tmp_path_factory.mktemp("triton") / "b")
    toy.add(made, "warm", ["a", "b"], ["dull", "nice"], toy.prompt_of(5), temperature=2.5)
    return made


@pytest.fixture(scope="module")
def repository(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("models") / "r"
    export_triton(folder, out, Settings(threads=1, max_delay=COMPANY))
    return out


@pytest.fixture(scope="module")
def server(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(repository, tmp_path_factory.mktemp("server"))
    yield server
    server.stop()


def test_triton_answers_as_the_classifier(server: Server, folder: Path) -> None:
    assert_answers(server, folder)


def test_requests_of_different_tasks_share_batches(
    server: Server, folder: Path, repository: Path
) -> None:
    classifier = Classifier(folder, threads=1)
    names = list(classifier.tasks)
    asked = [(TEXTS[i % len(TEXTS)], names[i % len(names)]) for i in range(84)]
    runs = repository / "metapt_graph" / "runs.txt"
    runs.unlink(missing_ok=True)

    def ask(pair: tuple[str, str]) -> tuple[str, float]:
        got = server.infer("metapt", TEXT=column([pair[0]]), TASK=column([pair[1]]))
        return got["LABEL"][0, 0].decode(), float(got["SCORE"][0, 0])

    with ThreadPoolExecutor(21) as pool:
        answers = list(pool.map(ask, asked))
    texts, tasks = zip(*asked, strict=True)
    for (label, score), wanted in zip(answers, classifier.classify(texts, tasks), strict=True):
        assert (label, score) == (wanted.label, pytest.approx(wanted.score, abs=1e-5))
    batches = [line.split() for line in runs.read_text().splitlines()]
    assert sum(map(len, batches)) == len(asked)
    assert max(len(set(batch)) for batch in batches) > 1  # one run for rows of several tasks


def test_what_cannot_be_answered_is_said(server: Server) -> None:
    with pytest.raises(TritonError, match="no task 'none': there are film, food, warm"):
        server.infer("metapt", TEXT=column(["good"]), TASK=column(["none"]))
    with pytest.raises(TritonError, match="batch-size must be <= 32"):
        server.infer("metapt", TEXT=column(["good"] * 33), TASK=column(["film"] * 33))
    got = server.infer("metapt", TEXT=column(["good"]), TASK=column(["film"]))
    assert got["SCORE"].shape == (1, 1)
