"""The server as a process, on a toy bundle: imports, signals, and tasks that come and go."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import serve_toy as toy
from serve_process import ROOT, TOKEN, Process, ask, running


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.make_bundle(tmp_path_factory.mktemp("process") / "b")


def test_classifying_and_serving_import_neither_torch_nor_transformers(folder: Path) -> None:
    code = f"""
import sys, asyncio
import serve.__main__, serve.server
from serve import Classifier
from serve.http import App, Limits
classifier = Classifier({str(folder)!r}, threads=1)
assert classifier.classify(["good"], task="film")
App(classifier, Limits())
heavy = {{"torch", "transformers", "onnx", "sklearn", "scipy", "pandas", "gradio", "peft"}}
own = {{"trainer", "exporter", "demo"}}
sys.exit(", ".join(sorted((heavy | own) & set(sys.modules))) or None)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("first", ["serve.engine", "exporter.verify"])
def test_onnxruntime_reports_nothing(folder: Path, tmp_path: Path, first: str) -> None:
    """Its packages keep an id of the device and a queue of events in the user's cache otherwise."""
    code = f"""
import {first}
from serve import Classifier
assert Classifier({str(folder)!r}, threads=1).classify(["good"], task="film")
"""
    kept_apart = ("CI", "ORT_RUNNING_UNIT_TESTS", "ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME")
    environment = {key: value for key, value in os.environ.items() if key not in kept_apart}
    environment |= {"HOME": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert not any("Microsoft" in str(path) for path in tmp_path.rglob("*"))


def test_the_command_line_base_imports_no_runtime() -> None:
    code = (
        "import sys, serve.errors, serve.files, serve.cli; sys.exit('onnxruntime' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_sigterm_under_load_loses_no_request(folder: Path) -> None:
    outcomes: list[str] = []

    def work(process: Process, text: str) -> None:
        connection = process.connect()
        while True:
            try:
                connection.connect()
            except ConnectionError:
                return  # the server does not listen any more: nothing was accepted
            closes = False
            while not closes:
                try:
                    status, value, closes = ask(
                        connection, "/classify", {"text": text, "task": "film"}
                    )
                    outcomes.append(f"{status} {value.get('results', [value])[0].get('label')}")
                except Exception as error:  # whatever came is no answer
                    outcomes.append(f"lost: {error!r}")
                    return
            connection.close()

    with running(folder, "--max-wait", "20", "--linger", "0.5") as process:
        threads = [threading.Thread(target=work, args=(process, "good " * n)) for n in range(1, 17)]
        for thread in threads:
            thread.start()
        while len(outcomes) < 100:
            time.sleep(0.01)
        assert process.end() == 0
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()
    assert len(outcomes) >= 100 and set(outcomes) == {"200 positive"}


def test_sigterm_makes_it_unready_at_once_and_answers_what_waits(folder: Path) -> None:
    with running(folder, "--max-wait", "60000", "--deadline", "100", "--linger", "1") as process:
        waiting = process.connect()
        waiting.request("POST", "/classify", json.dumps({"text": "good", "task": "film"}))
        time.sleep(0.3)  # it waits for company now
        process.popen.send_signal(signal.SIGTERM)
        response = waiting.getresponse()
        assert response.status == 200 and json.loads(response.read())["results"]
        status, value, closes = ask(process.connect(), "/v2/health/ready")
        assert (status, closes) == (503, True) and "not ready" in value["error"]
        assert process.popen.wait(30) == 0


HANGS = """
import threading
from serve_fake import FakeClassifier
from serve.cli import Command, main, option
from serve.options import ServerConfig, make_limits
from serve.server import serve_forever

def run(config):
    fake = FakeClassifier()
    fake.run = lambda batch: threading.Event().wait()
    return serve_forever(fake, make_limits(config), config.host, config.port)

main("hangs", "", {"http": Command(ServerConfig, run)})
"""


@pytest.mark.parametrize(("drain", "signals"), [("0.5", 1), ("600", 2)])
def test_a_batch_that_hangs_is_answered_counted_and_does_not_keep_the_process(
    tmp_path: Path, drain: str, signals: int
) -> None:
    flags = ("--deadline", "600", "--drain", drain)
    with running(tmp_path, *flags, program=("-c", HANGS)) as process:
        waiting, other = process.connect(), process.connect()
        waiting.request("POST", "/classify", json.dumps({"text": "good", "task": "film"}))
        page, end = b"", time.monotonic() + 60
        while b"metapt_queue_seconds_count 1.0" not in page:  # it runs now
            assert time.monotonic() < end, page.decode()
            other.request("GET", "/metrics")
            page = other.getresponse().read()
        for _ in range(signals):
            process.popen.send_signal(signal.SIGTERM)
            time.sleep(0.2)  # or the system would make one of two
        response = waiting.getresponse()
        assert response.status == 504 and set(json.loads(response.read())) == {"error"}
        assert process.popen.wait(30) == 1
        assert process.popen.stderr is not None
        assert "Traceback" not in process.popen.stderr.read()


FILLS = """
import threading
from serve.__main__ import COMMANDS
from serve.classifier import Classifier
from serve.cli import main

def warm(self):
    print("filling", flush=True)
    threading.Event().wait()

Classifier.warm = warm
main("fills", "", COMMANDS)
"""


def test_sigterm_while_the_bank_is_filled_ends_it_at_once(folder: Path) -> None:
    command = [sys.executable, "-c", FILLS, "http", str(folder), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "filling\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 128 + signal.SIGTERM  # a first process must end itself
    finally:
        process.kill()


def test_tasks_come_and_go_under_load_without_a_wrong_answer(tmp_path: Path) -> None:
    folder = toy.make_bundle(tmp_path / "b")
    toy.add(folder, "spare", ["n", "p"], ["bad", "good"], toy.prompt_of(50))
    texts = ["good film", "bad awful dull", "", "the food was nice"]
    wrong: list[Any] = []
    done = threading.Event()
    counted = {"film": 0, "food": 0, "spare": 0}

    with running(folder, "--bank-memory", "0.006") as process:  # a few slots: tasks get evicted
        expected = {}
        for task in ("film", "food", "spare"):
            _, value, _ = ask(process.connect(), "/classify", {"texts": texts, "task": task})
            expected[task] = [result["probabilities"] for result in value["results"]]

        def work(task: str) -> None:
            connection = process.connect()
            while not done.is_set():
                status, value, _ = ask(connection, "/classify", {"texts": texts, "task": task})
                counted[task] += 1
                if task == "spare" and status == 404:
                    continue  # it is not there at the moment
                got = [r["probabilities"] for r in value.get("results", [])]
                if got != [pytest.approx(w, abs=1e-5) for w in expected[task]]:
                    wrong.append((task, status, value))

        threads = [
            threading.Thread(target=work, args=(task,))
            for task in ("film", "food", "spare", "film", "food", "spare")
        ]
        for thread in threads:
            thread.start()
        admin = process.connect()
        token = {"authorization": f"Bearer {TOKEN}"}
        for _ in range(100):
            for action in ("unload", "load"):
                path = f"/v2/repository/models/spare/{action}"
                status, value, _ = ask(admin, path, {}, **token)
                assert status == 200, value
        done.set()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()
        assert process.end() == 0
    assert wrong == [] and min(counted.values()) > 30


def test_two_servers_share_one_bundle(folder: Path) -> None:
    body = {"text": "good film", "task": "food"}
    with running(folder) as one, running(folder) as other:
        answers = [ask(process.connect(), "/classify", body)[:2] for process in (one, other)]
        assert answers[0] == answers[1] and answers[0][0] == 200
        assert (one.end(), other.end()) == (0, 0)


def test_a_connection_is_bounded_and_an_upgrade_is_ignored(folder: Path) -> None:
    body = json.dumps({"text": "good", "task": "film"})
    with running(folder, "--deadline", "0.5") as process:
        offer = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": "AA"}
        connection = process.connect()
        connection.request("POST", "/classify", body, offer)
        assert connection.getresponse().status == 200
        for sent, answer in (
            (b"GET / HTTP/1.1\r\nX: ", b"HTTP/1.1 408"),
            (b"GET / HTTP/1.1\r\nX: " + b"a" * 70_000, b"HTTP/1.1 431"),
            (b"", b""),
        ):
            with socket.create_connection(("127.0.0.1", process.port), 10) as raw:
                raw.sendall(sent)
                got = raw.recv(1000)
                assert got[:12] == answer
        assert process.end() == 0


def test_a_port_that_is_taken_is_said_in_one_line(folder: Path) -> None:
    with running(folder) as process:
        done = subprocess.run(
            [sys.executable, "-m", "serve", "http", str(folder), "--port", str(process.port)],
            cwd=ROOT, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
    assert done.returncode == 1
    assert f"cannot listen on 127.0.0.1 port {process.port}" in done.stderr.splitlines()[-1]
