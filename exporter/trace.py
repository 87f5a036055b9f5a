"""From a module to an ONNX model in memory, and to files that share their weights."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import TensorProto, external_data_helper
from torch import Tensor, nn

from exporter.graph import PrefixGraph, ServedGraph
from serve.errors import Failure

OPSET = 20  # the first with Gelu
EMBEDDED = 1024  # bytes; smaller constants stay in the graph, where the runtime can fold them
ALIGNMENT = 4096  # of a tensor in the weights file, so that it can be mapped page by page

log = logging.getLogger(__name__)


def example(graph: ServedGraph, slots: int = 4) -> dict[str, Tensor]:
    """Inputs to trace `graph` with. Every dynamic size is 2 or more and no two are equal, since
    the tracer takes a size of 1 for a constant (pytorch#151582).
    """
    groups, rows, length, classes, prompt = 2, 6, 7, 5, graph.prompt_tokens
    encoder, width = graph.encoder, graph.shared.shape[1]
    kv = (slots, encoder.layers, 2, encoder.heads, prompt, encoder.head_width)
    generator = torch.Generator().manual_seed(0)
    banks = {
        "bank_kv": torch.randn(kv, generator=generator),
        "bank_states": torch.randn(slots, prompt, width, generator=generator),
        "bank_prompts": torch.randn(slots, prompt, width, generator=generator),
    }
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[0, 3:] = 0
    values = {
        "input_ids": torch.arange(rows * length).view(rows, length),
        "attention_mask": mask,
        "task_id": torch.arange(groups) % slots,
        **banks,
        "bank_length": torch.full((slots,), prompt),
        "label_ids": torch.arange(slots * classes).view(slots, classes),
    }
    return {name: values[name] for name in graph.inputs()}


def dynamic_axes(names: Sequence[str]) -> dict[str, dict[int, Any]]:
    """The axes of each input that vary, by name."""
    rows, groups, length, slots, classes = (torch.export.Dim(name) for name in "BGSNC")
    known: dict[str, dict[int, Any]] = {
        "input_ids": {0: rows, 1: length},
        "attention_mask": {0: rows, 1: length},
        "task_id": {0: groups},
        "label_ids": {0: slots, 1: classes},
    }
    return {name: known.get(name, {0: slots}) for name in names}


def served_onnx(graph: ServedGraph) -> onnx.ModelProto:
    """The served graph, weights inside."""
    values = example(graph)
    axes = dynamic_axes(list(values))
    fixed, bank = list(values)[:3], list(values)[3:]
    shapes = (*(axes[name] for name in fixed), tuple(axes[name] for name in bank))
    return to_onnx(graph, tuple(values.values()), list(values), ["logits"], shapes)


def prefix_onnx(graph: PrefixGraph, width: int) -> onnx.ModelProto:
    """The prefix graph, weights inside. All its sizes are fixed."""
    arguments = (torch.zeros(graph.prompt_tokens, width), torch.tensor(graph.prompt_tokens))
    return to_onnx(graph, arguments, ["prompt", "length"], ["kv", "states"], None)


def to_onnx(
    module: nn.Module,
    arguments: tuple[Tensor, ...],
    inputs: Sequence[str],
    outputs: Sequence[str],
    dynamic_shapes: Any,
) -> onnx.ModelProto:
    """Trace a module with torch's exporter.

    Raises:
        Failure: torch cannot trace it.
    """
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                module.eval(),
                arguments,
                input_names=list(inputs),
                output_names=list(outputs),
                dynamic_shapes=dynamic_shapes,
                opset_version=OPSET,
                dynamo=True,
                optimize=True,
                verbose=False,
            )
    except Exception as error:  # torch's exporter raises kinds of its own for each of its stages
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Failure(f"torch could not trace the graph ({first}); torch 2.13 is tested") from error
    assert program is not None
    model = program.model_proto
    # Names of source lines and modules: of no use to the runtime, and they name local paths.
    model.graph.ClearField("value_info")
    for node in model.graph.node:
        node.ClearField("metadata_props")
        node.doc_string = ""
    del model.metadata_props[:]
    for entry in (*model.graph.input, *model.graph.output, *model.graph.initializer):
        entry.ClearField("metadata_props")
        entry.doc_string = ""
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter tells its steps on standard output, in warnings and in three loggers."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


class WeightsFile:
    """One file for the constants of several graphs; equal bytes are written once.

    Use as a context manager around `place`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offsets: dict[tuple[str, int], tuple[str, int]] = {}

    def __enter__(self) -> WeightsFile:
        self._file = self.path.open("wb")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def known(self, other: WeightsFile) -> WeightsFile:
        """Let constants that `other` holds already point there; gives this file back."""
        self._offsets.update(other._offsets)
        return self

    def place(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """Move the model's large constants into the file; the model is changed and given back."""
        for tensor in model.graph.initializer:
            if len(tensor.raw_data) < EMBEDDED:
                continue
            data = tensor.raw_data
            key = (hashlib.sha256(data).hexdigest(), len(data))
            if key not in self._offsets:
                start = -(-self._file.tell() // ALIGNMENT) * ALIGNMENT
                self._file.seek(start)
                self._file.write(data)
                self._offsets[key] = (self.path.name, start)
            name, offset = self._offsets[key]
            external_data_helper.set_external_data(tensor, name, offset, len(data))
            tensor.data_location = TensorProto.EXTERNAL
            tensor.ClearField("raw_data")
        return model
