"""Two replicas on a Ray of the test's own: tasks come and go on both, whichever process dies.

One cluster for the whole file; starting Ray takes most of the time.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import serve_toy as toy
from safetensors.numpy import save

from serve import Classifier
from serve import bundle as bundles

pytest.importorskip(
    "ray.serve", reason="needs the extra: pip install '.[http,ray]' in the checkout"
)
if (os.cpu_count() or 1) < 2:
    pytest.skip("two replicas need two processors", allow_module_level=True)

ROOT = Path(__file__).parents[2]
PATIENCE = 240  # seconds, on a machine that is busy with other work
ADMIN = {"authorization": "Bearer secret"}
TRIES = 24  # requests; that two replicas are both among those that answer is all but certain


def name_of(process: psutil.Process) -> str:
    """What a process calls itself; Ray's are named after what they run."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


class Cluster:
    """`python -m serve cluster`, once it is ready."""

    def __init__(self, folder: Path, log: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.log = log
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "serve", "cluster", str(folder), "--replicas", "2",
                 "--port", str(self.port), "--max-queue", "50", "--max-body", "0.01"],
                cwd=ROOT, stderr=output, stdout=output,
                env={**os.environ, "METAPT_ADMIN_TOKEN": "secret", "OMP_NUM_THREADS": "1",
                     "PYTHONPATH": os.pathsep.join(paths)},
            )  # fmt: skip
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60)
        self.until(lambda: "\nready on" in "\n" + log.read_text())

    def until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < end and self.process.poll() is None, self.log.read_text()
            time.sleep(0.2)

    def workers(self, deployment: str) -> list[int]:
        """Processes of a deployment."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        wanted = f"ServeReplica:metapt:{deployment}"
        return [child.pid for child in children if wanted in name_of(child)]

    def post(self, path: str, body: object = None) -> httpx.Response:
        return self.client.post(path, json=body if body is not None else {}, headers=ADMIN)

    def statuses(self, task: str) -> set[int]:
        return {self.client.get(f"/v2/models/{task}").status_code for _ in range(TRIES)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.make_bundle(tmp_path_factory.mktemp("cluster") / "b")


@pytest.fixture(scope="module")
def cluster(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    log = tmp_path_factory.mktemp("log") / "log.txt"
    for attempt in range(3):
        try:
            started = Cluster(folder, log)
            break
        except AssertionError:  # Ray gives its processes 30 s to start, whatever else runs here
            if attempt == 2 or "timed out during startup" not in log.read_text():
                raise
    yield started
    started.client.close()
    if started.process.poll() is None:
        started.process.send_signal(signal.SIGTERM)
        try:
            started.process.wait(60)
        except subprocess.TimeoutExpired:
            started.process.kill()


def upload(seed: int) -> dict[str, object]:
    record = toy.record(["left", "right"], ["dull", "nice"])
    data = base64.b64encode(save({"prompt_embeddings": toy.prompt_of(seed)})).decode()
    return {"parameters": {"config": json.dumps(record), "file:prompt.safetensors": data}}


def test_routes_and_limits_are_those_of_one_server(cluster: Cluster, folder: Path) -> None:
    expected = Classifier(folder, threads=1).classify(["good film", "bad"], ["film", "food"])
    body = {"texts": ["good film", "bad"], "task": ["film", "food"]}
    results = cluster.post("/classify", body).json()["results"]
    for result, wanted in zip(results, expected, strict=True):
        assert result["label"] == wanted.label
        assert result["probabilities"] == pytest.approx(wanted.probabilities, abs=1e-6)
    tensor = {"name": "text", "shape": [1], "datatype": "BYTES", "data": ["good"]}
    answer = cluster.post("/v2/models/film/infer", {"inputs": [tensor]})
    assert answer.json()["model_name"] == "film"
    assert cluster.client.get("/v2/health/ready").json() == {"ready": True}
    assert "/classify" in cluster.client.get("/openapi.json").json()["paths"]
    assert "metapt_tasks 2.0" in cluster.client.get("/metrics").text
    for status, response in (
        (400, cluster.client.post("/classify", content=b"{")),
        (401, cluster.client.post("/v2/repository/index")),
        (404, cluster.client.get("/v2/models/none")),
        (413, cluster.client.post("/classify", content=b" " * 20_000)),
        (422, cluster.post("/classify", {"texts": ["x"] * 51, "task": "film"})),
    ):
        assert response.status_code == status and set(response.json()) == {"error"}


def test_a_task_is_added_and_removed_on_all_replicas(cluster: Cluster, folder: Path) -> None:
    assert cluster.statuses("mood") == {404}
    assert cluster.post("/v2/repository/models/mood/load").status_code == 404
    toy.add(folder, "mood", ["left", "right"], ["dull", "nice"], toy.prompt_of(9))
    version = bundles.load(folder).tasks["mood"].sha256[:12]
    loaded = cluster.post("/v2/repository/models/mood/load")
    assert (loaded.status_code, loaded.json()) == (200, {"name": "mood", "version": version})
    assert cluster.statuses("mood") == {200}
    assert cluster.post("/v2/repository/models/mood/unload").status_code == 200
    assert cluster.statuses("mood") == {404}
    assert cluster.post("/v2/repository/models/kept/load", upload(3)).status_code == 200
    assert cluster.statuses("kept") == {200}


def test_a_replica_that_was_killed_comes_back_with_the_same_tasks(cluster: Cluster) -> None:
    old = cluster.workers("replica")
    assert len(old) == 2
    os.kill(old[0], signal.SIGKILL)
    cluster.until(lambda: len(set(cluster.workers("replica")) - {old[0]}) == 2)
    # The other is killed too: what answers then is the one that was started again.
    os.kill(old[1], signal.SIGKILL)
    cluster.until(lambda: cluster.client.get("/v2/models/kept").status_code == 200)
    assert cluster.client.get("/v2/models/mood").status_code == 404  # in the folder, but unloaded
    cluster.until(lambda: len(set(cluster.workers("replica")) - set(old)) == 2)
    cluster.until(lambda: cluster.statuses("kept") == {200})
    assert cluster.statuses("mood") == {404}


def test_a_new_ledger_learns_what_the_replicas_know(cluster: Cluster) -> None:
    (old,) = cluster.workers("tasks")
    os.kill(old, signal.SIGKILL)
    cluster.until(lambda: bool(set(cluster.workers("tasks")) - {old}))
    cluster.until(
        lambda: cluster.post("/v2/repository/models/more/load", upload(4)).status_code == 200
    )
    cluster.until(lambda: cluster.statuses("more") == {200})
    assert cluster.statuses("kept") == {200} and cluster.statuses("mood") == {404}
    assert cluster.post("/v2/repository/models/kept/unload").status_code == 200
    cluster.until(lambda: cluster.statuses("kept") == {404})


def test_it_ends_with_exit_code_0_and_leaves_no_process(cluster: Cluster) -> None:
    children = psutil.Process(cluster.process.pid).children(recursive=True)
    cluster.process.send_signal(signal.SIGTERM)
    assert cluster.process.wait(PATIENCE) == 0
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive


def test_a_signal_ends_it_while_it_waits_for_replicas_that_never_come(
    folder: Path, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    log = tmp_path / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "serve", "cluster", str(folder), "--gpus", "1000", "--port",
             str(port)],
            cwd=ROOT, stdout=output, stderr=output, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
    try:
        end = time.monotonic() + PATIENCE
        children: list[psutil.Process] = []
        while not any("ServeController" in name_of(child) for child in children):
            assert time.monotonic() < end and process.poll() is None, log.read_text()
            time.sleep(0.2)
            children = psutil.Process(process.pid).children(recursive=True)
        time.sleep(3)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 130
        assert log.read_text().splitlines()[-1] == "interrupted"
        _, alive = psutil.wait_procs(children, timeout=60)
        assert not alive
    finally:
        process.kill()
