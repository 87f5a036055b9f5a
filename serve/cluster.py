"""Serving on Ray Serve: the application of `serve.http` in replicas that scale with the load.

    python -m serve cluster BUNDLE                       # starts or finds Ray, deploys, serves
    serve run serve.cluster:app bundle=/shared/bundle    # Ray's own command of the same name

Ray routes requests, starts, scales, checks and restarts replicas. Each replica is the whole
application on its own port of the same code, so routes, limits and answers are those of
`python -m serve http`; what is added here is that tasks come and go on all replicas at once
(`serve.ledger`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Mapping
from typing import Any

import grpc
import ray
from ray import serve as ray_serve
from ray.exceptions import RayError
from ray.serve.context import _get_global_client
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from serve.classifier import DEFAULT_BATCH
from serve.cli import build_config
from serve.errors import Failure, UserError
from serve.follower import Follower, SharedClassifier
from serve.http import App, Receive, Scope, Send
from serve.ledger import Ledger, Outcome
from serve.options import ClusterConfig, admin_token, make_classifier, make_limits
from serve.raylink import connect
from serve.raymetrics import RayMetrics
from serve.task import Task

log = logging.getLogger(__name__)

NAME = "metapt"  # of the application in Ray
_POLL = 5.0  # seconds of a long poll; also how soon a changed folder is noticed
_AGREE = 30.0  # seconds in which all replicas confirm a change
_RETRY = 1.0  # seconds before the ledger is asked again after it could not be reached
_ANSWER = 10.0  # seconds that an answer of the ledger may take on top of what it waits for
_ROOM = 64  # requests beside those of the queue: health, metrics, administration
_JOINING = 60.0  # seconds for a new replica to hear from the ledger
# A ledger that is not reached: gRPC's own errors are none of Ray's.
_UNREACHED = (RayError, RayServeException, grpc.RpcError, TimeoutError)
# What the ledger hands on holds prompts; gRPC's own limit is 4 MiB. Read when Ray is imported.
_LARGE_MESSAGES = {"env_vars": {"RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(2**31 - 1)}}


class Server:
    """One replica: the application, and the task that keeps it in step with the others."""

    def __init__(self, config: ClusterConfig, ledger: DeploymentHandle, replica: str) -> None:
        """Args:
            config: the same for all replicas.
            ledger: handle of the deployment around `serve.ledger.Ledger`.
            replica: this replica's id.

        Raises:
            UserError, Failure: as `serve.classifier.Classifier`.
        """
        self._config, self._replica = config, replica
        # By value, over gRPC. As an object of Ray's an answer keeps its actor waiting for the
        # receipt, so that one replica without network would hold up the ledger for all.
        self._ledger = ledger.options(_by_reference=False)
        self._classifier: SharedClassifier = make_classifier(config, SharedClassifier, spin=False)
        self._classifier.publish = self._publish
        self._follower = Follower(self._classifier)
        limits = make_limits(config)
        self.app = App(self._classifier, limits, admin_token(config), RayMetrics)
        self._following: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Learn of the tasks, fill the bank, and be ready."""
        await self._join()
        await self.app.start()
        self._following = asyncio.create_task(self._follow())

    async def stop(self) -> None:
        """Answer what was accepted, and end."""
        if self._following is not None:
            self._following.cancel()
        with contextlib.suppress(*_UNREACHED):
            async with asyncio.timeout(_RETRY):  # the ledger may have gone before us
                await self._ledger.leave.remote(self._replica)
        await self.app.stop(self._config.drain)

    def check(self) -> None:
        """Raises: RuntimeError when Ray should replace this replica."""
        if self._following is not None and self._following.done():
            raise RuntimeError("the replica does not follow the ledger any more")
        if not self.app.draining and not self.app.ready():
            raise RuntimeError("a batch hangs for longer than --deadline")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI interface; `start` and `stop` stand apart, so that their errors are told."""
        if scope["type"] != "lifespan":
            await self.app(scope, receive, send)
            return
        while (message := await receive())["type"] != "lifespan.shutdown":
            await send({"type": message["type"] + ".complete"})
        await self.stop()
        await send({"type": "lifespan.shutdown.complete"})

    # ---- in step with the others -------------------------------------------------------------

    async def _join(self) -> None:
        known = list(self._follower.changes.values())
        async with asyncio.timeout(_JOINING):
            page = await self._ledger.join.remote(self._replica, known)
            await asyncio.to_thread(self._follower.apply, page)

    async def _follow(self) -> None:
        follower = self._follower
        while True:
            try:
                async with asyncio.timeout(_POLL + _ANSWER):  # its host may be gone
                    page = await self._ledger.follow.remote(
                        self._replica, follower.epoch, follower.version, follower.problems, _POLL
                    )
                if page is None:
                    await self._join()
                else:
                    await asyncio.to_thread(follower.apply, page)
            except _UNREACHED as error:
                log.warning("the ledger of tasks is not reached, once more: %s",
                            error or type(error).__name__)  # fmt: skip
                await asyncio.sleep(_RETRY)

    def _publish(self, name: str, kind: str, task: Task | None) -> Outcome:
        """Called in a thread of its own; it waits for all replicas, this one included."""
        latest = max((change.order for change in list(self._follower.changes.values())), default=0)
        try:
            response = self._ledger.publish.remote(name, kind, task, latest, _AGREE)
            return response.result(timeout_s=2 * _AGREE)
        except _UNREACHED as error:
            raise Failure(f"the ledger of tasks is not reached ({error}): try again") from None


@ray_serve.deployment(
    name="tasks",
    num_replicas=1,
    max_ongoing_requests=100_000,  # a long poll of every replica
    graceful_shutdown_timeout_s=1.0,
    graceful_shutdown_wait_loop_s=0.2,
    ray_actor_options={"num_cpus": 0, "runtime_env": _LARGE_MESSAGES},
)
class Tasks(Ledger):
    """The ledger as a deployment: Ray starts it again elsewhere when its node goes."""


@ray_serve.deployment(name="replica")
@ray_serve.ingress()
class Replica:
    """A `Server` as a deployment."""

    async def __init__(  # type: ignore[misc]
        self, config: ClusterConfig, ledger: DeploymentHandle
    ) -> None:
        replica = ray_serve.get_replica_context().replica_id.unique_id
        self._server = await asyncio.to_thread(Server, config, ledger, replica)
        await self._server.start()

    def __serve_build_asgi_app__(self) -> Server:
        return self._server

    def check_health(self) -> None:
        """Asked by Ray every few seconds."""
        self._server.check()


def application(config: ClusterConfig) -> ray_serve.Application:
    """The application for `ray.serve.run`.

    Raises:
        UserError: settings that do not go together.
    """
    most = config.max_replicas if config.max_replicas is not None else config.replicas
    if most < config.replicas:
        raise UserError(f"--max-replicas {most} is less than --replicas {config.replicas}")
    scaling: dict[str, Any] = {"num_replicas": config.replicas}
    if most > config.replicas:
        scaling["num_replicas"] = "auto"
        scaling["autoscaling_config"] = {
            "min_replicas": config.replicas,
            "max_replicas": most,
            "target_ongoing_requests": config.queue_target,
            "upscale_delay_s": config.upscale_delay,
            "downscale_delay_s": config.downscale_delay,
        }
    rows = config.max_rows or DEFAULT_BATCH["cuda" if config.gpus else "cpu"][1]
    replica: Any = Replica  # a Deployment, which the types of Ray's decorators do not say
    replica = replica.options(
        # Above the bound of our own queue, which is in texts and answers 429; past this one Ray
        # keeps requests in its proxies, up to as many again, and then answers 503.
        max_ongoing_requests=config.max_queue + rows * (config.workers or 1) + _ROOM,
        max_queued_requests=config.max_queue,
        graceful_shutdown_timeout_s=config.drain,
        ray_actor_options={
            "num_cpus": config.cores,
            "num_gpus": config.gpus,
            "runtime_env": _LARGE_MESSAGES,
        },
        **scaling,
    )
    tasks: Any = Tasks
    return replica.bind(config, tasks.bind())


def app(args: Mapping[str, Any]) -> ray_serve.Application:
    """For `serve run serve.cluster:app KEY=VALUE ...`, and for Serve's configuration files.

    Args:
        args: the flags of `python -m serve cluster`, with `_` for `-` and commas between several
            values; `bundle` may stand in the environment variable METAPT_BUNDLE, the admin token in
            METAPT_ADMIN_TOKEN. Address, port and cluster are Ray's own flags here.

    Raises:
        UserError: as `application`, or an unknown key.
    """
    values = {key: {"true": True, "false": False}.get(value, value) if isinstance(value, str)
              else value for key, value in args.items()}  # fmt: skip
    providers = values.get("providers")  # the only setting that is a list
    if isinstance(providers, str):
        values["providers"] = providers.split(",")
    for key in ("ray", "host", "port", "detach"):
        if key in values:
            raise UserError(f"{key}: pass it to Ray (see serve run --help)")
    if bundle := os.environ.get("METAPT_BUNDLE"):
        values.setdefault("bundle", bundle)
    if token := os.environ.get("METAPT_ADMIN_TOKEN"):
        values.setdefault("admin_token", token)  # replicas on other nodes have no such variable
    return application(build_config(ClusterConfig, values))


def deploy(config: ClusterConfig) -> int:
    """Deploy, and serve until SIGTERM or SIGINT; then take the application down again.

    Returns:
        0.

    Raises:
        UserError: settings that do not go together, or no such bundle (on a local cluster).
        Failure: no cluster answers, the port is taken, or the replicas do not start.
        KeyboardInterrupt: SIGTERM or SIGINT came before the replicas were ready.
    """
    if config.detach and config.ray == "local":
        raise UserError("--detach needs a cluster that stays: start one with ray start --head, "
                        "and pass --ray auto")  # fmt: skip
    config.admin_token = admin_token(config) or ""
    target = application(config)
    if config.ray == "local":
        from serve import bundle as bundles

        # A clear error at once; a replica's is found in Ray's logs, after three attempts.
        bundles.load(config.bundle, verify=config.verify).graph(config.precision)
        _check_port(config.host, config.port)
    if os.path.exists(config.bundle):  # replicas have other working directories
        config.bundle = os.path.abspath(config.bundle)
    connect(config.ray)
    logging.getLogger("ray").setLevel(logging.WARNING)
    if config.ray == "local":
        _check_cores(config)
    ready, ended = threading.Event(), threading.Event()

    def stop(*_: object) -> None:
        ended.set()
        if not ready.is_set():  # Ray waits without limit, for a GPU that there is not, say
            raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGINT):  # after Ray, which takes SIGTERM for itself
        signal.signal(number, stop)
    try:
        ray_serve.start(http_options={"host": config.host, "port": config.port})
        try:
            ray_serve.run(target, name=NAME, route_prefix="/")
            ready.set()
        except KeyboardInterrupt:
            if config.ray != "local" and not config.detach:
                ray_serve.delete(NAME)
            raise
        except RayServeException as error:  # for example another application is at this route
            raise Failure(f"Ray Serve refuses the application: {error}") from None
        except RuntimeError as error:
            raise Failure(f"the replicas did not start: {_reason(error)}") from None
        _say_ready(config)
        if config.detach:
            return 0
        ended.wait()
        log.info("stopping: answering what was accepted")
        ray_serve.delete(NAME)
        return 0
    finally:
        ray.shutdown()  # a local Ray ends with it


def _say_ready(config: ClusterConfig) -> None:
    """Log where the cluster's proxies listen: if Serve ran there before, not where we asked for."""
    client: Any = _get_global_client()  # the address is told nowhere else
    proxies = client.http_config
    if (proxies.host, proxies.port) != (config.host, config.port):
        log.warning(
            "--host %s --port %d were not used: Ray Serve listened elsewhere already (serve "
            "shutdown ends it)", config.host, config.port,
        )  # fmt: skip
    log.info("ready on http://%s:%d, documentation on /docs", proxies.host, proxies.port)


def _check_cores(config: ClusterConfig) -> None:
    """Raises: UserError when replicas would wait for ever for processors that nobody adds."""
    needed = config.replicas * config.cores
    there = int(ray.cluster_resources().get("CPU", 0))
    if needed > there:
        raise UserError(
            f"--replicas {config.replicas} of {needed // config.replicas} threads need {needed} "
            f"processors, this machine has {there}: pass fewer, or a larger cluster as --ray"
        )


def _reason(error: Exception) -> str:
    """The line of a replica's traceback that says what was wrong."""
    lines = [line.strip() for line in _status_message(error).splitlines() if line.strip()]
    own = [line for line in lines if line.startswith(("serve.errors.", "UserError", "Failure"))]
    return (own or lines or [type(error).__name__])[-1]


def _status_message(error: Exception) -> str:
    applications = ray_serve.status().applications
    if NAME not in applications:
        return str(error)
    messages = [item.message for item in applications[NAME].deployments.values() if item.message]
    return "\n".join(messages) or str(error)


def _check_port(host: str, port: int) -> None:
    """Raises: Failure when the address is taken; Ray's proxies would try for ever."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        raise Failure(
            f"cannot listen on {host} port {port} ({error.strerror or error}): pass another "
            "--host or --port"
        ) from None
