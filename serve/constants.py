"""What the bank holds of a task: the keys and values of its prompt (modes `prefix`, `deep`), or the
prompt itself (mode `full`). Notation as in `serve.classifier`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from serve.bundle import Bundle
from serve.engine import CPU, Engine, on_device
from serve.errors import Failure
from serve.task import Task


class Constants:
    """Computes the constants of a bundle's tasks."""

    def __init__(self, bundle: Bundle, threads: int) -> None:
        self.bundle, self._threads = bundle, threads
        self._prefix: Engine | None = None

    def shapes(self, engine: Engine) -> dict[str, tuple[tuple[int, ...], type]]:
        """The bank's inputs in this mode, with the shape of a slot and the graph's type.

        Raises:
            Failure: the graph takes other inputs.
        """
        size, length = self.bundle.size, self.bundle.prompt_tokens
        shapes: dict[str, tuple[int, ...]] = {}
        if self.bundle.mode == "full":
            shapes["bank_prompts"] = (length, size("d_model"))
        else:
            layers, heads = size("num_layers"), size("num_heads")
            shapes["bank_kv"] = (layers, 2, heads, length, size("d_kv"))
            shapes["bank_states"] = (length, size("d_model"))
        needed = {"input_ids", "task_id", "label_ids"} | set(shapes)
        have: Mapping[str, Any] = engine.inputs
        unknown = set(have) - needed - {"attention_mask", "bank_length"}
        if not needed <= set(have) or unknown:
            raise Failure(
                f"{engine.graph} takes {sorted(have)}, not what mode {self.bundle.mode} "
                "gives it: export the bundle again"
            )
        return {name: (shape, have[name] or np.float32) for name, shape in shapes.items()}

    def of(self, task: Task) -> dict[str, np.ndarray]:
        """A task's arrays for the bank, from its prompt [p, D] padded on the left to [P, D].

        Raises:
            Failure: its prompt cannot be read.
        """
        arrays = task.arrays or self.bundle.read_prompt(task)
        prompt = arrays["states" if self.bundle.mode == "deep" else "prompt_embeddings"]
        gap = self.bundle.prompt_tokens - len(prompt)
        length = np.array(len(prompt), np.int64)
        padded = np.pad(prompt, ((gap, 0), (0, 0)))
        if self.bundle.mode == "full":
            return {"bank_prompts": padded, "bank_length": length}
        if self.bundle.mode == "deep":
            kv, states = np.pad(arrays["kv"], ((0, 0), (0, 0), (0, 0), (gap, 0), (0, 0))), padded
        else:
            feed = {"prompt": on_device(padded, "cpu"), "length": on_device(length, "cpu")}
            kv, states = self._prefix_engine().run(feed)[:2]
        return {"bank_kv": kv, "bank_states": states, "bank_length": length}

    def _prefix_engine(self) -> Engine:
        # Made at the first need; it shares the weights file, which is mapped, not copied.
        if self._prefix is None:
            path = self.bundle.folder / self.bundle.header["prefix_graph"]
            self._prefix = Engine(path, threads=self._threads, providers=[CPU])
        return self._prefix
