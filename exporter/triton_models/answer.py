"""Logits to labels and probabilities: the last step of the ensemble.

logits [n, C] and task_id [n, 1] become LABEL and SCORE [n, 1] and PROBABILITIES [n, C], in the
order of the task's labels; a task with fewer labels than C has zeros behind its own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from serve.task import Task


class TritonPythonModel:
    """What the Python backend calls."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the tasks, which lie beside this file."""
        folder = Path(args["model_repository"]) / args["model_version"]
        settings = json.loads((folder / "tasks.json").read_text("utf-8"))
        tasks = [Task(**record) for record in settings["tasks"]]
        self._labels = [task.labels for task in tasks]
        self._heat = np.array([task.temperature for task in tasks], np.float32)

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response for each request."""
        responses = []
        for request in requests:
            logits = _input(request, "logits").astype(np.float32)
            numbers = _input(request, "task_id").reshape(-1)
            if not np.isfinite(logits).all():
                error = pb_utils.TritonError(
                    "the graph's logits are not finite: export another --precision"
                )
                responses.append(pb_utils.InferenceResponse(error=error))
                continue
            scaled = logits / self._heat[numbers, None]
            scaled -= scaled.max(axis=1, keepdims=True)
            odds = np.exp(scaled)
            odds /= odds.sum(axis=1, keepdims=True)
            best = odds.argmax(axis=1)
            labels = [self._labels[n][b].encode() for n, b in zip(numbers, best, strict=True)]
            outputs = {
                "LABEL": np.array(labels, np.object_)[:, None],
                "SCORE": odds.max(axis=1)[:, None],
                "PROBABILITIES": odds,
            }
            tensors = [pb_utils.Tensor(name, value) for name, value in outputs.items()]
            responses.append(pb_utils.InferenceResponse(output_tensors=tensors))
        return responses


def _input(request: Any, name: str) -> np.ndarray:
    return pb_utils.get_input_tensor_by_name(request, name).as_numpy()
