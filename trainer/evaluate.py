"""`python -m trainer evaluate`: how well a prompt, or a fully tuned model, does on a data set."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from serve.cli import option
from serve.errors import UserError
from serve.files import write_json
from trainer.backbone import Backbone, load_backbone
from trainer.data import Examples
from trainer.figures import as_table, figures
from trainer.modes import Params
from trainer.options import TaskOptions, pick_device
from trainer.prompt import Prompt, TaskRecord, check_fits, load_prompt, read_record
from trainer.rows import Rows, Scorer
from trainer.runs import versions
from trainer.tasks import Task, get_task


@dataclass(kw_only=True)
class EvaluateConfig(TaskOptions):
    """Accuracy, macro-F1, confusion matrix and calibration error of a prompt on a data set.

    Prints a table, and with --json FILE (or - for standard output) the figures as JSON.
    """

    prompt: str = option(help="a prompt folder, or a fully tuned model's", positional=True)
    backbone: str | None = option(None, help="the T5 (default: the one the prompt names)")
    split: str = option(
        "test", help="rows to evaluate on (a set without test rows: its validation rows, or a "
        "fifth chosen by hash, which tuning never draws); `all` for every row of a file",
        choices=("train", "validation", "test", "all"),
    )  # fmt: skip
    limit: int = option(0, help="at most this many rows, drawn by seed 0 (0: all)", minimum=0)
    json: str | None = option(None, help="write the figures as JSON here", metavar="FILE")
    device: str = option("auto", help="auto, cpu, cuda, cuda:1 ...")

    examples = ["runs/sst2 --task sst2", "runs/mine --data reviews.csv --split all --json -"]


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


def _task_of(config: EvaluateConfig, prompt: Prompt) -> Task:
    """The data set to evaluate on: what the flags say, or the task the prompt was tuned for."""
    record = prompt.task
    if config.task is not None:
        task = config.resolve_task()
    elif config.data is not None:
        if not record.labels:
            task = config.resolve_task()
        else:
            labels, words = tuple(record.labels), tuple(record.words)
            task = Task(record.name, labels, words, template=record.template)
    else:
        task = get_task(record.name)
    if record.labels and len(task.labels) != len(record.labels):
        raise UserError(
            f"the prompt knows {len(record.labels)} classes ({', '.join(record.labels)}), but "
            f"task '{task.name}' has {len(task.labels)}: pass the task it was tuned for"
        )
    return task


def run_evaluate(config: EvaluateConfig) -> None:
    """`python -m trainer evaluate`."""
    path = Path(config.prompt)
    prompt = _load(path)
    task = _task_of(config, prompt)
    record = prompt.task
    if not record.labels:  # a prompt of PEFT's or Google's says nothing about labels
        record = replace(
            record, labels=list(task.labels), words=list(task.words), template=task.template
        )
    examples = config.load(task, None if config.split == "all" else config.split)
    if config.limit:
        examples = examples.sample(config.limit, 0)
    full = record.mode == "none"
    name = config.backbone or (str(path) if full else record.backbone or "mini")
    backbone = load_backbone(name, device=pick_device(config.device))
    if not full:
        check_fits(prompt, backbone, path)
    params = {key: value.to(backbone.device) for key, value in prompt.params.items()}
    result = evaluate(backbone, record, params, examples, quiet=False)
    result = {
        "prompt": str(path), "task": task.name, "split": config.split, "source": examples.source,
        "backbone": name, "mode": record.mode, **result, "versions": versions(),
    }  # fmt: skip
    if config.json == "-":
        sys.stdout.write(json.dumps(result) + "\n")
        return
    sys.stdout.write(as_table(result) + "\n")
    if config.json:
        write_json(config.json, result)
