"""One task in one file: ONNX for onnxruntime in any language, or TorchScript.

The file answers `input_ids`, `attention_mask` (int64 [B, S]) with logits [B, C]. What a caller
needs besides is inside as JSON under the key `task`: labels, the template and its token ids around
the text, and the temperature.
"""

from __future__ import annotations

import json
import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import torch

from exporter.export import Job, prepare
from exporter.graph import ServedGraph, SingleFileGraph
from exporter.precision import int8_onnx
from exporter.record import Arrays
from exporter.trace import dynamic_axes, example, to_onnx
from exporter.verify import check, difference, run, session
from serve.errors import Failure, UserError
from serve.files import atomic_write
from trainer.backbone import Backbone
from trainer.prompt import Prompt

log = logging.getLogger(__name__)

FORMATS = ("onnx", "torchscript")
INPUTS = ("input_ids", "attention_mask")
Logits = Callable[[Arrays], np.ndarray]  # a file that was written, loaded again
LIMIT = 2_000_000_000  # bytes; protobuf, and so an .onnx file, ends at 2 GiB


def export_single(
    prompt: Path | str | Prompt,
    backbone: Backbone,
    out: Path | str,
    *,
    kind: str = "onnx",
    name: str | None = None,
    precision: str = "fp32",
    int8_target: str = "any",
    max_tokens: int = 512,
) -> float:
    """Write one task as one file, verified against torch.

    Args:
        kind: `onnx` or `torchscript`; precision: `fp32`, for onnx also `int8`.
        name: of the task; by default the one in the prompt's record.
        int8_target: see `exporter.precision.int8_onnx`.
        max_tokens: longest row, template included; the file's JSON has it, or less where the
            prompt was tuned on less.

    Returns:
        The largest difference of a logit to torch.

    Raises:
        UserError: the prompt does not fit, or the combination does not exist.
        Failure: tracing failed, the logits differ, or the file would be too large.
    """
    out = Path(out)
    if kind not in FORMATS:
        raise UserError(f"--format '{kind}' is unknown: use {', '.join(FORMATS)}")
    if precision not in ("fp32", "int8") or (kind == "torchscript" and precision != "fp32"):
        raise UserError(f"--precision {precision} does not go with --single-file as {kind}")
    if out.is_dir():
        raise UserError(f"--single-file {out} is a folder: pass the name of a file")
    job = prepare([prompt], backbone, names=[name] if name is not None else [])
    task = _task_json(job, max_tokens)
    served = ServedGraph(backbone.t5, backbone.decoder_ids, job.mode, job.tokens).eval()
    words = torch.tensor(job.slots[0].words)
    graph = SingleFileGraph(served, job.slots[0].params, words).eval()
    values = example(served)
    arguments = (values["input_ids"], values["attention_mask"])
    with atomic_write(out) as temporary:
        if kind == "torchscript":
            logits = _write_torchscript(graph, arguments, temporary, task)
        else:
            target = int8_target if precision == "int8" else None
            logits = _write_onnx(graph, arguments, temporary, task, target)
        worst = difference(logits, job.slots, backbone, job.mode, max_tokens)
        if precision == "fp32":
            check(worst, f"the {kind} file")
        return worst


def _task_json(job: Job, max_tokens: int) -> str:
    record = job.records[0]
    template = len(record["prefix_ids"]) + len(record["suffix_ids"])
    if template >= max_tokens:
        raise UserError(
            f"--max-tokens {max_tokens} leaves no room for a text: the template takes {template}"
        )
    kept = ("labels", "words", "template", "prefix_ids", "suffix_ids", "temperature")
    longest = min(max_tokens, record["max_tokens"] or max_tokens)
    values = {key: record[key] for key in kept}
    return json.dumps({"name": job.names[0], **values, "max_tokens": longest})


def _write_onnx(
    graph: SingleFileGraph,
    arguments: tuple[torch.Tensor, ...],
    path: Path,
    task: str,
    int8_target: str | None,
) -> Logits:
    model = to_onnx(graph, arguments, INPUTS, ["logits"], dynamic_axes(INPUTS))
    if model.ByteSize() > LIMIT:
        raise Failure(
            f"a single file of this backbone takes {model.ByteSize() / 1e9:.1f} GB, and .onnx ends "
            "at 2 GB: export a bundle, or --precision int8"
        )
    if int8_target is not None:
        with tempfile.TemporaryDirectory() as folder:
            plain = Path(folder) / "model.onnx"
            plain.write_bytes(model.SerializeToString())
            model, _ = int8_onnx(plain, int8_target)
    entry = model.metadata_props.add()
    entry.key, entry.value = "task", task
    onnx.save(model, str(path))
    runner = session(path)
    return lambda batch: run(runner, batch)


def _write_torchscript(
    graph: SingleFileGraph, arguments: tuple[torch.Tensor, ...], path: Path, task: str
) -> Logits:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # it warns of sizes; other sizes are verified below
        traced = torch.jit.trace(graph, arguments, check_trace=False)
        torch.jit.save(traced, str(path), _extra_files={"task": task})
        loaded = torch.jit.load(str(path))

    def logits(batch: Arrays) -> np.ndarray:
        with torch.no_grad():
            return loaded(*(torch.from_numpy(batch[name]) for name in INPUTS)).numpy()

    return logits
