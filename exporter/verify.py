"""Holding an exported graph to the trainer's own forward pass.

The reference is `trainer.readout.class_scores` on each row alone, so that padding, mixing of tasks
and everything that the graph rearranges is part of what is compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch

from exporter.record import Arrays
from serve.errors import Failure
from serve.plan import in_groups
from trainer.backbone import Backbone
from trainer.modes import Params
from trainer.readout import Batch, class_scores

TOLERANCE = 1e-4
FLOATS = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


@dataclass
class Slot:
    """A task as the graph sees it.

    Attributes:
        params: the prompt, without a group axis; words: the label words' ids.
        suffix: ids of the template after the text.
    """

    params: Params
    words: list[int]
    prefix: list[int] = field(default_factory=list)
    suffix: list[int] = field(default_factory=list)


def session(graph: Path | bytes, threads: int = 0) -> ort.InferenceSession:
    """A CPU session; `threads` 0 lets onnxruntime choose.

    Raises:
        Failure: onnxruntime does not take the graph.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    source = graph if isinstance(graph, bytes) else str(graph)
    try:
        return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors share no base class
        first = str(error).splitlines()[0]
        raise Failure(f"onnxruntime does not load the exported graph ({first})") from error


def left_padded(value: np.ndarray, axis: int, total: int) -> np.ndarray:
    """`value` with zeros before it along `axis`, so that it is `total` long there."""
    widths = [(0, 0)] * value.ndim
    widths[axis] = (total - value.shape[axis], 0)
    return np.pad(value, widths)


def bank(
    slots: Sequence[Slot], mode: str, tokens: int, prefix: ort.InferenceSession | None
) -> Arrays:
    """The graph's bank inputs for these tasks, left padded to `tokens` prompt tokens."""
    lengths = [next(iter(slot.params.values())).shape[-2] for slot in slots]
    classes = max(len(slot.words) for slot in slots)
    labels = np.full((len(slots), classes), -1, np.int64)
    for index, slot in enumerate(slots):
        labels[index, : len(slot.words)] = slot.words
    result: Arrays = {"bank_length": np.array(lengths, np.int64), "label_ids": labels}
    if mode == "deep":
        kv = [left_padded(slot.params["kv"].numpy(), 3, tokens) for slot in slots]
        states = [left_padded(slot.params["states"].numpy(), 0, tokens) for slot in slots]
        return {"bank_kv": np.stack(kv), "bank_states": np.stack(states), **result}
    prompts = [left_padded(slot.params["prompt_embeddings"].numpy(), 0, tokens) for slot in slots]
    if mode == "full":
        return {"bank_prompts": np.stack(prompts), **result}
    assert prefix is not None
    computed = [
        prefix.run(["kv", "states"], {"prompt": prompt, "length": np.array(length, np.int64)})
        for prompt, length in zip(prompts, lengths, strict=True)
    ]
    kv = [item[0] for item in computed]
    return {"bank_kv": np.stack(kv), "bank_states": np.stack([s for _, s in computed]), **result}


def batches(
    slots: Sequence[Slot], vocabulary: int, longest: int
) -> list[list[tuple[int, list[int]]]]:
    """Batches to compare on: (slot, ids) rows of mixed lengths and tasks, of one task, as many of
    each of two tasks, batch 1, one length."""
    random = np.random.default_rng(0)

    def row(slot: int, length: int) -> tuple[int, list[int]]:
        task = slots[slot]
        text = random.integers(3, vocabulary, size=length).tolist()
        return slot, [*task.prefix, *text, *task.suffix][:whole]

    count, whole = len(slots), longest
    longest = max(2, longest - max(len(slot.prefix) + len(slot.suffix) for slot in slots))
    return [
        [row(index % count, length) for index, length in enumerate((3, 17, 1, 40, 0, 24))],
        [row(0, length) for length in (5, 30, 1, 12)],
        [row(index // 2 % count, length) for index, length in enumerate((4, 9, 21, 2))],
        [row(index % count, min(2, longest)) for index in range(3)],
        *([row(index, min(11, longest))] for index in range(min(count, 3))),
        [row(0, min(150, longest)), row(count - 1, min(129, longest))],
    ]


def feed(rows: Sequence[tuple[int, list[int]]]) -> tuple[Arrays, list[int]]:
    """The graph's text inputs of one batch, and the order in which it takes the rows."""
    longest = max(len(ids) for _, ids in rows)
    input_ids = np.zeros((len(rows), longest), np.int64)
    mask = np.zeros_like(input_ids)
    order, groups = in_groups([slot for slot, _ in rows])
    for index, place in enumerate(order):
        ids = rows[place][1]
        input_ids[index, : len(ids)] = ids
        mask[index, : len(ids)] = 1
    task_id = np.array(groups, np.int64)
    return {"input_ids": input_ids, "attention_mask": mask, "task_id": task_id}, order


def run(graph: ort.InferenceSession, values: Arrays) -> np.ndarray:
    """The graph's logits as float32; inputs that it does not have are left out, and floats are
    given in the type it takes."""
    given: dict[str, Any] = {}
    for item in graph.get_inputs():
        value = values[item.name]
        given[item.name] = value.astype(FLOATS[item.type]) if value.dtype.kind == "f" else value
    return graph.run(None, given)[0].astype(np.float32)


@torch.no_grad()
def reference(backbone: Backbone, mode: str, slot: Slot, ids: list[int]) -> np.ndarray:
    """Class scores [C] of one row by the trainer's forward pass."""
    params = {name: value[None] for name, value in slot.params.items()}
    batch = Batch(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool))
    words = torch.tensor(slot.words)
    scores = class_scores(backbone.t5, mode, params, batch, words, backbone.decoder_ids)
    return scores[0].numpy()


def difference(
    logits: Callable[[Arrays], np.ndarray],
    slots: Sequence[Slot],
    backbone: Backbone,
    mode: str,
    longest: int,
) -> float:
    """The largest difference of a logit between an exported graph and the trainer.

    Args:
        logits: the graph, from the inputs of `feed` to [B, C or more].

    Raises:
        Failure: a logit is not finite, or a padded class is not out of reach.
    """
    worst = 0.0
    for rows in batches(slots, backbone.t5.vocabulary, longest):
        batch, order = feed(rows)
        for place, got in zip(order, logits(batch), strict=True):
            slot, ids = rows[place]
            count = len(slots[slot].words)
            if not np.isfinite(got).all():
                raise Failure("the exported graph gives logits that are not finite")
            if (got[count:] > -5e3).any():
                raise Failure("the exported graph does not mask the classes a task does not have")
            expected = reference(backbone, mode, slots[slot], ids)
            worst = max(worst, float(np.abs(got[:count] - expected).max()))
    return worst


def check(worst: float, what: str) -> None:
    """Raises: Failure when the difference is too large to ship."""
    if not worst <= TOLERANCE:  # NaN as well
        raise Failure(
            f"{what} differs from torch by {worst:.2g} in a logit, more than {TOLERANCE:g}: "
            "nothing was written; report the versions of torch, onnx and onnxruntime"
        )
