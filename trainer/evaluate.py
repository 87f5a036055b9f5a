"""`python -m trainer evaluate`: how well a prompt, a fully tuned model, or a template does."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from serve.errors import UserError
from serve.files import write_json
from trainer.backbone import Backbone, load_backbone
from trainer.configs import EvaluateConfig
from trainer.data import Examples
from trainer.figures import as_table, figures
from trainer.labels import Classes, match_classes
from trainer.modes import Params
from trainer.options import output_file, pick_device
from trainer.prompt import Prompt, TaskRecord, check_fits, load_prompt, read_record
from trainer.rows import Rows, Scorer
from trainer.runs import versions
from trainer.tasks import Task

log = logging.getLogger(__name__)


def evaluate(
    backbone: Backbone,
    record: TaskRecord,
    params: Params,
    examples: Examples,
    *,
    quiet: bool = True,
) -> dict[str, Any]:
    """The figures (`trainer.figures.figures`) of a prompt on examples.

    Args:
        record: words, template, mode, temperature and max_tokens count; mode "none" is the
            backbone without a prompt.
    """
    rows = Rows(backbone, record.template, examples.texts, examples.labels, record.max_tokens)
    scorer = Scorer(backbone, record.words, record.mode)
    with tqdm(total=len(rows), desc="evaluate", unit="text", disable=quiet or None) as bar:
        scores = scorer.all(params, rows, bar.update)
    return figures(scores, rows.labels, record.labels, record.temperature)


def _load(path: Path) -> Prompt:
    """A prompt, or the record of a fully tuned model with no tensors of its own."""
    if (path / "config.json").is_file() and (path / "task.json").is_file():
        return Prompt({}, read_record(path / "task.json"))
    return load_prompt(path)


def _task_of(config: EvaluateConfig, record: TaskRecord) -> Task:
    """The data set to evaluate on: what the flags say, or the task the prompt was tuned for.

    Raises:
        UserError: there is no such task, or a flag contradicts the record.
    """
    if config.prompt is not None and config.task is None and config.data is None:
        if record.data_set is None:
            raise UserError(
                f"{config.prompt} is of '{record.name}', which is no registered task: pass the "
                "rows with --data FILE, or a --task"
            )
        config = replace(config, task=record.data_set)
    if not record.labels:  # a prompt of PEFT's or Google's says nothing about labels
        return config.resolve_task()
    _check_flags(config, record)
    return record.as_task() if config.task is None else config.resolve_task()


def _check_flags(config: EvaluateConfig, record: TaskRecord) -> None:
    """Refuse what would be ignored: a prompt is read out as it was trained."""
    flags: list[tuple[str, list[str], list[str]]] = [
        ("words", config.words, record.words),
        ("template", [config.template] if config.template else [], [record.template]),
    ]
    if config.task is None:  # the names of a registered set's classes may differ, see _match
        flags.append(("labels", config.labels, record.labels))
    for name, given, own in flags:
        if given and given != own:
            raise UserError(
                f"--{name} {' '.join(given)}: the prompt's task.json decides, and says "
                f"{', '.join(own)}: leave --{name} out"
                + (", and name or number the file's classes so" if name == "labels" else "")
            )


def _match(task: Task, record: TaskRecord) -> list[int]:
    """[C], which of the prompt's classes each class of the task is.

    By their names; where these differ, by their places on the scale that the names or the label
    words of each side form, with a warning.

    Raises:
        UserError: another number of classes, or classes that neither tells.
    """
    both = f"({', '.join(record.labels)}), but task '{task.name}' has"
    if len(task.labels) != len(record.labels):
        raise UserError(
            f"the prompt knows {len(record.labels)} classes {both} {len(task.labels)} "
            f"({', '.join(task.labels)}): pass the task it was tuned for"
        )
    found = match_classes(Classes(task.labels, task.words), Classes(record.labels, record.words))
    if found is None:
        raise UserError(
            f"the prompt knows the classes {both} {', '.join(task.labels)}, and neither their "
            "names nor their label words say which is which: pass the task it was tuned for, or "
            "--task with --labels, the prompt's names in the order of the task's classes"
        )
    if found.by_name:
        return found.order
    log.warning(
        "the classes of task '%s' are matched with the prompt's by their order: %s",
        task.name, found.said(task.labels, record.labels),
    )  # fmt: skip
    return found.order


def run_evaluate(config: EvaluateConfig) -> None:
    """`python -m trainer evaluate`."""
    if config.json and config.json != "-":
        output_file(config.json, flag="--json")
    path = None if config.prompt is None else Path(config.prompt)
    prompt = Prompt({}, TaskRecord(mode="none")) if path is None else _load(path)
    record = prompt.task
    task = _task_of(config, record)
    if not record.labels:
        record = replace(
            record, labels=list(task.labels), words=list(task.words), template=task.template
        )
    order = np.array(_match(task, record))
    examples = config.load(task, None if config.split == "all" else config.split)
    examples = replace(examples, labels=order[examples.labels], names=tuple(record.labels))
    if config.limit:
        examples = examples.sample(config.limit, 0)
    full = record.mode == "none"
    if path and full and config.backbone:
        raise UserError(
            f"{path} is a fully tuned model, whose own weights are measured: leave --backbone out"
        )
    name = config.backbone or (str(path) if full and path else record.backbone or "mini")
    backbone = load_backbone(name, device=pick_device(config.device))
    if path and not full:
        check_fits(prompt, backbone, path)
    params = {key: value.to(backbone.device) for key, value in prompt.params.items()}
    result = evaluate(backbone, record, params, examples, quiet=False)
    result = {
        "prompt": path and str(path), "task": task.name, "split": config.split,
        "source": examples.source, "backbone": name, "mode": record.mode, **result,
        "versions": versions(),
    }  # fmt: skip
    if config.json == "-":
        sys.stdout.write(json.dumps(result) + "\n")
        return
    sys.stdout.write(as_table(result) + "\n")
    if config.json:
        write_json(config.json, result)
