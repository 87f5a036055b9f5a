"""`python -m trainer COMMAND`: from texts to tuned soft prompts."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from serve.cli import Command, main

# command -> (module of the configuration, its name, module of the function, its name, one line).
# Only what is asked for is imported, the function's module, which may take torch's seconds, after
# the flags were found right.
_TABLE = {
    "quickstart": ("quickstart", "QuickstartConfig", "quickstart", "run_quickstart",
                   "the whole path, small"),
    "label": ("label", "LabelConfig", "label", "run_label", "pseudo-label open text (paper, 4.1)"),
    "cluster": ("cluster", "ClusterConfig", "cluster", "run_cluster",
                "group texts into tasks (4.2)"),
    "meta": ("configs", "MetaConfig", "source", "run_meta", "MetaPT: meta-train a prompt (4.3)"),
    "pretrain": ("configs", "PretrainConfig", "source", "run_pretrain",
                 "PPT: pre-train a prompt (A.2)"),
    "tune": ("configs", "TuneConfig", "tune", "run_tune", "tune a prompt on a task (A.4)"),
    "finetune": ("configs", "FinetuneConfig", "finetune", "run_finetune",
                 "full tuning, the baseline (A.1)"),
    "evaluate": ("configs", "EvaluateConfig", "evaluate", "run_evaluate",
                 "accuracy, F1, calibration"),
    "tasks": ("listing", "TasksConfig", "listing", "run_tasks", "list the registered tasks"),
    "reproduce": ("reproduce.config", "ReproduceConfig", "reproduce.command", "run_reproduce",
                  "the paper, again"),
    "backbone": ("pretraining.config", "BackboneConfig", "pretraining.command", "backbone_command",
                 "train a compact T5"),
}  # fmt: skip


def _placeholder(line: str) -> type:
    config = type("Config", (), {"__doc__": line})
    return dataclass(config)


def commands(argv: list[str]) -> dict[str, Command]:
    asked = argv[0] if argv else ""
    found = {}
    for name, (module, config, runs, function, line) in _TABLE.items():
        if name == asked:
            kind = getattr(importlib.import_module(f"trainer.{module}"), config)
            found[name] = Command(kind, _late(f"trainer.{runs}", function))
        else:
            found[name] = Command(_placeholder(line), lambda _: None)
    return found


def _late(module: str, function: str) -> Callable[[Any], int | None]:
    def run(config: Any) -> int | None:
        return getattr(importlib.import_module(module), function)(config)

    return run


if __name__ == "__main__":
    main(
        "python -m trainer",
        "Train soft prompts: MetaPT, its baselines, and the compact backbone.",
        commands,  # it imports: inside, a missing package or Ctrl-C is one line
    )
