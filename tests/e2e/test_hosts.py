"""Over several hosts that share only a network (`tests/hosts.py`), and that fail as hosts do."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import hosts
import pyarrow.parquet as parquet
import pytest
import serve_toy as toy
import torch
from accelerate_runs import launch, toy_clusters
from hosts import Host
from safetensors.torch import load_file

if reason := hosts.missing():
    pytest.skip(reason, allow_module_level=True)

PATIENCE = 120.0  # seconds, on a machine that is busy with other work


def until(condition: Callable[[], object], what: Callable[[], str]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, what()
        time.sleep(0.2)


# ---- training ------------------------------------------------------------------------------------

# In step 5 the second host says that it is there, and goes no further.
STOPS = """
import os, runpy, time
from trainer import parallel
parallel.SILENCE = 3
whole, calls = parallel.Workers.sum_gradients, []
def sum_gradients(self, params):
    calls.append(1)
    if self.rank == 1 and len(calls) == 5:
        open("/tmp/here", "w").close()
        time.sleep(600)
    whole(self, params)
parallel.Workers.sum_gradients = sum_gradients
runpy.run_module("trainer", run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def clusters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_clusters(tmp_path_factory.mktemp("data") / "clusters.parquet")


def train_on(
    team: Sequence[Host], logs: Path, *flags: object, script: Path | None = None
) -> list[subprocess.Popen[str]]:
    """`accelerate launch` on every host."""
    return [
        host.start(
            sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu",
            "--num_machines", len(team), "--num_processes", len(team), "--machine_rank", rank,
            "--main_process_ip", team[0].address, "--main_process_port", 29500,
            "--mixed_precision", "no", "--dynamo_backend", "no",
            *([script] if script else ["-m", "trainer"]), *flags,
            log=logs / host.name, environment={"ACCELERATE_USE_CPU": "1"},
        )
        for rank, host in enumerate(team)
    ]  # fmt: skip


# A host that loses its cable closes no connection, one whose processes are killed closes them all.
@pytest.mark.parametrize("fate", ["unplugged", pytest.param("killed", marks=pytest.mark.slow)])
def test_training_over_two_hosts_loses_one_and_ends_with_the_prompt_of_one_process(
    tiny_t5: Path, clusters: Path, tmp_path: Path, fate: str
) -> None:
    script = tmp_path / "stops.py"
    script.write_text(STOPS)
    flags = [
        "meta", "--data", clusters, "--backbone", tiny_t5, "--prompt-tokens", 3, "--steps", 8,
        "--evaluate-every", 4, "--device", "auto", "--out",
    ]  # fmt: skip
    visible = (tiny_t5, clusters.parent, tmp_path)
    with hosts.make_hosts(3, *visible) as (first, second, third):
        run = train_on([first, second], tmp_path, *flags, "/tmp/out", script=script)
        until(second.path("/tmp/here").exists, (tmp_path / "host1").read_text)
        second.unplug() if fate == "unplugged" else second.kill()
        assert run[0].wait(60) == 1
        said = (tmp_path / "host1").read_text()
        assert "another process of this run died: start the same command again" in said
        # Another machine takes the place: only the first has the checkpoint.
        again = train_on([first, third], tmp_path, *flags, "/tmp/out")
        assert [process.wait(PATIENCE) for process in again] == [0, 0]
        said = (tmp_path / "host1").read_text()
        assert "resuming meta at step 4" in said and "2 processes of accelerate" in said
        assert "resuming meta at step 4" in (tmp_path / "host3").read_text()
        assert not third.path("/tmp/out").exists()
        found = load_file(first.path("/tmp/out/adapter_model.safetensors"))["prompt_embeddings"]
    alone = launch(1, *flags, tmp_path / "alone")
    assert alone.returncode == 0, alone.stderr
    expected = load_file(tmp_path / "alone" / "adapter_model.safetensors")["prompt_embeddings"]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_hosts_that_have_other_data_are_refused(
    tiny_t5: Path, clusters: Path, tmp_path: Path
) -> None:
    flags = ["meta", "--data", "/tmp/c.parquet", "--backbone", tiny_t5, "--prompt-tokens", 3,
             "--steps", 2, "--device", "auto", "--out", "/tmp/out"]  # fmt: skip
    with hosts.make_hosts(2, tiny_t5, tmp_path) as team:
        table = parquet.read_table(clusters)
        for number, host in enumerate(team):
            parquet.write_table(table.slice(number), host.path("/tmp/c.parquet"))
        runs = train_on(team, tmp_path, *flags)
        assert [run.wait(PATIENCE) for run in runs] == [1, 1]
    for name in ("host1", "host2"):
        assert "differ in data_sha256: give every machine the same" in (tmp_path / name).read_text()


# ---- serving -------------------------------------------------------------------------------------

RAY = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "METAPT_ADMIN_TOKEN": "secret"}
AGREED = 45.0  # seconds; Ray itself gives up a host after 60, and an actor that hangs after 90
ASK = """
import json, sys, time, urllib.error, urllib.request
path, body = sys.argv[1:]
request = urllib.request.Request("http://127.0.0.1:8000" + path, body.encode(), {
    "authorization": "Bearer secret", "content-type": "application/json"})
start = time.monotonic()
try:
    with urllib.request.urlopen(request, timeout=100) as answer:
        status, said = answer.status, answer.read().decode()
except urllib.error.HTTPError as error:
    status, said = error.code, error.read().decode()
print(json.dumps([status, time.monotonic() - start, said]))
"""


def start_ray(host: Host, *flags: object) -> None:
    host.run(
        Path(sys.executable).with_name("ray"), "start", "--node-ip-address", host.address,
        "--object-store-memory", 10**8, "--disable-usage-stats", *flags, environment=RAY,
    )  # fmt: skip


def ask(host: Host, path: str, body: object) -> tuple[int, float, str]:
    """Status, seconds and text of a POST to the host's own proxy."""
    said = host.run(sys.executable, "-S", "-c", ASK, path, json.dumps(body))
    return tuple(json.loads(said))


@pytest.mark.slow
def test_a_lost_host_does_not_hold_up_tasks_on_the_others(tmp_path: Path) -> None:
    pytest.importorskip("ray.serve", reason="needs the extra: pip install '.[http,ray]'")
    folder = toy.make_bundle(tmp_path / "b")
    with hosts.make_hosts(3, tmp_path) as (head, *others):
        start_ray(head, "--head", "--port", 6379, "--num-cpus", 0, "--include-dashboard", "false")
        for host in others:
            start_ray(host, "--address", f"{head.address}:6379", "--num-cpus", 1)
        log = tmp_path / "serve"
        served = head.start(
            sys.executable, "-m", "serve", "cluster", folder, "--ray", f"{head.address}:6379",
            "--replicas", 2, "--host", "0.0.0.0", log=log, environment=RAY,
        )  # fmt: skip
        until(lambda: "ready on" in log.read_text() or served.poll() is not None, log.read_text)
        assert ask(head, "/v2/repository/models/food/unload", {})[0] == 200
        ledgers = [h for h in (head, *others) if h.pids("ServeReplica:metapt:tasks")]
        assert len(ledgers) == 1
        lost, kept = sorted(others, key=lambda host: host in ledgers)
        lost.unplug()
        # By the proxy with a replica beside it: the head's may hand the request to the lost one.
        status, seconds, said = ask(kept, "/v2/repository/models/food/load", {})
        assert status == 200 and seconds < AGREED, (status, seconds, said)
        body = {"texts": ["good film"], "task": "food"}
        until(lambda: ask(kept, "/classify", body)[0] == 200, log.read_text)
