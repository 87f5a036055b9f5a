"""One run: train a start, or tune on a task with a seed and measure on its test rows."""

from __future__ import annotations

import functools
import json
import logging
import time
from dataclasses import dataclass, replace
from typing import Any

import torch

from trainer.backbone import Backbone, load_backbone
from trainer.configs import FinetuneConfig, MetaConfig, PretrainConfig, TuneConfig
from trainer.data import Examples, load_task
from trainer.evaluate import evaluate
from trainer.few_shot import draw_few_shot
from trainer.finetune import finetune
from trainer.initial import initial_params
from trainer.loop import RunOptions
from trainer.prompt import TaskRecord, save_prompt
from trainer.reproduce.plan import UNTRAINED, asked, scale
from trainer.reproduce.sources import load_source
from trainer.reproduce.store import Settings, Store
from trainer.runs import METRICS_FILE, RUN_FILE, versions
from trainer.source import (
    meta_train,
    pretrain,
    source_prompt,
    source_words,
)  # fmt: skip
from trainer.tasks import Task, get_task
from trainer.tune import tune

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Surroundings:
    """Where runs happen; none of it changes a result.

    Attributes:
        out: OUT; backbone: name or folder; device: cpu, cuda:0 ...; data_dir: of --data-dir.
        sources: source file by its digest; encoder: sentence encoder, None for the default.
        quiet: no progress bar of the run itself.
    """

    out: str
    backbone: str
    device: str
    data_dir: str | None
    sources: dict[str, str]
    encoder: str | None
    quiet: bool = True


# Accuracy of a start on a task's test rows before any tuning, the same for all seeds of a row.
_at_start: dict[tuple[Any, ...], float] = {}


@functools.lru_cache(maxsize=1)
def _frozen(name: str, device: str) -> Backbone:
    return load_backbone(name, device=device)


@functools.lru_cache(maxsize=16)
def _examples(task: str, split: str, data_dir: str | None) -> Examples:
    return load_task(task, split, data_dir=data_dir, advice="")


def execute(settings: Settings, where: Surroundings) -> None:
    """Do a run and write its result, unless it is there."""
    store = Store(where.out)
    if settings["kind"] == "start":
        if not store.has_start(settings):
            run_start(settings, where)
        return
    if store.load(settings) is None:
        started = time.monotonic()
        result = run_cell(settings, where)
        result["seconds"] = round(time.monotonic() - started, 2)
        store.save(settings, result, versions())


def run_start(settings: Settings, where: Surroundings) -> None:
    """Train a start with MetaPT or PPT and write its prompt folder; resumes from a checkpoint."""
    backbone = _frozen(where.backbone, where.device)
    data = load_source(where.sources[settings["source"]["sha"]], settings["source"], where.encoder)
    path = Store(where.out).start_path(settings)
    chosen = {
        key: settings[key]
        for key in (
            "mode", "prompt_tokens", "max_tokens", "init", "evaluate_every", "patience", "steps",
            "rate",
        )
    }  # fmt: skip
    if isinstance(chosen["init"], dict):  # goes on from another start
        chosen["init"] = str(Store(where.out).start_path(chosen["init"]))
    chosen |= {key: settings[key] for key in ("decay", "clip", "seed") if key in settings}
    chosen |= settings.get("question", {})
    if "words" in chosen:
        chosen["words"] = list(scale(chosen["words"], data.classes))
    started = time.monotonic()
    checkpoint = path.with_name(path.name + ".checkpoint")
    options = RunOptions(checkpoint, settings, quiet=where.quiet)
    config: MetaConfig | PretrainConfig
    if settings["method"] == "metapt":
        names = ("inner_rate", "inner_steps", "samples", "balanced")
        extra = {name: settings[name] for name in names}
        config = MetaConfig(data="", out=str(path), **chosen, **extra, **settings["more"])
        loop = meta_train(backbone, data, config, replace(options, rate_flag="--outer-rate"))
    else:
        config = PretrainConfig(data="", out=str(path), **chosen, batch=settings["batch"])
        loop = pretrain(backbone, data, config, replace(options, rate_flag="--ppt-rate"))
    words = source_words(config.words, data)
    prompt = source_prompt(loop, config, words, settings["method"])
    prompt.task.figures["seconds"] = round(time.monotonic() - started, 1)
    record = {"settings": settings, "versions": versions()}
    extras = {METRICS_FILE: loop.metrics_text(), RUN_FILE: json.dumps(record, indent=2) + "\n"}
    save_prompt(prompt, path, backbone, extras)
    loop.clean_up()


