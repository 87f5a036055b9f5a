"""What needs Ray's package but no cluster: settings, addresses, what is imported."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from serve.errors import Failure, UserError
from serve.options import ClusterConfig

ROOT = Path(__file__).parents[2]
pytest.importorskip(
    "ray.serve", reason="needs the extra: pip install '.[http,ray]' in the checkout"
)


def test_replicas_scale_with_the_requests_under_way() -> None:
    from serve.cluster import application

    built = application(
        ClusterConfig("b", replicas=2, max_replicas=5, queue_target=7, threads=3, workers=2)
    )
    deployment = built._bound_deployment  # type: ignore[attr-defined]
    config = deployment._deployment_config
    scaling = config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (2, 5)
    assert scaling.target_ongoing_requests == 7
    assert deployment.ray_actor_options["num_cpus"] == 6
    # Our own queue answers 429 before Ray keeps a request back.
    assert config.max_ongoing_requests > 1024 and config.max_queued_requests == 1024


def test_without_a_maximum_the_number_of_replicas_stays() -> None:
    from serve.cluster import application

    deployment = application(ClusterConfig("b", replicas=3))._bound_deployment  # type: ignore[attr-defined]
    assert deployment._deployment_config.autoscaling_config is None
    assert deployment._deployment_config.num_replicas == 3
    with pytest.raises(UserError, match="--max-replicas 1 is less than --replicas 2"):
        application(ClusterConfig("b", replicas=2, max_replicas=1))


def test_rays_own_command_passes_settings_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    from serve.cluster import app

    monkeypatch.setenv("METAPT_BUNDLE", "/shared/bundle")
    monkeypatch.setenv("METAPT_ADMIN_TOKEN", "secret")
    built = app({"precision": "int8", "threads": "2", "verify": "false", "deadline": "3.5"})
    config = built._bound_deployment.init_args[0]  # type: ignore[attr-defined]
    assert config == ClusterConfig(
        "/shared/bundle", "int8", threads=2, verify=False, deadline=3.5, admin_token="secret"
    )
    with pytest.raises(UserError, match="--threads takes a whole number"):
        app({"threads": "two"})
    built = app({"providers": "CUDAExecutionProvider,CPUExecutionProvider"})
    config = built._bound_deployment.init_args[0]  # type: ignore[attr-defined]
    assert config.providers == ["CUDAExecutionProvider", "CPUExecutionProvider"]
    with pytest.raises(UserError, match="port: pass it to Ray"):
        app({"port": "80"})
    monkeypatch.delenv("METAPT_BUNDLE")
    with pytest.raises(UserError, match="BUNDLE is missing"):
        app({})


@pytest.mark.parametrize("address", ["nowhere", "host", "host:99999999", "http://host:1"])
def test_what_is_no_address_is_said(address: str) -> None:
    from serve.raylink import connect

    with pytest.raises(UserError, match="is no address of a Ray cluster"):
        connect(address)


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_a_closed_port_is_a_failure(scheme: str) -> None:
    from serve.raylink import connect

    with pytest.raises(Failure, match=r"no Ray cluster answers.*refused"):
        connect(f"{scheme}127.0.0.1:1")


def test_a_port_that_is_not_rays_is_a_failure_within_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from serve import raylink

    monkeypatch.setattr(raylink, "_PATIENCE", 0.5)
    monkeypatch.setattr(raylink.ray, "init", lambda **_: pytest.fail("would hang for minutes"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(Failure, match="nobody speaks Ray's protocol there"):
            raylink.connect(f"127.0.0.1:{port}")


def test_no_cluster_on_this_machine_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    from serve import raylink

    def init(**_: object) -> None:
        raise ConnectionError("Could not find any running Ray instance")

    monkeypatch.setattr(raylink.ray, "init", init)
    with pytest.raises(Failure, match=r"cannot connect to Ray at .auto. .Could not find"):
        raylink.connect("auto")


def test_without_ray_the_error_names_the_extra(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['ray'] = None\n"
        "from serve.cli import run\n"
        "from serve.__main__ import COMMANDS\n"
        "sys.exit(run('serve', '', COMMANDS, ['cluster', 'bundle']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (
        2, 'error: ray is not installed: pip install ".[http,ray]" in the checkout\n'
    )  # fmt: skip


def test_a_bundle_that_is_not_there_and_a_port_that_is_taken_are_said_before_ray_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import serve_toy as toy

    from serve import cluster

    monkeypatch.setattr(cluster, "connect", lambda _: pytest.fail("Ray was started"))
    with pytest.raises(UserError, match="is not a folder"):
        cluster.deploy(ClusterConfig(str(tmp_path / "missing")))
    folder = toy.make_bundle(tmp_path / "b")
    with pytest.raises(UserError, match="no precision 'int8'"):
        cluster.deploy(ClusterConfig(str(folder), precision="int8"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(Failure, match=f"cannot listen on 127.0.0.1 port {port}"):
            cluster.deploy(ClusterConfig(str(folder), port=port))
    with pytest.raises(UserError, match="--detach needs a cluster that stays"):
        cluster.deploy(ClusterConfig(str(folder), detach=True))
    (folder / "weights.data").write_bytes(b"short")
    with pytest.raises(Failure, match=r"weights\.data"):
        cluster.deploy(ClusterConfig(str(folder)))


@pytest.mark.parametrize("address", ["local", "auto", "ray://host:1"])
def test_a_bundle_that_is_here_is_given_to_the_replicas_by_its_whole_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    import serve_toy as toy

    from serve import cluster

    def connect(_: str) -> None:
        raise Failure("far enough")

    toy.make_bundle(tmp_path / "b")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cluster, "connect", connect)
    for given, passed in (("b", str(tmp_path / "b")), ("elsewhere/b", "elsewhere/b")):
        config = ClusterConfig(given, ray=address, port=0)
        if address != "local" or given == "b":
            with pytest.raises(Failure, match="far enough"):
                cluster.deploy(config)
            assert config.bundle == passed


def test_serving_on_ray_imports_none_of_the_heavy_packages() -> None:
    code = """
