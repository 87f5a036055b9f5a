"""A bundle that is there, without torch and without tracing: its tasks added, removed and listed,
and whether it may be replaced."""

from __future__ import annotations

import re
from pathlib import Path

from tokenizers import Tokenizer

from exporter.record import bundle_arrays, read_folder, task_name, task_record
from serve import bundle as bundles
from serve.bundle import Bundle
from serve.errors import Failure, UserError
from serve.task import Task, is_text, need

# The files of a bundle, of any version of it, the demo's description of it (`trainer.bonnet`), and
# what a writer that was killed left of them.
_IN_BUNDLE = re.compile(
    r"bundle\.json|bonnet\.json|tokenizer\.json|\.lock|(model|prefix)(\.\w+)?\.onnx|weights(\.\w+)?\.data"
    r"|prompts/[^/]+\.safetensors|(prompts/)?\.[^/]+\.tmp"
)


def add(folder: Path | str, prompt: Path | str, name: str | None = None) -> Task:
    """Add a prompt folder's task to a bundle, or replace the task of that name.

    Args:
        name: of the task; by default the one in the prompt's `task.json`.

    Raises:
        UserError: the prompt is of another mode, backbone or width, or its words do not fit.
        Failure: the bundle or the prompt is damaged.
    """
    folder, prompt = Path(folder), Path(prompt)
    bundle = bundles.load(folder, verify=False)
    task, arrays = read_folder(prompt)
    mode = task.get("mode")
    if mode != bundle.mode:
        raise UserError(
            f"{prompt} was trained in mode '{mode}', but {folder} serves mode '{bundle.mode}': "
            "train it in that mode, or export it to a bundle of its own"
        )
    known = task.get("backbone_sha256")
    need(known is None or is_text(known), f"{prompt}: 'backbone_sha256' must be text")
    wanted = bundle.header["backbone"].get("sha256")
    if known and wanted and known != wanted:
        raise UserError(
            f"{prompt} was trained on backbone '{task.get('backbone')}' ({known[:12]}), but "
            f"{folder} holds '{bundle.header['backbone'].get('id')}' ({wanted[:12]}): export it "
            "to a bundle of its own backbone"
        )
    record = task_record(task, read_tokenizer(bundle), prompt)
    wanted_name = task_name(name or str(task.get("name") or prompt.name), "--name")
    try:
        return bundles.add_task(folder, wanted_name, record, bundle_arrays(arrays))
    except UserError as error:
        raise UserError(f"{prompt}: {error}") from None


def read_tokenizer(bundle: Bundle) -> Tokenizer:
    """The bundle's tokenizer.

    Raises:
        Failure: `tokenizer.json` is damaged.
    """
    path = bundle.folder / "tokenizer.json"
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises the bare Exception
        raise Failure(f"{path} is not a tokenizer ({error}): export the bundle again") from None


def describe(folder: Path | str) -> str:
    """A bundle's tasks as a table for people.

    Raises:
        UserError: there is no bundle. Failure: it is damaged.
    """
    bundle = bundles.load(folder, verify=False)
    header = bundle.header
    lines = [
        f"{bundle.folder}: mode {bundle.mode}, backbone {header['backbone'].get('id')}, "
        f"precisions {', '.join(header['precisions'])}, up to {bundle.prompt_tokens} prompt tokens"
    ]
    width = max([4, *(len(name) for name in bundle.tasks)])
    for name, task in bundle.tasks.items():
        lines.append(
            f"  {name:<{width}}  {task.size_bytes / 1024:7.0f} KiB  {', '.join(task.labels)}"
        )
    return "\n".join(lines)


def check_out(out: Path) -> None:
    """Raises: UserError when replacing `out` would take away more than a bundle."""
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not (out / "bundle.json").is_file():
        raise UserError(f"{out} is not empty and not a bundle: pass another --out")
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        if not path.is_dir() and not _IN_BUNDLE.fullmatch(name):
            raise UserError(
                f"{out} holds {name}, which is no part of a bundle, and would be replaced as a "
                "whole: move it, or pass another --out"
            )
