"""Settings that several commands of `python -m serve` share."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from serve.cli import option

if TYPE_CHECKING:
    from serve.http import Limits

MOST_THREADS = 1024  # of a batch; far more end the process in onnxruntime, without a word


@dataclass
class ModelConfig:
    """Settings shared by the commands that run a model."""

    bundle: str = option(help="folder of the bundle", positional=True)
    precision: str = option("fp32", help="fp32, int8, fp16: one that the bundle has")
    threads: int | None = option(
        None, minimum=1, maximum=MOST_THREADS,
        help="threads of a batch; default: the physical cores over the workers",
    )  # fmt: skip
    workers: int | None = option(
        None, minimum=1, maximum=64,
        help="batches that run at the same time; default: the physical cores (at most 8) over the "
        "threads, one on a GPU. In fp32 1 answers a single client sooner, and many later",
    )  # fmt: skip
    providers: list[str] | None = option(
        None, help="onnxruntime providers; default: CUDA where it is there, otherwise the CPU"
    )
    token_budget: int | None = option(
        None, minimum=1,
        help="padded tokens of a batch; more takes memory and gains little (default: 2048, on a "
        "GPU 16384)",
    )  # fmt: skip
    max_rows: int | None = option(
        None, help="texts of a batch (default: 32, on a GPU 256)", minimum=1
    )
    max_tokens: int | None = option(
        None,
        help="longest text with its template; longer ones are cut, and those of a task where the "
        "texts that it was tuned on were",
        minimum=1,
    )
    bank_memory: float = option(
        512.0,
        help="MiB for the prompts' constants; the least used give way",
        minimum=0.001,
        maximum=1e9,
    )
    verify: bool = option(True, help="check the hash of every file of the bundle at start")


@dataclass
class ServerConfig(ModelConfig):
    """Settings shared by the commands that serve over HTTP."""

    host: str = option("127.0.0.1", help="address to listen on; 0.0.0.0 for all")
    port: int = option(8000, help="port to listen on; 0 for any free one", minimum=0, maximum=65535)
    max_wait: float = option(
        2.0, help="milliseconds a request may wait for others to share its batch", minimum=0
    )
    max_queue: int = option(
        1024, help="texts that may wait; past it 429, counted per text", minimum=1
    )
    deadline: float = option(
        10.0,
        minimum=0.001,
        help="seconds from the last byte of a request to its answer; past it 504",
    )
    max_body: float = option(
        1.0, help="MiB of a request's body; past it 413", minimum=0.001, maximum=1e6
    )
    drain: float = option(
        30.0, help="seconds that accepted requests get to finish at the end", minimum=0
    )
    admin_token: str = option(
        "", help="turns on adding and removing tasks; better in METAPT_ADMIN_TOKEN"
    )


@dataclass
class ClusterConfig(ServerConfig):
    """Serve a bundle on a Ray cluster: replicas, scaled by the requests under way.

    Every node needs this project with the extras http and ray, and the bundle at the same path.
    """

    ray: str = option(
        "local", help="the cluster: local starts one here, auto finds one on this machine, "
        "HOST:PORT or ray://HOST:PORT"
    )  # fmt: skip
    # Replicas, not threads, fill a node's cores: two batches side by side do more for short texts.
    threads: int | None = option(1, help="threads of a batch", minimum=1, maximum=MOST_THREADS)
    workers: int | None = option(
        1, help="batches that a replica runs at the same time", minimum=1, maximum=64
    )
    replicas: int = option(1, help="replicas at least", minimum=1)
    max_replicas: int | None = option(
        None, help="replicas at most; default: as many as --replicas, no scaling", minimum=1
    )
    queue_target: float = option(
        32.0, help="requests under way, waiting ones included, for each replica: more add a "
        "replica, fewer remove one; by default a full batch", minimum=0.1
    )  # fmt: skip
    upscale_delay: float = option(10.0, help="seconds of more before a replica is added", minimum=0)
    downscale_delay: float = option(
        300.0, help="seconds of less before a replica is removed", minimum=0
    )
    gpus: float = option(0.0, help="GPUs of a replica; a part lets replicas share one", minimum=0)
    detach: bool = option(
        False, help="end when the replicas are ready and leave them running (not with local)"
    )

    @property
    def cores(self) -> int:
        """That a replica takes."""
        return (self.threads or 1) * (self.workers or 1)

    examples: ClassVar[list[str]] = [
        "bundle --replicas 2",
        "/shared/bundle --ray auto --replicas 2 --max-replicas 16 --host 0.0.0.0 --detach",
    ]


def make_classifier(config: ModelConfig, kind: Any, spin: bool) -> Any:
    """A classifier of the class `kind` with these settings."""
    from serve.classifier import MIB

    return kind(
        config.bundle,
        config.precision,
        threads=config.threads,
        workers=config.workers,
        providers=config.providers,
        token_budget=config.token_budget,
        max_rows=config.max_rows,
        max_tokens=config.max_tokens,
        bank_memory=int(config.bank_memory * MIB),
        spin=spin,
        verify=config.verify,
    )


def make_limits(config: ServerConfig, linger: float = 0.0) -> Limits:
    """The application's limits in seconds and bytes."""
    from serve.http import Limits

    return Limits(
        max_wait=config.max_wait / 1000,
        max_queue=config.max_queue,
        deadline=config.deadline,
        max_body=int(config.max_body * 2**20),
        linger=linger,
        drain=config.drain,
    )


def admin_token(config: ServerConfig) -> str | None:
    """The token of the flag, or of the environment; None when there is none.

    White space around it goes: a secret that was made of a file often ends with a new line, which
    no client could send.
    """
    return (config.admin_token or os.environ.get("METAPT_ADMIN_TOKEN") or "").strip() or None