import sys
import serve.cluster
heavy = {"torch", "transformers", "onnx", "sklearn", "gradio", "peft"}
sys.exit(", ".join(sorted((heavy | {"trainer", "exporter", "demo"}) & set(sys.modules))) or None)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_rays_metrics_have_the_names_of_the_servers_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from serve import raymetrics

    told: dict[str, float] = {}  # by name, what Ray would add up

    class Recorder:
        def __init__(self, name: str, *_: object, **__: object) -> None:
            self.name = name
            told[name] = 0

        def observe(self, value: float = 1.0, **_: object) -> None:
            told[self.name] += value

        inc = set = observe

    class CountRecorder(Recorder):
        def __init__(self, name: str, *_: object, **__: object) -> None:
            super().__init__(f"{name}_total")  # as Ray and Prometheus write a counter

        inc = Recorder.observe

    monkeypatch.setattr(raymetrics, "ray_metrics", SimpleNamespace(
        Histogram=Recorder, Gauge=Recorder, Counter=CountRecorder))  # fmt: skip
    metrics = raymetrics.RayMetrics(lambda: 3, lambda: 2)
    metrics.tokenized(0.25)
    metrics.waited(0.5)
    metrics.batch(4, 70, 80, 1.5)
    metrics.request("film", "ok", 4, 2.0)
    assert told == {
        "metapt_requests_total": 1, "metapt_texts_total": 4, "metapt_request_seconds": 2.0,
        "metapt_queue_seconds": 0.5, "metapt_tokenize_seconds": 0.25, "metapt_run_seconds": 1.5,
        "metapt_batch_texts": 4, "metapt_batch_tokens": 70, "metapt_padding_tokens_total": 10,
        "metapt_queue_depth": 3, "metapt_tasks": 2,
    }  # fmt: skip
    names = {line.split()[2] for line in metrics.page().decode().splitlines() if "# TYPE" in line}
    own = {name for name in names if name.startswith("metapt_") and not name.endswith("_created")}
    assert own == set(told)


