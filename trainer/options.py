"""Settings that several commands share, as dataclasses to inherit from."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING, Any

from serve.bundle import MODES
from serve.cli import option
from serve.errors import UserError
from serve.files import make_parent
from trainer.data import Examples, LabelledFile, as_format, load_task, read_file
from trainer.labels import tell_words
from trainer.runs import RUN_FILE
from trainer.tasks import Task, check_columns, get_task, make_task

if TYPE_CHECKING:  # torch takes seconds, which `--help` need not
    import torch

    from trainer.backbone import Backbone


MOST_SEED = 2**32 - 1  # what scikit-learn and SetFit take
MOST_RATE = 1000.0  # a step moves a number by about the rate: beyond float32 from some 1e38 on
PAPER_TOKENS = 100  # section 5.1
MINI_TOKENS = 20  # more did no more (model card), and the graph that ships has room for so many


@dataclass(kw_only=True)
class BackboneOptions:
    """Which frozen T5, where it runs, and how it is steered."""

    backbone: str = option("mini", help="a Hugging Face id, a folder, or mini, which ships")
    device: str = option("auto", help="auto, cpu, cuda, cuda:1 ...")
    max_tokens: int = option(
        128, help="longest input, the template included; text is cut, never the template", minimum=8
    )
    seed: int = option(1, help="seed of every random draw", minimum=0, maximum=MOST_SEED)

    def load_backbone(self, *, trainable: bool = False) -> Backbone:
        """The backbone on its device, or this process's part of it.

        Raises:
            UserError: it is to be trained, but divided over the processes.
        """
        from trainer.backbone import load_backbone
        from trainer.parallel import workers

        if trainable:
            workers().check_whole("full tuning")
        return load_backbone(
            self.backbone, device=pick_device(self.device), trainable=trainable,
            shards=workers().shards,
        )  # fmt: skip


@dataclass(kw_only=True)
class PromptOptions(BackboneOptions):
    """How the prompt looks."""

    mode: str = option(
        "prefix", choices=MODES,
        help="attention mode: full is the paper's, prefix costs nothing when served, deep trains "
        "the keys and values themselves",
    )  # fmt: skip
    prompt_tokens: int | None = option(
        None,
        help="P, the number of prompt tokens; a prompt or shipped:NAME as the start keeps its own "
        "(default: 20 for mini, whose exports need no tracing up to there; else the paper's 100)",
        minimum=1,
    )

    @property
    def tokens(self) -> int:
        """P, as asked for or as the backbone wants it."""
        return self.prompt_tokens or (MINI_TOKENS if self.backbone == "mini" else PAPER_TOKENS)


@dataclass(kw_only=True)
class TaskOptions:
    """Which task, and where its rows are."""

    task: str | None = option(None, help="a registered task (see `tasks`)")
    data: str | None = option(None, help="a local CSV, TSV, JSONL or Parquet file", metavar="FILE")
    data_dir: str | None = option(
        None, help="a folder of files named after the tasks, used in place of the hub",
        metavar="FOLDER",
    )  # fmt: skip
    text_column: str | None = option(None, help="column of the texts (default: the task's)")
    label_column: str = option("label", help="column of the labels")
    labels: list[str] = option([], help="names of the classes, in the order of their numbers")
    words: list[str] = option([], help="label word of each class; each one token of the backbone")
    template: str | None = option(None, help="what the model reads, with {text} and <extra_id_0>")

    def resolve_task(self) -> Task:
        """The task that is meant.

        Raises:
            UserError: neither --task nor --data is given, or they are wrong.
        """
        changes: dict[str, Any] = {
            "labels": tuple(self.labels), "words": tuple(self.words), "template": self.template
        }  # fmt: skip
        changes = {name: value for name, value in changes.items() if value}
        if self.template:
            check_columns(self.template)
        if self.task is not None:
            return replace(get_task(self.task), **changes)  # in one step: C may be another
        if self.data is None:
            raise UserError("--task or --data is missing: name a registered task or a local file")
        names = self._read(self.text_column or "text").examples(self.labels or None).names
        task = make_task(
            Path(self.data).stem, names, self.words or None, description=f"from {self.data}"
        )
        if self.words and not self.labels:  # the order of the classes was found, not given
            tell_words(task.labels, task.words)
        return replace(task, **changes)

    def load(self, task: Task, split: str | None) -> Examples:
        """The task's rows of a split (None for all)."""
        if self.data is None:
            return load_task(
                task, split, data_dir=self.data_dir,
                text_column=self.text_column, label_column=self.label_column,
            )  # fmt: skip
        file = self._read(self.text_column or task.text_format)
        return file.examples(task.labels, split, task.drop)

    def load_validation(self, task: Task) -> Examples | None:
        """The rows that --data marks for validation, where it marks others for testing; or None."""
        if self.data is None:
            return None
        file = self._read(self.text_column or task.text_format)
        return self.load(task, "validation") if file.marks_validation else None

    @cached_property
    def _files(self) -> dict[str, LabelledFile]:
        return {}

    def _read(self, text_column: str) -> LabelledFile:
        """--data, which is read once for all that is asked about it."""
        text_format = as_format(text_column)
        if text_format not in self._files:
            assert self.data is not None
            self._files[text_format] = read_file(self.data, text_format, self.label_column)
        return self._files[text_format]


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one.

    Raises:
        UserError: the device is not there.
    """
    import torch

    from trainer.parallel import workers

    if name == "auto":
        if (given := workers().device) is not None:
            return given
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name} is unknown: use auto, cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name}: no CUDA device is visible here; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        raise UserError(f"--device {name}: the last CUDA device here is cuda:{count - 1}")
    return device


def check_writable(path: Path, flag: str = "--out") -> Path:
    """The path, once a file of its name could be made beside it: before hours of work, not after.

    Raises:
        UserError: it has no name (`.`), or what it shall stand in cannot be made or written to.
    """
    if path.name in ("", ".."):
        raise UserError(
            f"{flag} {path} is no name of its own: pass one that can be made, as runs/a"
        )
    try:
        make_parent(path)
        with NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"):
            pass
    except OSError as error:
        raise UserError(
            f"{flag} {path} cannot be written ({error.strerror or error}): pass another {flag}"
        ) from None
    return path


def output_file(out: str, suffix: str | None = None, flag: str = "--out") -> Path:
    """The file that a command writes, checked before the work starts.

    Args:
        suffix: what its name must end in; None for any.
        flag: the flag that named it, for errors.

    Raises:
        UserError: another suffix, a folder, or see `check_writable`.
    """
    path = Path(out)
    if suffix is not None and path.suffix != suffix:
        raise UserError(f"{flag} {out}: the name must end in {suffix}")
    if os.path.isdir(out):
        raise UserError(f"{flag} {out} is a folder, but a file is written: pass another")
    return check_writable(path, flag)


def output_folder(out: str) -> Path:
    """Where a command writes, checked before the work starts.

    Raises:
        UserError: it is a file, or see `check_writable`.
    """
    path = Path(out)
    if os.path.exists(out) and not os.path.isdir(out):  # which pass over a name too long
        raise UserError(f"--out {out} is a file, but a folder is written: pass another --out")
    # What stands there is added to, and so may be the current folder.
    check_writable(path / "out" if os.path.isdir(out) else path)
    return path


def result_folder(out: str, mark: str = RUN_FILE) -> Path:
    """As `output_folder`, for a result that replaces what stands there.

    Args:
        mark: a file that every such result holds.

    Raises:
        UserError: the folder holds something that is not the result of an earlier run.
    """
    path = check_writable(output_folder(out))
    if path.is_dir() and any(path.iterdir()) and not (path / mark).is_file():
        raise UserError(
            f"--out {out} holds other files, which the result would replace: pass another --out"
        )
    return path


def checkpoint_folder(out: Path) -> Path:
    """Beside the result, so that the result itself appears whole or not at all."""
    return out.with_name(out.name + ".checkpoint")
