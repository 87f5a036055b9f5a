"""A prompt on disk: a PEFT adapter folder with `task.json` beside it.

    adapter_config.json         what PEFT needs to load it (modes `full` and `prefix`)
    adapter_model.safetensors   `prompt_embeddings` [P, D]; in mode `deep`, which PEFT does not
                                know, `kv` [L, 2, H, P, K] and `states` [P, D], and no
                                adapter_config.json
    task.json                   labels, words, template, mode, backbone, seeds, figures, temperature

PEFT's own prompts and Google's prompt-tuning `.npy` files are read as well.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from serve.errors import Failure, UserError
from serve.files import atomic_folder, read_json
from serve.prompt import prompt_rows
from serve.task import is_count
from trainer.backbone import Backbone
from trainer.modes import MODES, Params
from trainer.tasks import TEMPLATE, Task, get_task, task_names
from trainer.tensors import read_tensors, write_tensors

FORMAT = 1
WEIGHTS = "adapter_model.safetensors"


@dataclass
class TaskRecord:
    """Everything that says what a prompt answers and where it came from (`task.json`).

    Attributes:
        name: the task's name; labels: what the classes are called; words: their label words.
        template: with `{text}` and `<extra_id_0>`.
        mode: attention mode the prompt was trained in, and must be served in.
        backbone: name of the T5; backbone_sha256: of its weights, None where unknown.
        max_tokens: longest input, template included.
        temperature: divides the logits before the softmax (Guo et al. 2017).
        method: how it was made (metapt, ppt, tune, peft ...).
        seed: of the few-shot draw and the training; figures: validation figures.
        registered: the registered task (`--task`) whose rows it was tuned on, "" for a file of the
            user's own, whatever its name; None where it is not recorded.
    """

    name: str = "task"
    labels: list[str] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    template: str = TEMPLATE
    mode: str = "prefix"
    backbone: str = ""
    backbone_sha256: str | None = None
    max_tokens: int = 128
    temperature: float = 1.0
    method: str = ""
    seed: int | None = None
    figures: dict[str, Any] = field(default_factory=dict)
    registered: str | None = None
    format: int = FORMAT

    @property
    def data_set(self) -> str | None:
        """The registered task that it is of, if it is of one: see `registered`."""
        name = self.name if self.registered is None else self.registered
        return name if name in task_names() else None

    def as_task(self) -> Task:
        """The task as the prompt was tuned on it: texts of a registered one are read with their
        aspects, and without the rows to be dropped."""
        labels, words = tuple(self.labels), tuple(self.words)
        if self.data_set and get_task(self.data_set).classes == len(labels):
            known = get_task(self.data_set)
            return replace(known, labels=labels, words=words, template=self.template)
        return Task(self.name, labels, words, template=self.template)


@dataclass
class Prompt:
    """A soft prompt: its tensors (without a group axis, see `trainer.modes`) and its record."""

    params: Params
    task: TaskRecord

    @property
    def tokens(self) -> int:
        """P, the number of prompt tokens."""
        key = "prompt_embeddings" if "prompt_embeddings" in self.params else "states"
        return self.params[key].shape[0]

    @property
    def width(self) -> int:
        """D, the width of the backbone it fits."""
        key = "prompt_embeddings" if "prompt_embeddings" in self.params else "states"
        return self.params[key].shape[1]

    def size_bytes(self) -> int:
        """Bytes of its tensors."""
        return sum(value.numel() * value.element_size() for value in self.params.values())


def save_prompt(
    prompt: Prompt,
    folder: str | Path,
    backbone: Backbone | None = None,
    extras: dict[str, str] | None = None,
) -> None:
    """Write the folder, whole or not at all.

    Args:
        backbone: fills the record's backbone fields and PEFT's head and layer counts.
        extras: further text files by name, such as `run.json` and `metrics.jsonl`.
    """
    task = prompt.task
    if backbone is not None:
        task.backbone, task.backbone_sha256 = backbone.name, backbone.sha256
    tensors = {name: value.float() for name, value in prompt.params.items()}
    with atomic_folder(folder) as temporary:
        write_tensors(tensors, temporary / WEIGHTS)
        record = json.dumps(asdict(task), indent=2, ensure_ascii=False)
        (temporary / "task.json").write_text(record + "\n", "utf-8")
        if "prompt_embeddings" in tensors:
            config = peft_config(prompt, backbone)
            (temporary / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
        for name, text in (extras or {}).items():
            (temporary / name).write_text(text, "utf-8")


def peft_config(prompt: Prompt, backbone: Backbone | None) -> dict[str, Any]:
    """PEFT's `adapter_config.json`. One submodule: the prompt stands before the encoder only."""
    model = None if backbone is None else backbone.t5.model.config
    return {
        "peft_type": "PROMPT_TUNING",
        "task_type": "SEQ_2_SEQ_LM",
        "base_model_name_or_path": prompt.task.backbone,
        "inference_mode": True,
        "num_virtual_tokens": prompt.tokens,
        "token_dim": prompt.width,
        "num_transformer_submodules": 1,
        "num_attention_heads": None if model is None else model.num_heads,
        "num_layers": None if model is None else model.num_layers,
        "prompt_tuning_init": "RANDOM",
    }


