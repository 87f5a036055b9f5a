"""What the server tells Prometheus. Every name and its meaning stand in docs/serving.md.

The `task` label takes the names of served tasks only: a client cannot make new series.
"""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

CONTENT_TYPE = CONTENT_TYPE_LATEST
SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


class Metrics:
    """The counters of one server; also the batcher's observer."""

    def __init__(self, queue_depth: Callable[[], float], tasks: Callable[[], float]) -> None:
        """Args:
        queue_depth: texts that wait now.
        tasks: tasks that are served now.
        """
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._requests = Counter(
            "metapt_requests", "Requests by task and outcome", ["task", "outcome"],
            registry=registry,
        )  # fmt: skip
        self._texts = Counter("metapt_texts", "Texts answered", ["task"], registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"metapt_{name}", text, buckets=buckets, registry=registry)

        self._latency = histogram("request_seconds", "From arrival to answer", SECONDS)
        self._queue = histogram("queue_seconds", "A text's wait for its batch", SECONDS)
        self._tokenize = histogram("tokenize_seconds", "Tokenizing a request", SECONDS)
        self._run = histogram("run_seconds", "Running a batch", SECONDS)
        self._rows = histogram("batch_texts", "Texts of a batch", COUNTS)
        self._tokens = histogram("batch_tokens", "Tokens of a batch without padding", COUNTS)
        self._padding = Counter(
            "metapt_padding_tokens", "Padded tokens that were run", registry=registry
        )
        depth = Gauge("metapt_queue_depth", "Texts that wait", registry=registry)
        depth.set_function(queue_depth)
        served = Gauge("metapt_tasks", "Tasks that are served", registry=registry)
        served.set_function(tasks)
        self._children: dict[tuple[str, str], Counter] = {}

    def request(self, task: str, outcome: str, texts: int, seconds: float) -> None:
        """A request has ended.

        Args:
            task: a served task, `mixed`, or empty.
            outcome: `ok`, `cancelled`, or the HTTP status.
            texts: that were answered.
            seconds: from arrival to now.
        """
        child = self._children.get((task, outcome))  # labels() takes longer than the rest
        if child is None:
            child = self._children[task, outcome] = self._requests.labels(task, outcome)
        child.inc()
        if texts:
            self._texts.labels(task).inc(texts)
            self._latency.observe(seconds)

    def tokenized(self, seconds: float) -> None:
        """A request was tokenized."""
        self._tokenize.observe(seconds)

    def waited(self, seconds: float) -> None:
        """A text left the queue for a batch."""
        self._queue.observe(seconds)

    def batch(self, rows: int, tokens: int, padded: int, seconds: float) -> None:
        """A batch has run."""
        self._rows.observe(rows)
        self._tokens.observe(tokens)
        self._padding.inc(padded - tokens)
        self._run.observe(seconds)

    def page(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self._registry)
