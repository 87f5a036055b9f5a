"""`python -m exporter`: prompts into bundles. Only `bundle` needs torch."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass

from exporter import edit
from serve.bundle import remove_task
from serve.cli import Command, main, option

log = logging.getLogger("exporter")


@dataclass
class BundleConfig:
    """Compile prompts into a bundle: one ONNX graph, any number of tasks."""

    prompts: list[str] = option(help="prompt folders, all of one mode", positional=True)
    out: str = option(help="the bundle's folder")
    backbone: str = option(
        "mini", help="the T5 the prompts were trained on: mini, a folder or hub id"
    )
    names: list[str] = option([], help="names of the tasks; by default those of the prompts")
    prompt_tokens: int | None = option(
        None, help="room for prompts of so many tokens; default: the longest given", minimum=1
    )
    max_tokens: int = option(512, help="longest input, template included", minimum=8)

    examples = ["runs/film runs/products --out bundle"]


@dataclass
class AddConfig:
    """Add a prompt to a bundle, or replace the task of its name. Needs no torch."""

    bundle: str = option(help="the bundle's folder", positional=True)
    prompt: str = option(help="the prompt's folder", positional=True)
    name: str | None = option(None, help="name of the task; by default the prompt's")

    examples = ["bundle runs/tweets"]


@dataclass
class RemoveConfig:
    """Remove a task from a bundle. Needs no torch."""

    bundle: str = option(help="the bundle's folder", positional=True)
    task: str = option(help="the task's name", positional=True)

    examples = ["bundle tweets"]


@dataclass
class ListConfig:
    """List a bundle's tasks. Needs no torch."""

    bundle: str = option(help="the bundle's folder", positional=True)

    examples = ["bundle"]


def run_bundle(config: BundleConfig) -> None:
    """`bundle`: torch is imported here and nowhere else."""
    from exporter.export import export_bundle
    from trainer.backbone import load_backbone

    bundle = export_bundle(
        config.prompts,
        load_backbone(config.backbone),
        config.out,
        names=config.names,
        prompt_tokens=config.prompt_tokens,
        max_tokens=config.max_tokens,
    )
    sys.stdout.write(edit.describe(bundle.folder) + "\n")


def run_add(config: AddConfig) -> None:
    """`add`."""
    task = edit.add(config.bundle, config.prompt, config.name)
    log.info("%s: added %s (%s)", config.bundle, task.name, ", ".join(task.labels))


def run_remove(config: RemoveConfig) -> None:
    """`remove`."""
    remove_task(config.bundle, config.task)
    log.info("%s: removed %s", config.bundle, config.task)


def run_list(config: ListConfig) -> None:
    """`list`."""
    sys.stdout.write(edit.describe(config.bundle) + "\n")


COMMANDS = {
    "bundle": Command(BundleConfig, run_bundle),
    "add": Command(AddConfig, run_add),
    "remove": Command(RemoveConfig, run_remove),
    "list": Command(ListConfig, run_list),
}

if __name__ == "__main__":
    main("python -m exporter", "Compile prompts into bundles for onnxruntime.", COMMANDS)
