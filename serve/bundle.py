"""The bundle: a folder with one graph for any number of tasks, and a small prompt per task.

    bundle.json                       header, tasks, hashes of all other files
    tokenizer.json                    of the `tokenizers` library
    model.onnx, model.<precision>.onnx, prefix.onnx, *.data (weights shared by the graphs)
    prompts/<task>.<hash>.safetensors

Adding, replacing or removing a task rewrites `bundle.json` by one rename: a prompt's file name
carries its hash, so an old and a new prompt never share a name, and a killed writer leaves the
bundle as it was. Writers hold a lock on `.lock`, so that none loses another's update. The prompt of
a task that was replaced or removed stays for an hour, because servers still read it.

Notation: P prompt tokens, D model width, L layers, H heads, K width of a head, C classes.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from serve.errors import Failure, UserError, explain_os_error
from serve.files import atomic_write, read_json, sha256, write_json
from serve.prompt import Arrays, check_prompt, parse_prompt
from serve.task import Task, is_count, make_task, need, which

FORMAT = "metapt-bundle"
VERSION = 1
MODES = ("prefix", "full", "deep")
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._@-]*")  # of a path: no "..", no separators, no drive
_SIZES = ("d_model", "num_layers", "num_heads", "d_kv", "vocab_size")
_OWN = ("format", "version", "tasks", "files", "checksum")  # keys that this module writes
_KEPT = 3600.0  # seconds that a prompt stays after its task was replaced or removed


@dataclass(frozen=True)
class Bundle:
    """A bundle that has been read and checked.

    Attributes:
        header: everything in `bundle.json` but the tasks, the hashes and the checksum.
        tasks: by name, in the order in which they were added.
    """

    folder: Path
    header: dict[str, Any]
    tasks: dict[str, Task]
    files: dict[str, dict[str, Any]]

    @property
    def mode(self) -> str:
        """`prefix`, `full` or `deep`."""
        return self.header["mode"]

    @property
    def prompt_tokens(self) -> int:
        """P, the longest prompt that the graph takes."""
        return self.header["prompt_tokens"]

    def size(self, name: str) -> int:
        """One of d_model, num_layers, num_heads, d_kv, vocab_size."""
        return self.header["backbone"][name]

    def graph(self, precision: str) -> Path:
        """The graph file of a precision.

        Raises:
            UserError: the bundle does not have it.
        """
        known = self.header["precisions"]
        if precision not in known:
            raise UserError(
                f"{self.folder} has no precision '{precision}': it has {', '.join(known)}; "
                "pass one of them as --precision, or export the bundle again"
            )
        return self.folder / known[precision]["graph"]

    def read_prompt(self, task: Task) -> dict[str, np.ndarray]:
        """The arrays of a task's prompt: `prompt_embeddings` [p, D], p <= P; in mode deep `kv`
        [L, 2, H, p, K] and `states` [p, D] in its place.

        Raises:
            Failure: the file is missing, damaged, not to be read, or not of the backbone's shape.
        """
        path = self.folder / task.prompt
        with _readable():
            if not path.is_file() and not self._refers_to(task):
                raise Failure(f"task '{task.name}' was replaced in the folder: load it")
            _check_file(path, task.size_bytes, task.sha256)
            data = path.read_bytes()
        return parse_prompt(data, self, str(path))

    def _refers_to(self, task: Task) -> bool:
        """Whether the folder, as it is now, still has this version of a task."""
        path = self.folder / "bundle.json"
        if not path.is_file():
            return True  # not another version, but no bundle any more
        return task.prompt in _prompts(_parse(self.folder, path, read_json(path)))

    def has_other_graphs(self, fresh: Bundle) -> bool:
        """Whether `fresh`, the folder read again, was exported anew: with other weights, another
        tokenizer or other sizes, to which this bundle's tasks do not fit, nor its tasks to this."""
        return (self.files, self.header) != (fresh.files, fresh.header)


def load(folder: str | Path, *, verify: bool = True) -> Bundle:
    """Read a bundle and check all of it.

    Args:
        folder: the bundle.
        verify: hash every file (about 0.6 s for each GB, in four threads); without it only
            existence and sizes are checked.

    Raises:
        UserError: there is no bundle at `folder`.
        Failure: a file is missing, truncated, altered, swapped or not to be read, or the format is
            newer.
    """
    folder = Path(folder)
    path = folder / "bundle.json"
    with _readable():
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder: pass the folder of a bundle")
        if not path.is_file():
            raise UserError(f"{folder} is not a bundle: it has no bundle.json")
        document = read_json(path)
        try:
            return _check(_parse(folder, path, document), verify)
        except Failure:
            again = read_json(path)
            if again == document:
                raise
            return _check(_parse(folder, path, again), verify)  # it was written meanwhile


