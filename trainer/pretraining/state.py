"""Checkpoints of a pre-training run: everything in one safetensors file, replaced atomically."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from serve.errors import Failure, UserError
from serve.files import atomic_write


@dataclass
class Progress:
    """step: batches done (batch `step` is a function of seed and step, so this is the data
    position as well); seconds: training time spent; tokens: text tokens read."""

    step: int = 0
    seconds: float = 0.0
    tokens: int = 0


def save_state(path: Path, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer,
               progress: Progress, settings: dict[str, Any] | None = None) -> None:  # fmt: skip
    """Write weights, optimizer moments, torch's random state and progress to `path`.

    settings: what must be equal for the run to be continued.
    """
    tensors: dict[str, Tensor] = {"rng": torch.get_rng_state()}
    for name, module in modules.items():
        for key, value in module.state_dict().items():
            tensors[f"{name}.{key}"] = value.detach().clone().contiguous()
    for index, entry in optimizer.state_dict()["state"].items():
        for key, value in entry.items():
            tensors[f"optimizer.{index}.{key}"] = value.detach().clone()
    with atomic_write(path) as temporary:
        metadata = {"progress": asdict(progress), "settings": settings or {}}
        save_file(tensors, temporary, metadata={k: json.dumps(v) for k, v in metadata.items()})


def load_state(path: Path, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer,
               settings: dict[str, Any] | None = None) -> Progress:  # fmt: skip
    """Read what `save_state` wrote into the same modules.

    Raises:
        UserError: the file is missing, or the run had other settings. Failure: it is damaged.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing: nothing to resume, leave --resume out")
    try:
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            progress = Progress(**json.loads(file.metadata()["progress"]))
            before = json.loads(file.metadata().get("settings", "{}"))
    except SafetensorError as error:
        raise Failure(f"{path} is damaged ({error}): remove it to start afresh") from None
    now = json.loads(json.dumps(settings or {}))
    if other := [name for name in {**before, **now} if before.get(name) != now.get(name)]:
        name = other[0]
        raise UserError(
            f"{path} is of a run with {name} {before.get(name)}, this one has {now.get(name)}: "
            "resume with the flags of before, or remove the folder to start afresh"
        )
    torch.set_rng_state(tensors.pop("rng").cpu())
    for name, module in modules.items():
        prefix = f"{name}."
        module.load_state_dict(
            {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
        )
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            state.setdefault(int(index), {})[name] = value
    if state:
        whole = optimizer.state_dict()
        whole["state"] = state
        optimizer.load_state_dict(whole)
    return progress