def run_cell(settings: Settings, where: Surroundings) -> dict[str, Any]:
    """Tune on the samples of the seed and evaluate; returns accuracy, macro-F1 and more."""
    task = asked(get_task(settings["task"]), settings.get("question", {}))
    test = _examples(task.name, "test", where.data_dir)
    if settings["limit_eval"]:
        test = test.sample(settings["limit_eval"], 0)
    method = settings["method"]
    if method == "words":
        backbone = _frozen(where.backbone, where.device)
        return _measure(backbone, _record(task, "none", settings["max_tokens"]), {}, test)
    pool = _examples(task.name, "train", where.data_dir)
    # SetFit takes no validation rows; its training rows are the others', which are drawn first.
    held = settings.get("validation", 0)
    chosen = draw_few_shot(
        pool, settings["seed"], settings["train"], held, task.classes, flags=False
    )
    train, validation = pool.take(chosen[0]), pool.take(chosen[1])
    if method == "setfit":
        from trainer.reproduce.setfit_row import run_setfit

        return run_setfit(train, test, settings["seed"], where.encoder, where.device)
    run = _run_full if method == "ft" else _run_prompt
    return run(settings, where, task, train, validation, test)


def _shared(settings: Settings) -> dict[str, Any]:
    names = ("seed", "max_tokens", "rate", "epochs", "patience")
    return {name: settings[name] for name in names}


def _run_full(
    settings: Settings, where: Surroundings, task: Task,
    train: Examples, validation: Examples, test: Examples,
) -> dict[str, Any]:  # fmt: skip
    backbone = load_backbone(where.backbone, device=where.device, trainable=True)
    config = FinetuneConfig(out="", **_shared(settings))
    options = RunOptions(quiet=where.quiet, rate_flag="--ft-rate")
    loop = finetune(backbone, task, train, validation, config, options)
    record = TaskRecord(
        name=task.name, labels=list(task.labels), words=list(task.words), template=task.template,
        mode="none", max_tokens=config.max_tokens,
    )  # fmt: skip
    best = loop.state.best
    assert best is not None
    return {
        **_measure(backbone, record, {}, test), "validation_accuracy": best.accuracy,
        "steps": loop.state.step, "best_step": loop.state.best_step,
    }  # fmt: skip


def _run_prompt(
    settings: Settings, where: Surroundings, task: Task,
    train: Examples, validation: Examples, test: Examples,
) -> dict[str, Any]:  # fmt: skip
    backbone = _frozen(where.backbone, where.device)
    mode, start = settings["mode"], settings["start"]
    fresh = start["method"] in UNTRAINED.values()
    init = start["method"] if fresh else str(Store(where.out).start_path(start))
    config = TuneConfig(
        out="", mode=mode, prompt_tokens=settings["prompt_tokens"], init=init, **_shared(settings)
    )
    params = initial_params(backbone, init, mode, config.tokens, config.seed)
    drawn = config.seed if fresh else 0  # any other start is the same for all seeds
    names = ("backbone", "task", "data", "limit_eval", "max_tokens", "prompt_tokens")
    key = (init, mode, drawn, task.template, task.words, *(settings[name] for name in names))
    if key not in _at_start:
        before = _measure(
            backbone, _record(task, mode, config.max_tokens),
            {name: value.detach() for name, value in params.items()}, test,
        )  # fmt: skip
        _at_start[key] = before["accuracy"]
    options = RunOptions(quiet=where.quiet)
    tuned = tune(backbone, task, train, validation, config, options, params=params)
    record = tuned.prompt.task
    return {
        **_measure(backbone, record, tuned.prompt.params, test),
        "start_accuracy": _at_start[key],
        **{key: record.figures[key] for key in ("validation_accuracy", "steps", "best_step")},
    }


def _record(task: Task, mode: str, max_tokens: int) -> TaskRecord:
    return TaskRecord(
        name=task.name, labels=list(task.labels), words=list(task.words),
        template=task.template, mode=mode, max_tokens=max_tokens,
    )  # fmt: skip


def _measure(backbone: Backbone, record: TaskRecord, params: Any, test: Examples) -> dict[str, Any]:
    with torch.no_grad():
        result = evaluate(backbone, record, params, test)
    kept = ("accuracy", "macro_f1", "calibration_error", "loss", "rows")
    return {key: result[key] for key in kept}
