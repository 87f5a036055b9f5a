"""`python -m trainer tasks`: the registered tasks."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from trainer.tasks import get_task, task_names


@dataclass(kw_only=True)
class TasksConfig:
    """List the registered tasks with their label words, template and hub id."""


def run_tasks(config: TasksConfig) -> None:
    """`python -m trainer tasks`."""
    for name in task_names():
        task = get_task(name)
        hub = f"  hub: {task.hub.id}" if task.hub else ""
        sys.stdout.write(
            f"{name:20} {task.description}\n{'':20} labels: {', '.join(task.labels)}\n"
            f"{'':20} words: {', '.join(task.words)}  template: {task.template}{hub}\n"
        )