def load_prompt(path: str | Path) -> Prompt:
    """Read a prompt folder (ours or PEFT's) or Google's `.npy` [P, D].

    A PEFT seq2seq prompt holds 2P rows by default (encoder and decoder); its first P are kept.

    Raises:
        UserError: there is no prompt at `path`. Failure: a file is damaged.
    """
    path = Path(path)
    if path.suffix == ".npy":
        return Prompt({"prompt_embeddings": _read_npy(path)}, TaskRecord(path.stem, mode="full"))
    if not path.is_dir():
        raise UserError(f"prompt folder {path} does not exist: check the path")
    if not (path / WEIGHTS).is_file():
        raise UserError(f"{path} holds no {WEIGHTS}: it is not a prompt folder")
    params = _read_tensors(path / WEIGHTS)
    if (path / "task.json").is_file():
        task = read_record(path / "task.json")
        wanted = {"kv", "states"} if task.mode == "deep" else {"prompt_embeddings"}
        if set(params) != wanted:
            raise Failure(
                f"{path / WEIGHTS} holds {', '.join(sorted(params)) or 'nothing'}, but mode "
                f"'{task.mode}' needs {', '.join(sorted(wanted))}: train the prompt again"
            )
    else:
        task = TaskRecord(path.name, mode="full", method="peft")
    if "prompt_embeddings" in params:
        value = params["prompt_embeddings"]
        if value.dim() != 2:
            raise Failure(f"{path / WEIGHTS}: the prompt is {list(value.shape)}, not [P, D]")
        if (path / "adapter_config.json").is_file():
            config = read_json(path / "adapter_config.json")
            task.backbone = task.backbone or config.get("base_model_name_or_path") or ""
            own = prompt_rows(len(value), config.get("num_virtual_tokens"), path / WEIGHTS)
            params["prompt_embeddings"] = value[:own].clone()
    return Prompt(params, task)


def _read_npy(path: Path) -> torch.Tensor:
    if not path.is_file():
        raise UserError(f"{path} does not exist: check the path")
    try:
        value = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise Failure(f"{path} is not a NumPy file of numbers ({error}): fetch it again") from None
    if value.ndim != 2 or value.dtype.kind != "f":
        raise UserError(f"{path} holds {value.dtype} {list(value.shape)}, not floats [P, D]")
    return torch.from_numpy(value.astype(np.float32))


def _read_tensors(path: Path) -> Params:
    params = read_tensors(path, "copy it again")
    if not params:
        raise Failure(f"{path} holds no tensors: train the prompt again")
    for name, value in params.items():
        if not torch.isfinite(value).all():
            raise Failure(f"{path}: '{name}' is not finite: train the prompt at a lower rate")
    return {name: value.to(torch.float32) for name, value in params.items()}


