"""`python -m trainer COMMAND`: from texts to tuned soft prompts."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from serve.cli import Command, main

# command -> (module, configuration, function, one line); only the module that is asked for is
# imported, since torch alone takes seconds.
_TABLE = {
    "quickstart": ("quickstart", "QuickstartConfig", "run_quickstart", "the whole path, small"),
    "label": ("label", "LabelConfig", "run_label", "pseudo-label open text (paper, 4.1)"),
    "cluster": ("cluster", "ClusterConfig", "run_cluster", "group texts into tasks (4.2)"),
    "meta": ("source", "MetaConfig", "run_meta", "MetaPT: meta-train a prompt (4.3)"),
    "pretrain": ("source", "PretrainConfig", "run_pretrain", "PPT: pre-train a prompt (A.2)"),
    "tune": ("tune", "TuneConfig", "run_tune", "tune a prompt on a task (A.4)"),
    "finetune": ("finetune", "FinetuneConfig", "run_finetune", "full tuning, the baseline (A.1)"),
    "evaluate": ("evaluate", "EvaluateConfig", "run_evaluate", "accuracy, F1, calibration"),
    "tasks": ("listing", "TasksConfig", "run_tasks", "list the registered tasks"),
    "reproduce": ("reproduce.command", "ReproduceConfig", "run_reproduce", "the paper, again"),
    "backbone": ("pretraining.command", "BackboneConfig", "run_backbone", "train a compact T5"),
}


def _placeholder(line: str) -> type:
    config = type("Config", (), {"__doc__": line})
    return dataclass(config)


def commands(argv: list[str]) -> dict[str, Command]:
    asked = argv[0] if argv else ""
    found = {}
    for name, (module, config, function, line) in _TABLE.items():
        if name == asked:
            loaded = importlib.import_module(f"trainer.{module}")
            found[name] = Command(getattr(loaded, config), getattr(loaded, function))
        else:
            found[name] = Command(_placeholder(line), lambda _: None)
    return found


if __name__ == "__main__":
    main(
        "python -m trainer",
        "Train soft prompts: MetaPT, its baselines, and the compact backbone.",
        commands,  # it imports torch: inside, a missing one or Ctrl-C is one line
    )
