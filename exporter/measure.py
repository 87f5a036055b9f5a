"""What a lower precision costs, measured on labelled texts at export."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer

from exporter.record import Arrays
from exporter.verify import feed, run
from serve.errors import Failure, UserError
from serve.task import Task as ServedTask
from serve.tokenize import Encoder
from trainer.data import load_examples
from trainer.tasks import Task

ROWS = 32  # of a batch; rows are sorted by length first, so that little is padding
ALLOWED_LOSS = 0.005  # of accuracy: half a point


@dataclass
class Validation:
    """Labelled texts of one task, as rows for the graph.

    Attributes:
        task: its name; slot: its place among the exported tasks.
        rows: token ids of each text within the template; labels: [M] class indices.
    """

    task: str
    slot: int
    rows: list[list[int]]
    labels: np.ndarray


def load_validation(
    path: str,
    task: str | None,
    names: list[str],
    records: list[dict[str, Any]],
    tasks: list[Task],
    tokenizer: Tokenizer,
    max_tokens: int,
    text_column: str | None = None,
    label_column: str = "label",
) -> Validation:
    """Read a labelled file for one of the exported tasks.

    Args:
        task: its name; may be None where there is one task only.
        records: of the exported tasks, for `serve.bundle.add_task`.
        tasks: the same as the trainer knows them; they say which columns are the text where
            `text_column` does not.

    Raises:
        UserError: the task is not among them, or the file does not fit its labels.
    """
    if task is None and len(names) == 1:
        task = names[0]
    if task not in names:
        raise UserError(
            f"--task must name the task of --validation, one of {', '.join(names)}, not {task!r}"
        )
    slot = names.index(task)
    record = records[slot]
    own = tasks[slot]
    examples = load_examples(
        path, text_column or own.text_format, label_column, labels=own.labels, drop=own.drop,
        flag="--validation", advice="",
    )  # fmt: skip
    known = {item.name for item in fields(ServedTask)}
    served = ServedTask(name=task, **{key: record[key] for key in known & set(record) - {"name"}})
    encoded = Encoder(tokenizer, max_tokens).encode(examples.texts, [served] * len(examples))
    return Validation(task, slot, [row.ids for row in encoded], np.asarray(examples.labels))


def answer(graph: ort.InferenceSession, values: Arrays, validation: Validation) -> np.ndarray:
    """The graph's logits [M, C] on the validation rows."""
    order = sorted(range(len(validation.rows)), key=lambda row: len(validation.rows[row]))
    result: np.ndarray | None = None
    for start in range(0, len(order), ROWS):
        chosen = order[start : start + ROWS]
        # Rows of one task come back in the order in which they are given.
        batch, _ = feed([(validation.slot, validation.rows[row]) for row in chosen])
        logits = run(graph, {**values, **batch})
        if result is None:
            result = np.zeros((len(order), logits.shape[1]), np.float32)
        result[chosen] = logits
    assert result is not None
    return result


def compare(plain: np.ndarray, other: np.ndarray, validation: Validation) -> dict[str, Any]:
    """Figures of a variant against the fp32 graph, for `bundle.json`.

    Args:
        plain, other: [M, C] logits; classes the task does not have are hugely negative.
    """
    real = plain > -5e3
    gap = np.abs(np.where(real, other - plain, 0.0))
    truth = validation.labels
    before = float((plain.argmax(1) == truth).mean())
    after = float((other.argmax(1) == truth).mean())
    return {
        "task": validation.task,
        "texts": len(truth),
        "accuracy": after,
        "accuracy_change": after - before,
        "agreement": float((plain.argmax(1) == other.argmax(1)).mean()),
        "max_logit_difference": float(gap.max()),
        "mean_logit_difference": float(gap[real].mean()),
    }


def refuse(precision: str, figures: dict[str, Any]) -> None:
    """Raises: Failure when the variant loses more than half a point of accuracy: more than one row
    where that is more, since below 200 rows a single one would be half a point."""
    lost = round(-figures["accuracy_change"] * figures["texts"])
    if lost > max(1, ALLOWED_LOSS * figures["texts"]):
        raise Failure(
            f"{precision} loses {-100 * figures['accuracy_change']:.1f} points of accuracy on "
            f"{figures['texts']} texts of task '{figures['task']}', more than "
            f"{100 * ALLOWED_LOSS:g}: nothing was written; leave it out, or pass --force"
        )
