"""The server's metrics in Ray's own, so that they are there for every replica.

`GET /metrics` reaches some replica, and tells of that one. Ray exports what is recorded here for
all of them, tagged with the replica, on each node's metrics port.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ray.serve import metrics as ray_metrics

from serve.metrics import COUNTS, SECONDS, Metrics


class RayMetrics(Metrics):
    """`Metrics`, told to Ray as well, under the same names; Ray puts `ray_` before them."""

    def __init__(self, queue_depth: Callable[[], float], tasks: Callable[[], float]) -> None:
        super().__init__(queue_depth, tasks)
        self._depth_now, self._tasks_now = queue_depth, tasks

        def histogram(name: str, text: str, bounds: tuple[float, ...]) -> Any:
            return ray_metrics.Histogram(f"metapt_{name}", text, boundaries=list(bounds))

        tags: Any = ("task", "outcome")  # Ray's annotation says one tag
        self._ray_requests = ray_metrics.Counter(
            "metapt_requests", "Requests by task and outcome", tag_keys=tags
        )
        self._ray_texts = ray_metrics.Counter("metapt_texts", "Texts answered", tag_keys=("task",))
        self._ray_latency = histogram("request_seconds", "From arrival to answer", SECONDS)
        self._ray_queue = histogram("queue_seconds", "A text's wait for its batch", SECONDS)
        self._ray_tokenize = histogram("tokenize_seconds", "Tokenizing a request", SECONDS)
        self._ray_run = histogram("run_seconds", "Running a batch", SECONDS)
        self._ray_rows = histogram("batch_texts", "Texts of a batch", COUNTS)
        self._ray_tokens = histogram("batch_tokens", "Tokens of a batch without padding", COUNTS)
        self._ray_padding = ray_metrics.Counter(
            "metapt_padding_tokens", "Padded tokens that were run"
        )
        self._ray_depth = ray_metrics.Gauge("metapt_queue_depth", "Texts that wait")
        self._ray_tasks = ray_metrics.Gauge("metapt_tasks", "Tasks that are served")

    def request(self, task: str, outcome: str, texts: int, seconds: float) -> None:
        """A request has ended."""
        super().request(task, outcome, texts, seconds)
        self._ray_requests.inc(tags={"task": task, "outcome": outcome})
        if texts:
            self._ray_texts.inc(texts, tags={"task": task})
            self._ray_latency.observe(seconds)

    def tokenized(self, seconds: float) -> None:
        """A request was tokenized."""
        super().tokenized(seconds)
        self._ray_tokenize.observe(seconds)

    def waited(self, seconds: float) -> None:
        """A text left the queue for a batch."""
        super().waited(seconds)
        self._ray_queue.observe(seconds)

    def batch(self, rows: int, tokens: int, padded: int, seconds: float) -> None:
        """A batch has run; also the moment at which the gauges are set."""
        super().batch(rows, tokens, padded, seconds)
        self._ray_rows.observe(rows)
        self._ray_tokens.observe(tokens)
        if padded > tokens:  # Ray refuses to count nothing
            self._ray_padding.inc(padded - tokens)
        self._ray_run.observe(seconds)
        self._ray_depth.set(self._depth_now())
        self._ray_tasks.set(self._tasks_now())