@contextmanager
def _readable() -> Iterator[None]:
    """Raises: Failure in place of an OSError, as when a network file system is gone."""
    try:
        yield
    except OSError as error:
        raise Failure(explain_os_error(error)) from error


def _check(bundle: Bundle, verify: bool) -> Bundle:
    """The bundle, when every file that it refers to is there. Other files do not matter: prompts
    of replaced tasks, and those that a writer is about to add."""
    folder = bundle.folder
    wanted = {name: (entry["bytes"], entry["sha256"]) for name, entry in bundle.files.items()}
    wanted |= {task.prompt: (task.size_bytes, task.sha256) for task in bundle.tasks.values()}
    for name, (size, _) in wanted.items():
        _check_file(folder / name, size, None)
    if verify:
        with ThreadPoolExecutor(4) as pool:  # hashlib releases the GIL
            list(pool.map(lambda item: _check_file(folder / item[0], *item[1]), wanted.items()))
    return bundle


def _check_file(path: Path, size: int, digest: str | None) -> None:
    if not path.is_file():
        raise Failure(f"{path} is missing from the bundle: export the bundle again")
    actual = path.stat().st_size
    if actual != size:
        raise Failure(f"{path} has {actual} bytes, bundle.json says {size}: it is damaged, "
                      "export the bundle again")  # fmt: skip
    if digest is not None and sha256(path) != digest:
        raise Failure(f"{path} does not match its hash in bundle.json: it is damaged or belongs "
                      "to another bundle, export the bundle again")  # fmt: skip


