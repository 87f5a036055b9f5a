"""`python -m serve COMMAND`: classify lines, serve over HTTP, time and describe a bundle."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Any, ClassVar

from serve.cli import Command, main, option
from serve.errors import UserError, install
from serve.files import text_chunks
from serve.latency import LatencyConfig, run_latency
from serve.options import (
    ClusterConfig,
    ModelConfig,
    ServerConfig,
    admin_token,
    make_classifier,
    make_limits,
)

_CHUNK = 512  # lines classified together at most: enough to sort by length, little enough to stream


@dataclass
class ClassifyConfig(ModelConfig):
    """Classify lines of standard input; write one JSON line for each, in order.

    An empty line is a text too: it is answered from the template alone. Lines are classified
    together when they are there together; one that comes alone is answered at once.
    """

    task: str = option("", help="name of the task; may be left out when the bundle has only one")

    examples: ClassVar[list[str]] = [
        "bundle --task film < reviews.txt",
        "bundle --task film --precision int8 --threads 2 < reviews.txt > labels.jsonl",
    ]


@dataclass
class HttpConfig(ServerConfig):
    """Serve a bundle over HTTP: Open Inference Protocol v2, POST /classify, /metrics, /docs."""

    linger: float = option(
        1.0, help="seconds after SIGTERM in which new requests are still answered", minimum=0
    )
    access_log: bool = option(False, help="log every request")

    examples: ClassVar[list[str]] = [
        "bundle --port 8000",
        "bundle --precision int8 --threads 2 --max-wait 5 --max-queue 4096",
        "bundle --host 0.0.0.0   # with METAPT_ADMIN_TOKEN set: tasks are added while it runs",
    ]


@dataclass
class InfoConfig:
    """Check every file of a bundle and describe it."""

    bundle: str = option(help="folder of the bundle", positional=True)
    json: bool = option(False, help="as JSON")

    examples: ClassVar[list[str]] = ["bundle", "bundle --json"]


def run_classify(config: ClassifyConfig) -> None:
    """Classify standard input."""
    from serve.classifier import Classifier

    classifier = make_classifier(config, Classifier, spin=True)
    task = config.task or classifier.only_task()
    classifier.task(task)
    for chunk in text_chunks(sys.stdin.buffer, "the input", _CHUNK):
        for result in classifier.classify(chunk, task):
            answer = {
                "label": result.label,
                "score": round(result.score, 6),
                "probabilities": {k: round(v, 6) for k, v in result.probabilities.items()},
                "truncated": result.truncated,
            }
            sys.stdout.write(json.dumps(answer, ensure_ascii=False) + "\n")
        sys.stdout.flush()


def run_http(config: HttpConfig) -> int:
    """Serve until SIGTERM or SIGINT."""
    try:
        from serve.server import serve_forever
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed: {install('http')}") from None
    from serve.classifier import Classifier

    limits = make_limits(config, config.linger)
    classifier = make_classifier(config, Classifier, spin=False)
    token = admin_token(config)
    return serve_forever(classifier, limits, config.host, config.port, token, config.access_log)


def run_cluster(config: ClusterConfig) -> int:
    """Deploy on Ray Serve, and serve until SIGTERM or SIGINT."""
    try:
        from serve.cluster import deploy
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed: {install('http,ray')}") from None
    return deploy(config)


def run_info(config: InfoConfig) -> None:
    """Describe a bundle whose files are all whole."""
    from serve import bundle as bundles

    found = bundles.load(config.bundle)
    header = found.header
    tasks = {
        name: {
            "labels": task.labels,
            "words": task.words,
            "template": task.template,
            "temperature": task.temperature,
            "bytes": task.size_bytes,
            "info": task.info,
        }
        for name, task in found.tasks.items()
    }
    size = sum(entry["bytes"] for entry in found.files.values())
    if config.json:
        document = {**header, "tasks": tasks, "graph_bytes": size}
        sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
        return
    lines = [
        f"{config.bundle}: mode {found.mode}, {found.prompt_tokens} prompt tokens, "
        f"texts up to {header['max_tokens']} tokens, every file whole",
        f"backbone: {header['backbone'].get('id')}, width {found.size('d_model')}, "
        f"{found.size('num_layers')} layers; graphs and weights {size / 2**20:.1f} MiB",
    ]
    for name, entry in header["precisions"].items():
        figures = [
            f"{key} {value:.4g}"
            for key, value in entry.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        ]
        figures += [_cost(entry["validation"])] if "validation" in entry else []
        lines.append(f"precision {name}: {', '.join(figures) or entry['graph']}")
    for name, task in found.tasks.items():
        pairs = ", ".join(f"{a} ({b})" for a, b in zip(task.labels, task.words, strict=True))
        lines.append(f"task {name}: {pairs}; {task.size_bytes / 1024:.0f} KiB; {task.template}")
    sys.stdout.write("\n".join(lines) + "\n")


def _cost(measured: dict[str, Any]) -> str:
    """What a variant costs in accuracy, as measured at the export (`exporter.measure.compare`)."""
    return (
        f"{100 * measured['accuracy']:.1f} % of {measured['texts']} texts of {measured['task']} "
        f"right ({100 * measured['accuracy_change']:+.1f} points against fp32), "
        f"{100 * measured['agreement']:.1f} % answered as in fp32"
    )


COMMANDS = {
    "classify": Command(ClassifyConfig, run_classify),
    "http": Command(HttpConfig, run_http),
    "cluster": Command(ClusterConfig, run_cluster),
    "latency": Command(LatencyConfig, run_latency),
    "info": Command(InfoConfig, run_info),
}

if __name__ == "__main__":
    main("python -m serve", "Run a bundle of soft prompts with onnxruntime.", COMMANDS)
