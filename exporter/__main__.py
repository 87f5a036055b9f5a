"""`python -m exporter`: prompts into bundles. Only `bundle` needs torch."""

from __future__ import annotations

import dataclasses
import logging
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from exporter import edit
from serve.bundle import list_tasks, remove_task
from serve.cli import Command, main, option
from serve.errors import UserError
from serve.options import MOST_THREADS

log = logging.getLogger("exporter")

PRECISIONS = ("fp32", "int8", "fp16")  # as in exporter.precision, which needs onnx
# Fields of `BundleConfig` that mean nothing to a single file: it is not measured, and takes no
# other prompts.
BUNDLE_ONLY = ("prompt_tokens", "validation", "task", "text_column", "label_column", "force")


@dataclass
class BundleConfig:
    """Compile prompts into a bundle: one ONNX graph, any number of tasks."""

    prompts: list[str] = option(help="prompt folders, all of one mode", positional=True)
    out: str | None = option(None, help="the bundle's folder")
    backbone: str = option(
        "mini", help="the T5 the prompts were trained on: mini, a folder or hub id"
    )
    names: list[str] = option([], help="names of the tasks; by default those of the prompts")
    prompt_tokens: int | None = option(
        None, help="room for prompts of so many tokens; default: the longest given", minimum=1
    )
    max_tokens: int = option(512, help="longest input, template included", minimum=8)

    precision: list[str] = option(
        ["fp32"], help="graphs in the bundle: int8 for CPUs, fp16 for GPUs", choices=PRECISIONS
    )
    int8_target: str = option(
        "any", help="where int8 is to run: any CPU, the instruction set named, or this machine's",
        choices=("any", "auto", "avx2", "avx512_vnni", "arm64"),
    )  # fmt: skip
    validation: str | None = option(
        None, help="labelled file (CSV, TSV, JSONL, Parquet) to measure the precisions on"
    )
    task: str | None = option(None, help="the task of --validation, where there are several")
    text_column: str | None = option(
        None, help="the text's column in --validation (default: the task's)"
    )
    label_column: str = option("label", help="the label's column in --validation")
    force: bool = option(False, help="keep a precision that loses more than 0.5 points")
    single_file: str | None = option(
        None, help="write one prompt as one file of this name, with everything baked in"
    )
    format: str = option("onnx", help="of --single-file", choices=("onnx", "torchscript"))

    examples = [
        "runs/film runs/products --out bundle --precision fp32 int8",
        "runs/film --single-file film.onnx",
        "runs/film --single-file film.pt --format torchscript",
    ]


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


@dataclass
class TritonConfig:
    """Write a bundle as a model repository of Triton: ONNX graph, tokenizer, labels. No torch."""

    bundle: str = option(help="the bundle's folder", positional=True)
    out: str = option(help="the repository's folder", positional=True)
    name: str = option("metapt", help="of the ensemble; the other models' names start with it")
    precision: str = option("fp32", help="fp32, int8, fp16: one that the bundle has")
    device: str = option("cpu", help="where the graph runs", choices=("cpu", "gpu"))
    instances: int = option(1, help="batches at the same time, for each GPU if there are several",
                            minimum=1)  # fmt: skip
    threads: int | None = option(
        None, minimum=1, maximum=MOST_THREADS,
        help="threads of an instance on a CPU; default: this machine's cores",
    )  # fmt: skip
    max_batch: int = option(32, help="texts of a batch", minimum=1)
    max_delay: float = option(
        2.0, help="milliseconds a request may wait for others to share its batch", minimum=0
    )
    max_queue: int = option(1024, help="requests that may wait; more are refused", minimum=1)
    deadline: float = option(10.0, help="seconds that a request may wait", minimum=0.001)
    pad_to: int = option(
        16, help="lengths are padded to multiples of it, as Triton batches one length only",
        minimum=1,
    )  # fmt: skip
    ids_only: bool = option(False, help="only the graph: clients send token ids, and get logits")

    examples = [
        "bundle models",
        "bundle models --precision fp16 --device gpu --instances 2 --max-batch 128",
    ]


def run_bundle(config: BundleConfig) -> None:
    """`bundle`: torch is imported here and nowhere else."""
    if (config.out is None) == (config.single_file is None):
        raise UserError("pass --out for a bundle's folder, or --single-file for one file")
    if config.format != "onnx" and config.single_file is None:
        raise UserError(f"--format {config.format} needs --single-file: a bundle is ONNX")
    if config.single_file is not None:
        _check_single(config)
    else:
        edit.check_out(Path(str(config.out)))  # at once, not after a minute
    from trainer.backbone import load_backbone

    backbone = load_backbone(config.backbone)
    if config.single_file is not None:
        from exporter.single import export_single

        worst = export_single(
            config.prompts[0], backbone, config.single_file, kind=config.format,
            name=config.names[0] if config.names else None, precision=config.precision[0],
            int8_target=config.int8_target, max_tokens=config.max_tokens,
        )  # fmt: skip
        log.info("%s: logits differ from torch by at most %.1e", config.single_file, worst)
        return
    from exporter.export import export_bundle

    assert config.out is not None
    bundle = export_bundle(
        config.prompts,
        backbone,
        config.out,
        names=config.names,
        precisions=config.precision,
        prompt_tokens=config.prompt_tokens,
        max_tokens=config.max_tokens,
        int8_target=config.int8_target,
        validation=config.validation,
        task=config.task,
        text_column=config.text_column,
        label_column=config.label_column,
        force=config.force,
    )
    sys.stdout.write(edit.describe(bundle.folder) + "\n")


def _check_single(config: BundleConfig) -> None:
    """Raises: UserError for what --single-file cannot do, instead of leaving it undone."""
    if len(config.prompts) != 1 or len(config.precision) != 1 or len(config.names) > 1:
        raise UserError("--single-file takes one prompt, one --precision and one of --names")
    for field in dataclasses.fields(config):
        if field.name in BUNDLE_ONLY and getattr(config, field.name) != field.default:
            flag = "--" + field.name.replace("_", "-")
            raise UserError(f"{flag} is of a bundle: leave it out, or pass --out for a bundle")


def run_add(config: AddConfig) -> None:
    """`add`."""
    before = list_tasks(config.bundle)
    task = edit.add(config.bundle, config.prompt, config.name)
    done = "replaced" if task.name in before else "added"
    log.info("%s: %s %s (%s)", config.bundle, done, task.name, ", ".join(task.labels))


def run_remove(config: RemoveConfig) -> None:
    """`remove`."""
    remove_task(config.bundle, config.task)
    log.info("%s: removed %s", config.bundle, config.task)


def run_list(config: ListConfig) -> None:
    """`list`."""
    sys.stdout.write(edit.describe(config.bundle) + "\n")


def run_triton(config: TritonConfig) -> None:
    """`triton`."""
    from exporter.triton import Settings, export_triton

    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", config.name):
        raise UserError(f"--name '{config.name}' cannot be a folder's name: use letters and digits")
    values = {key: value for key, value in vars(config).items() if key not in ("bundle", "out")}
    names = export_triton(config.bundle, config.out, Settings(**values))
    log.info("%s: models %s", config.out, ", ".join(names))


COMMANDS = {
    "bundle": Command(BundleConfig, run_bundle),
    "add": Command(AddConfig, run_add),
    "remove": Command(RemoveConfig, run_remove),
    "list": Command(ListConfig, run_list),
    "triton": Command(TritonConfig, run_triton),
}

if __name__ == "__main__":
    main("python -m exporter", "Compile prompts into bundles for onnxruntime.", COMMANDS)