def test_the_address_is_the_one_where_serve_listens(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from serve import cluster

    proxies = SimpleNamespace(http_config=SimpleNamespace(host="0.0.0.0", port=8000))
    monkeypatch.setattr(cluster, "_get_global_client", lambda: proxies)
    with caplog.at_level("INFO"):
        cluster._say_ready(ClusterConfig("b", host="127.0.0.1", port=9000))
        cluster._say_ready(ClusterConfig("b", host="0.0.0.0", port=8000))
    ready = "ready on http://0.0.0.0:8000, documentation on /docs"
    assert caplog.messages[1:] == [ready, ready]
    assert caplog.messages[0].startswith("--host 127.0.0.1 --port 9000 were not used")


class Ledger:
    """Stands for the deployment handle: each method's `remote` awaits the real ledger."""

    def __init__(self, ledger: object) -> None:
        self._ledger = ledger

    def options(self, *, _by_reference: bool) -> Ledger:
        assert not _by_reference  # see `Server`
        return self

    def __getattr__(self, name: str) -> object:
        call = getattr(self._ledger, name)
        return type("Method", (), {"remote": staticmethod(call)})()


def test_a_replica_joins_before_it_is_ready_and_a_dead_follower_is_unhealthy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import asyncio

    import serve_toy as toy

    from serve import cluster
    from serve.ledger import GONE
    from serve.ledger import Ledger as Real
    from serve.metrics import Metrics

    monkeypatch.setattr(cluster, "RayMetrics", Metrics)  # Ray's own want a process of Ray's
    folder = toy.make_bundle(tmp_path / "b")

    async def story() -> None:
        real = Real()
        await real.publish("food", GONE, None, 0, 0)
        server = cluster.Server(ClusterConfig(str(folder)), Ledger(real), "one")  # type: ignore[arg-type]
        assert not server.app.ready()
        await server.start()
        assert server.app.ready() and set(server._classifier.tasks) == {"film"}
        server.check()
        assert server._following is not None
        server._following.cancel()
        await asyncio.sleep(0.05)
        with pytest.raises(RuntimeError, match="does not follow"):
            server.check()
        await server.stop()
        assert not real._members

    asyncio.run(asyncio.wait_for(story(), 20))


def test_a_ledger_that_does_not_answer_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import asyncio

    import grpc
    import serve_toy as toy

    from serve import cluster
    from serve.ledger import GONE, Page
    from serve.ledger import Ledger as Real
    from serve.metrics import Metrics

    monkeypatch.setattr(cluster, "RayMetrics", Metrics)
    for name, seconds in (("_POLL", 0.05), ("_ANSWER", 0.1), ("_RETRY", 0.01)):
        monkeypatch.setattr(cluster, name, seconds)
    folder = toy.make_bundle(tmp_path / "b")
    asked = []

    class Deaf(Real):
        """Its host is lost at the first poll; the second reaches nobody."""

        async def follow(self, *values: object) -> Page | None:
            asked.append(1)
            if len(asked) == 1:
                await asyncio.sleep(600)
            if len(asked) == 2:
                raise grpc.RpcError("nobody is there")
            return await super().follow(*values)  # type: ignore[arg-type]

    async def story() -> None:
        real = Deaf()
        server = cluster.Server(ClusterConfig(str(folder)), Ledger(real), "one")  # type: ignore[arg-type]
        await server.start()
        outcome = await real.publish("food", GONE, None, 0, 10)
        assert (outcome.replicas, outcome.late) == (1, 0)
        assert set(server._classifier.tasks) == {"film"} and len(asked) >= 3
        await server.stop()

    asyncio.run(asyncio.wait_for(story(), 20))
