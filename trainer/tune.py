"""Downstream prompt tuning (appendix A.4): a soft prompt learns a task from some forty samples."""

from __future__ import annotations

import json
import logging
import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer.backbone import Backbone
from trainer.configs import TuneConfig
from trainer.data import Examples
from trainer.few_shot import draw
from trainer.figures import figures, fit_temperature
from trainer.initial import initial_params
from trainer.loop import DEFAULT_OPTIONS, Loop, RunOptions, Schedule, check_rate
from trainer.modes import Params, add_group
from trainer.options import checkpoint_folder, result_folder
from trainer.parallel import workers
from trainer.prompt import Prompt, TaskRecord, save_prompt
from trainer.rows import Rows, Scorer
from trainer.runs import METRICS_FILE, RUN_FILE, record
from trainer.tasks import Task
from trainer.tensors import digest

log = logging.getLogger(__name__)


@dataclass
class Tuned:
    """A tuned prompt and how it came about."""

    prompt: Prompt
    metrics: str
    loop: Loop


def epoch_stream(size: int, samples: int, seed: int, step: int) -> np.ndarray:
    """The row numbers of a step: epochs are shuffled one after another, without a gap.

    Args:
        size: N rows; samples: rows a step; step: from 0.

    Returns:
        int [samples], a function of (seed, step) alone. With fewer rows than `samples` a step
        takes several epochs' worth.
    """
    first = step * samples
    epochs = range(first // size, (first + samples - 1) // size + 1)
    rows = np.concatenate(
        [np.random.default_rng([seed, epoch]).permutation(size) for epoch in epochs]
    )
    start = first - epochs.start * size
    return rows[start : start + samples]


def prompt_gradient(
    scorer: Scorer, params: Params, rows: Rows, indices: np.ndarray
) -> dict[str, float]:
    """Put the gradient of the mean loss over rows `indices` into `.grad`.

    Several processes each take their share of the rows; all end with the whole gradient.

    Returns:
        loss and accuracy over all the rows.
    """
    team = workers()
    mine = indices[team.share(len(indices))]
    measured = {"loss": 0.0, "accuracy": 0.0}
    if len(mine):
        batch = rows.batch(mine)
        assert batch.labels is not None
        scores = scorer(add_group(params), batch)
        losses = torch.nn.functional.cross_entropy(scores, batch.labels, reduction="sum")
        loss = losses / len(indices)
        loss.backward()
        hits = (scores.argmax(-1) == batch.labels).sum()
        measured = {"loss": float(loss.detach()), "accuracy": float(hits) / len(indices)}
    team.sum_gradients(params)
    return team.sum_values(measured)


def _steps(config: TuneConfig, train: Examples) -> int:
    samples = config.batch * config.accumulation
    return max(1, math.ceil(config.epochs * len(train) / samples))


def tune(
    backbone: Backbone,
    task: Task,
    train: Examples,
    validation: Examples,
    config: TuneConfig,
    options: RunOptions = DEFAULT_OPTIONS,
    *,
    params: Params | None = None,
) -> Tuned:
    """Tune a prompt; what `python -m trainer tune`, `reproduce` and the demo's Teach tab call.

    Args:
        config: a `TuneConfig` (its task and data fields are not looked at).
        options: checkpoint, what is called after an evaluation, progress bar; see `RunOptions`.
        params: where to start, in place of `config.init`.

    Raises:
        UserError: label words, prompt, template or rate do not fit. Failure: the loss diverged.
    """
    scorer = Scorer.of(backbone, task, config.mode)
    if params is None:
        params = initial_params(backbone, config.init, config.mode, config.tokens, config.seed)
    samples, steps = config.batch * config.accumulation, _steps(config, train)
    check_rate(config.rate, steps, params)
    rows = Rows(backbone, task.template, train.texts, train.labels, config.max_tokens)
    held = Rows(backbone, task.template, validation.texts, validation.labels, config.max_tokens)
    schedule = Schedule(
        steps=steps,
        rate=config.rate,
        weight_decay=config.weight_decay,
        warmup=min(config.warmup, steps // 2),
        decay=True,
        evaluate_every=max(1, round(len(train) / samples)),  # once an epoch
        patience=config.patience,
    )
    loop = Loop(
        params,
        lambda step: prompt_gradient(
            scorer, params, rows, epoch_stream(len(rows), samples, config.seed, step)
        ),
        lambda: scorer.score(params, held),
        schedule,
        options,
        "tune",
    )
    best = loop.run()
    assert loop.state.best is not None  # the start is evaluated before the first step
    scores = scorer.all(best, held)
    temperature = fit_temperature(scores, torch.from_numpy(held.labels))
    result = figures(scores, held.labels, task.labels, temperature)
    task_record = TaskRecord(
        name=getattr(config, "name", None) or task.name,
        labels=list(task.labels),
        words=list(task.words),
        template=task.template,
        mode=config.mode,
        backbone=backbone.name,
        backbone_sha256=backbone.sha256,
        max_tokens=config.max_tokens,
        temperature=temperature,
        method="tune",
        seed=config.seed,
        figures={
            "validation_accuracy": result["accuracy"],
            "validation_macro_f1": result["macro_f1"],
            "validation_calibration_error": result["calibration_error"],
            "validation_loss": loop.state.best.loss,
            "steps": loop.state.step,
            "best_step": loop.state.best_step,
        },
        registered=task.registered,
    )
    return Tuned(Prompt(best, task_record), loop.metrics_text(), loop)


def no_better_than_one_answer(accuracy: float, labels: np.ndarray) -> float | None:
    """The share of the commonest class of `labels` [N], if `accuracy` is not above it by a standard
    error of such a share; else None. What is tuned then tells the classes apart hardly, or not."""
    share = float(np.bincount(labels).max()) / len(labels)
    close = share + math.sqrt(share * (1 - share) / len(labels))
    return share if accuracy <= close else None


def warn_of_one_answer(accuracy: float, labels: np.ndarray) -> None:
    """Say so where a result is hardly better than one answer for every text."""
    share = no_better_than_one_answer(accuracy, labels)
    if share is not None:
        log.warning(
            "%.3f on %d validation samples is hardly more than one answer for every text (%.3f): "
            "the backbone may not know what is asked. Try label words that name the classes "
            "(--words), a template that asks for them (--template), more samples, or another "
            "--backbone",
            accuracy, len(labels), share,
        )  # fmt: skip


def tune_from_each(
    backbone: Backbone,
    task: Task,
    train: Examples,
    validation: Examples,
    config: TuneConfig,
    checkpoint: Path,
    facts: dict[str, Any],
) -> tuple[Tuned, str]:
    """Tune from `config.init` and from each of `config.try_also`.

    Args:
        checkpoint: folder of the checkpoint, or of one for each start.
        facts: what a checkpoint is bound to besides the settings.

    Returns:
        The prompt that is best on the validation samples (of equals the first), and its start.

    Raises:
        UserError, Failure: as for `tune`; a start that cannot be used is told before the first run.
    """
    starts = {
        start: initial_params(backbone, start, config.mode, config.tokens, config.seed)
        for start in (config.init, *config.try_also)
    }
    for params in starts.values():
        check_rate(config.rate, _steps(config, train), params)
    best: tuple[Tuned, str] | None = None
    for number, (start, params) in enumerate(starts.items()):
        one = replace(config, init=start, try_also=[])
        folder = checkpoint / str(number) if len(starts) > 1 else checkpoint
        options = RunOptions(folder, record("tune", one, **facts))
        tuned = tune(backbone, task, train, validation, one, options, params=params)
        score = tuned.loop.state.best
        assert score is not None
        if len(starts) > 1:
            if workers().main:
                found = score.accuracy, score.loss
                log.info("from %s: validation accuracy %.3f, loss %.3f", start, *found)
            tuned.loop.save()
        if best is None or score.better_than(best[0].loop.state.best):
            best = tuned, start
    assert best is not None
    return best


def run_tune(config: TuneConfig) -> None:
    """`python -m trainer tune`."""
    out = result_folder(config.out)
    task = config.resolve_task()
    train, validation = draw(config, task)
    backbone = config.load_backbone()
    data = digest(train.texts, train.labels, validation.texts, validation.labels)
    facts = {"backbone_sha256": backbone.sha256, "data_sha256": data}
    checkpoint = checkpoint_folder(out)
    tuned, start = tune_from_each(backbone, task, train, validation, config, checkpoint, facts)
    if not workers().main:
        return
    run = record("tune", config, **facts, start=start)
    extras = {METRICS_FILE: tuned.metrics, RUN_FILE: json.dumps(run, indent=2) + "\n"}
    save_prompt(tuned.prompt, out, backbone, extras)
    shutil.rmtree(checkpoint, ignore_errors=True)
    if config.try_also:
        log.info("kept: the prompt from %s", start)
    log.info(
        "%s: validation accuracy %.3f after %d steps (best at %d); prompt in %s",
        task.name, tuned.prompt.task.figures["validation_accuracy"],
        tuned.loop.state.step, tuned.loop.state.best_step, out,
    )  # fmt: skip
    warn_of_one_answer(tuned.prompt.task.figures["validation_accuracy"], validation.labels)
