"""What a run leaves beside its result: its configuration, the versions it ran with, its metrics."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from serve.cli import as_json
from serve.files import write_json

RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"

_PACKAGES = (
    "torch",
    "transformers",
    "numpy",
    "scikit-learn",
    "sentence-transformers",
    "tokenizers",
)


def versions() -> dict[str, str]:
    """Versions of Python, this package and the libraries that a result depends on."""
    from trainer import __version__

    found = {"python": platform.python_version(), "metapt": __version__}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue  # an extra that this run did not need
    return found


def data_digest(*parts: np.ndarray | Sequence[str]) -> str:
    """SHA-256 of arrays and lists of texts; of tensors too see `trainer.tensors.digest`."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            found.update(f"{part.dtype} {part.size} ".encode() + part.tobytes())
        else:
            found.update(f"{len(part)} ".encode())
            for text in part:
                data = text.encode()
                found.update(f"{len(data)} ".encode() + data)
    return found.hexdigest()


def record(command: str, config: Any, **more: Any) -> dict[str, Any]:
    """The record of a run: `python -m trainer COMMAND --config run.json` repeats it."""
    return {"command": command, "config": as_json(config), "versions": versions(), **more}


def write_record(path: str | Path, command: str, config: Any, **more: Any) -> None:
    """Write a run's record to `path` (a file, or a folder that gets a `run.json`)."""
    path = Path(path)
    write_json(path / RUN_FILE if path.is_dir() else path, record(command, config, **more))