def read_record(path: Path) -> TaskRecord:
    """Read a `task.json`.

    Raises:
        Failure: it is damaged, or a field is not of its kind. UserError: it is of a newer format.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise Failure(f"{path} must hold a JSON object: it is damaged, train the prompt again")
    if value.get("format", FORMAT) != FORMAT:
        raise UserError(
            f"{path} has format {value['format']}, this version reads {FORMAT}: upgrade"
        )
    unknown = set(value) - set(TaskRecord.__dataclass_fields__)
    if unknown:
        raise Failure(f"{path} holds unknown settings: {', '.join(sorted(unknown))}")
    _check_fields(value, path)
    record = TaskRecord(**value)
    if record.mode not in (*MODES, "none"):  # none: a fully tuned model
        raise Failure(f"{path}: mode '{record.mode}' is unknown, there are {', '.join(MODES)}")
    if len(record.labels) != len(record.words):
        raise Failure(f"{path}: {len(record.labels)} labels but {len(record.words)} label words")
    return record


def _check_fields(value: dict[str, Any], path: Path) -> None:
    """Failure naming the first field that is not of its kind: a person may have edited it."""

    def text(found: Any) -> bool:
        return isinstance(found, str)

    def texts(found: Any) -> bool:
        return isinstance(found, list) and all(map(text, found))

    def positive(found: Any) -> bool:
        number = isinstance(found, int | float) and not isinstance(found, bool)
        return number and 0 < found < math.inf

    kinds: dict[str, tuple[Callable[[Any], bool], str]] = {
        **dict.fromkeys(("name", "template", "mode", "backbone", "method"), (text, "a text")),
        **dict.fromkeys(("labels", "words"), (texts, "a list of texts")),
        **dict.fromkeys(
            ("backbone_sha256", "registered"),
            (lambda found: found is None or text(found), "a text or null"),
        ),
        "max_tokens": (is_count, "a whole number of at least 1"),
        "temperature": (positive, "a number above 0"),
        "seed": (lambda found: found is None or is_count(found, 0), "a whole number or null"),
        "figures": (lambda found: isinstance(found, dict), "an object of figures"),
    }
    for name, (fits, what) in kinds.items():
        if name in value and not fits(value[name]):
            raise Failure(
                f"{path}: '{name}' is {json.dumps(value[name])[:80]}, but must be {what}: correct "
                "it, or train the prompt again"
            )


def check_fits(prompt: Prompt, backbone: Backbone, source: str | Path = "the prompt") -> None:
    """Refuse a prompt that is of another backbone.

    Raises:
        UserError: the width, the geometry or the weights' hash differs.
    """
    t5, own = backbone.t5, prompt.task.backbone
    other = f"pass --backbone {own}, which it was trained on" if own else "pass another --backbone"
    if prompt.width != t5.width:
        raise UserError(
            f"{source} holds [{prompt.tokens}, {prompt.width}], but backbone '{backbone.name}' is "
            f"{t5.width} wide: {other}, or train it again"
        )
    if "kv" in prompt.params:
        got = tuple(prompt.params["kv"].shape)
        want = (t5.layers, 2, t5.heads * t5.shards.count, prompt.tokens, t5.head_width)
        if got != want:
            raise UserError(
                f"{source} holds keys and values {list(got)}, but backbone '{backbone.name}' needs "
                f"{list(want)}: {other}, or train it again"
            )
    known = prompt.task.backbone_sha256
    if known and known != backbone.sha256:
        raise UserError(
            f"{source} was trained on backbone '{prompt.task.backbone}' with other weights "
            f"({known[:12]}) than '{backbone.name}' ({backbone.sha256[:12]}): pass the --backbone "
            "it was trained on, or train it again"
        )
