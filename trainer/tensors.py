"""safetensors files, with one-line errors for full disks and damage; digests of data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from serve.errors import Failure
from trainer.runs import data_digest


def digest(*parts: Tensor | np.ndarray | Sequence[str]) -> str:
    """SHA-256 of tensors, arrays and lists of texts: tells whether a run sees the same data."""
    return data_digest(
        *(
            part.contiguous().view(-1).view(torch.uint8).cpu().numpy()
            if isinstance(part, Tensor) else part
            for part in parts
        )
    )  # fmt: skip


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write tensors (moved to the CPU) to a file inside an `atomic_folder`.

    Raises:
        Failure: the disk is full, or the file cannot be written for another reason.
    """
    try:
        save_file(
            {name: value.detach().cpu().contiguous() for name, value in tensors.items()},
            path,
            metadata={"format": "pt"},
        )
    # safetensors reports the operating system's errors as its own kind, by text alone.
    except SafetensorError as error:
        raise Failure(
            f"{path.name} could not be written to {path.parent.parent} ({error}): free some space "
            "there, or pass another --out"
        ) from None


def read_tensors(path: Path, advice: str) -> dict[str, Tensor]:
    """Read a safetensors file.

    Args:
        advice: what the user can do when it is damaged, the error's last words.

    Raises:
        Failure: the file is damaged or cut short.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise Failure(f"{path} is damaged or cut short ({error}): {advice}") from None