def _checksum(document: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in document.items() if key != "checksum"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _parse(folder: Path, path: Path, document: Any) -> Bundle:
    """Check `bundle.json` without touching the other files."""
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise Failure(f"{path} is not a bundle's description ('format' is not '{FORMAT}')")
    version = document.get("version")
    if version != VERSION:
        raise Failure(f"{path} has format version {version}, this program reads {VERSION}: "
                      "use the version of the program that wrote it, or export again")  # fmt: skip
    if document.get("checksum") != _checksum(document):
        raise Failure(f"{path} does not match its own checksum: it is damaged or was edited by "
                      "hand, export the bundle again")  # fmt: skip
    try:
        header = {key: value for key, value in document.items() if key not in _OWN}
        _check_header(header)
        files = {str(name): dict(entry) for name, entry in document["files"].items()}
        for name, entry in files.items():
            _check_path(name)
            need(isinstance(entry.get("bytes"), int), f"files: '{name}' has no size")
            need(isinstance(entry.get("sha256"), str), f"files: '{name}' has no hash")
        for name in [*_graphs(header), "tokenizer.json"]:
            need(name in files, f"'{name}' is not among its files")
        bundle = Bundle(folder, header, {}, files)
        for name, record in document["tasks"].items():
            bundle.tasks[name] = make_task(name, record, header)
            _check_path(bundle.tasks[name].prompt)
    except (UserError, KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise Failure(f"{path} is not valid: {what}; export the bundle again") from None
    return bundle


def _check_path(name: str) -> None:
    parts = PurePosixPath(name).parts
    if not name or "/".join(parts) != name or not all(_PART.fullmatch(part) for part in parts):
        raise UserError(f"'{name}' is not a path inside the bundle")


def _graphs(header: Mapping[str, Any]) -> list[str]:
    names = [entry["graph"] for entry in header["precisions"].values()]
    return names + ([header["prefix_graph"]] if header.get("prefix_graph") else [])


def _check_header(header: Mapping[str, Any]) -> None:
    """Raises: UserError naming the key that is wrong."""
    need(header.get("mode") in MODES, f"'mode' must be one of {', '.join(MODES)}")
    backbone = header.get("backbone")
    need(isinstance(backbone, dict), "'backbone' must be an object")
    assert isinstance(backbone, dict)
    for key in _SIZES:
        need(is_count(backbone.get(key)), f"'backbone.{key}' must be a positive whole number")
    for key in ("prompt_tokens", "max_tokens"):
        need(is_count(header.get(key)), f"'{key}' must be a positive whole number")
    precisions = header.get("precisions")
    need(isinstance(precisions, dict) and bool(precisions), "'precisions' must name a graph")
    need(
        (header["mode"] == "prefix") == bool(header.get("prefix_graph")),
        "'prefix_graph' belongs to mode prefix, and to no other",
    )
    for name in _graphs(header):
        _check_path(name)


def create(folder: str | Path, header: Mapping[str, Any]) -> Bundle:
    """Make a bundle without tasks of a folder that already holds the graphs, their weights and
    `tokenizer.json`; every file in it is hashed into `bundle.json`.

    Raises:
        UserError: the header is not complete (the message names the key), or a file is missing.
    """
    folder = Path(folder)
    header = {key: value for key, value in header.items() if key not in _OWN}
    _check_header(header)
    files = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in ("bundle.json", ".lock"):
            _check_path(name)
            files[name] = {"sha256": sha256(path), "bytes": path.stat().st_size}
    for name in [*_graphs(header), "tokenizer.json"]:
        need(name in files, f"{folder / name} does not exist: write it before the bundle is made")
    _write(Bundle(folder, dict(header), {}, files))
    return load(folder, verify=False)


def _write(bundle: Bundle) -> None:
    document: dict[str, Any] = {"format": FORMAT, "version": VERSION, **bundle.header}
    tasks = {}
    for name, task in bundle.tasks.items():
        tasks[name] = dataclasses.asdict(task)
        del tasks[name]["name"], tasks[name]["arrays"]
    document |= {"tasks": tasks, "files": bundle.files}
    document = json.loads(json.dumps(document))  # numpy numbers and tuples fail or settle here
    document["checksum"] = _checksum(document)
    write_json(bundle.folder / "bundle.json", document)


@contextmanager
def _locked(folder: Path) -> Iterator[Bundle]:
    """The bundle, while no other writer can change it."""
    load(folder, verify=False)  # a clear error before a lock file appears in a wrong folder
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield load(folder, verify=False)


def add_task(
    folder: str | Path, name: str, record: Mapping[str, Any], prompt: np.ndarray | Arrays
) -> Task:
    """Add a task to a bundle, or replace it, whole or not at all.

    Args:
        folder: the bundle.
        name: of the task.
        record: labels, words, word_ids, template, prefix_ids, suffix_ids, temperature, info.
        prompt: [p, D] with p <= P; in mode deep the arrays of `Bundle.read_prompt`.

    Raises:
        UserError: the name, the record or the prompt does not fit the bundle.
    """
    from safetensors.numpy import save

    folder = Path(folder)
    with _locked(folder) as bundle:
        values = {key: record[key] for key in record if key not in ("prompt", "sha256")}
        task = make_task(name, values, bundle.header)
        data = save(check_prompt(prompt, bundle))
        digest = hashlib.sha256(data).hexdigest()
        path = f"prompts/{name}.{digest[:12]}.safetensors"
        task = dataclasses.replace(task, prompt=path, sha256=digest, size_bytes=len(data))
        with atomic_write(folder / path) as temporary:
            temporary.write_bytes(data)
        old = bundle.tasks.get(name)
        bundle.tasks[name] = task
        _write_without(bundle, old)
    return task


def remove_task(folder: str | Path, name: str) -> None:
    """Remove a task; its prompt goes with a write of an hour later.

    Raises:
        UserError: there is no such task.
    """
    folder = Path(folder)
    with _locked(folder) as bundle:
        if name not in bundle.tasks:
            raise UserError(f"{folder} has no task '{name}': {which(bundle.tasks)}")
        _write_without(bundle, bundle.tasks.pop(name))


def _prompts(bundle: Bundle) -> set[str]:
    return {task.prompt for task in bundle.tasks.values()}


def _write_without(bundle: Bundle, old: Task | None) -> None:
    """Write a bundle of which the task `old` was taken, and remove the prompts whose time is over.

    Servers that run have not heard of it yet: requests that they accepted, and tasks that gave way
    in their bank, need the old prompt for a while.
    """
    if bundle.has_other_graphs(load(bundle.folder, verify=False)):  # an export takes no lock
        raise Failure(
            f"{bundle.folder} was exported again meanwhile: give the same command once more"
        )
    if old is not None:
        with suppress(OSError):  # another user's file
            os.utime(bundle.folder / old.prompt)  # its hour begins now, not when it was made
    _write(bundle)
    needed = _prompts(bundle) | set(bundle.files)
    for path in (bundle.folder / "prompts").glob("*.safetensors"):
        if path.relative_to(bundle.folder).as_posix() not in needed:
            with suppress(OSError):
                if path.stat().st_mtime < time.time() - _KEPT:
                    path.unlink()


def list_tasks(folder: str | Path) -> dict[str, Task]:
    """The tasks of a bundle by name."""
    return load(folder, verify=False).tasks
