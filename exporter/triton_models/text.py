"""Texts and task names to token ids: the first step of the ensemble.

Runs in Triton's Python backend, with the same code that `serve` tokenizes by.

TEXT [n, 1] and TASK [n, 1] become input_ids and attention_mask [n, S], task_id and truncated
[n, 1]. S is a multiple of `pad_to`: Triton merges requests of one shape only.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from serve.errors import UserError
from serve.task import Task
from serve.tokenize import Encoded, Encoder


class TritonPythonModel:
    """What the Python backend calls."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the tokenizer and the tasks, which lie beside this file."""
        folder = Path(args["model_repository"]) / args["model_version"]
        settings = json.loads((folder / "tasks.json").read_text("utf-8"))
        self._tasks = [Task(**record) for record in settings["tasks"]]
        self._numbers = {task.name: number for number, task in enumerate(self._tasks)}
        self._encoder = Encoder(folder / "tokenizer.json", settings["max_tokens"])
        self._pad_to = settings["pad_to"]

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response for each request; a request that is not understood gets an error."""
        read: list[tuple[list[str], list[int]] | Exception] = []
        for request in requests:
            try:
                read.append(self._read(request))
            except (UserError, UnicodeDecodeError) as error:
                read.append(error)
        whole = [item for item in read if not isinstance(item, Exception)]
        texts = [text for item in whole for text in item[0]]
        tasks = [self._tasks[number] for item in whole for number in item[1]]
        encoded = iter(self._encoder.encode(texts, tasks) if texts else [])
        responses = []
        for item in read:
            if isinstance(item, Exception):
                told = pb_utils.TritonError(str(item))
                responses.append(pb_utils.InferenceResponse(error=told))
            else:
                rows = [next(encoded) for _ in item[1]]
                responses.append(self._response(rows, item[1]))
        return responses

    def _read(self, request: Any) -> tuple[list[str], list[int]]:
        """Texts and task numbers of a request."""
        texts = [item.decode() for item in _column(request, "TEXT")]
        numbers = []
        for name in (item.decode() for item in _column(request, "TASK")):
            if name not in self._numbers:
                raise UserError(f"no task '{name[:80]}': there are {', '.join(self._numbers)}")
            numbers.append(self._numbers[name])
        return texts, numbers

    def _response(self, rows: list[Encoded], numbers: list[int]) -> Any:
        longest = max(len(row.ids) for row in rows)
        longest = -(-longest // self._pad_to) * self._pad_to
        ids = np.zeros((len(rows), longest), np.int64)
        mask = np.zeros_like(ids)
        for index, row in enumerate(rows):
            ids[index, : len(row.ids)] = row.ids
            mask[index, : len(row.ids)] = 1
        outputs = {
            "input_ids": ids,
            "attention_mask": mask,
            "task_id": np.array(numbers, np.int64)[:, None],
            "truncated": np.array([row.truncated for row in rows], np.bool_)[:, None],
        }
        tensors = [pb_utils.Tensor(name, value) for name, value in outputs.items()]
        return pb_utils.InferenceResponse(output_tensors=tensors)


def _column(request: Any, name: str) -> list[bytes]:
    return list(pb_utils.get_input_tensor_by_name(request, name).as_numpy().reshape(-1))
