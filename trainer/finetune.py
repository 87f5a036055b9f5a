"""Full tuning (appendix A.1), the baseline: every weight learns, and there is no prompt."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import asdict

import torch

from serve.errors import UserError
from serve.files import atomic_folder
from trainer.backbone import Backbone
from trainer.configs import FinetuneConfig
from trainer.data import Examples
from trainer.few_shot import draw
from trainer.figures import figures, fit_temperature
from trainer.loop import DEFAULT_OPTIONS, Loop, RunOptions, Schedule
from trainer.options import checkpoint_folder, result_folder
from trainer.parallel import workers
from trainer.prompt import TaskRecord
from trainer.rows import Rows, Scorer
from trainer.runs import METRICS_FILE, RUN_FILE, record
from trainer.tasks import Task
from trainer.tensors import digest
from trainer.tune import epoch_stream, prompt_gradient, warn_of_one_answer

log = logging.getLogger(__name__)


def finetune(
    backbone: Backbone,
    task: Task,
    train: Examples,
    validation: Examples,
    config: FinetuneConfig,
    options: RunOptions = DEFAULT_OPTIONS,
) -> Loop:
    """Tune all weights of `backbone` (loaded with `trainable=True`) in place.

    The best weights on the validation samples are in the backbone when it returns.

    Raises:
        UserError: label words or template do not fit, or the rate is 0. Failure: the loss diverged.
    """
    if not config.rate:  # any other moves the weights, which need to move far less than a prompt
        raise UserError(f"{options.rate_flag} 0 leaves the model as it is: try 3e-4")
    scorer = Scorer.of(backbone, task, "none")
    params = dict(backbone.t5.model.named_parameters())
    rows = Rows(backbone, task.template, train.texts, train.labels, config.max_tokens)
    held = Rows(backbone, task.template, validation.texts, validation.labels, config.max_tokens)
    samples = config.batch * config.accumulation
    steps = max(1, math.ceil(config.epochs * len(train) / samples))
    schedule = Schedule(
        steps=steps, rate=config.rate, warmup=min(config.warmup, steps // 2), decay=True,
        evaluate_every=max(1, round(len(train) / samples)), patience=config.patience, clip=1.0,
    )  # fmt: skip
    loop = Loop(
        params,
        lambda step: prompt_gradient(
            scorer, params, rows, epoch_stream(len(rows), samples, config.seed, step)
        ),
        lambda: scorer.score({}, held),
        schedule,
        options,
        "finetune",
    )
    best = loop.run()
    with torch.no_grad():
        for name, value in params.items():
            value.copy_(best[name])
    return loop


def run_finetune(config: FinetuneConfig) -> None:
    """`python -m trainer finetune`."""
    out = result_folder(config.out)
    task = config.resolve_task()
    train, validation = draw(config, task)
    backbone = config.load_backbone(trainable=True)
    data = digest(train.texts, train.labels, validation.texts, validation.labels)
    run = record("finetune", config, backbone_sha256=backbone.sha256, data_sha256=data)
    options = RunOptions(checkpoint_folder(out), run)
    loop = finetune(backbone, task, train, validation, config, options)
    if not workers().main:
        return
    held = Rows(backbone, task.template, validation.texts, validation.labels, config.max_tokens)
    scores = Scorer.of(backbone, task, "none").all({}, held)
    temperature = fit_temperature(scores, torch.from_numpy(held.labels))
    result = figures(scores, held.labels, task.labels, temperature)
    task_record = TaskRecord(
        name=task.name, labels=list(task.labels), words=list(task.words), template=task.template,
        mode="none", backbone=backbone.name, backbone_sha256=None, max_tokens=config.max_tokens,
        temperature=temperature, method="finetune", seed=config.seed,
        figures={"validation_accuracy": result["accuracy"], "steps": loop.state.step},
        registered=task.registered,
    )  # fmt: skip
    with atomic_folder(out) as folder:
        backbone.t5.model.save_pretrained(folder)
        backbone.tokenizer.save_pretrained(folder)
        (folder / "task.json").write_text(json.dumps(asdict(task_record), indent=2) + "\n", "utf-8")
        (folder / METRICS_FILE).write_text(loop.metrics_text())
        (folder / RUN_FILE).write_text(json.dumps(run, indent=2) + "\n")
    loop.clean_up()
    log.info(
        "%s: validation accuracy %.3f after %d steps; model in %s",
        task.name, result["accuracy"], loop.state.step, out,
    )  # fmt: skip
    warn_of_one_answer(result["accuracy"], held.labels)
