"""Graphs that were traced beforehand: tracing takes most of an export's time, and depends on a
backbone's geometry alone, not on its weights.

A folder of `exporter/graphs` holds one geometry: `model.onnx` and `prefix.onnx` without weights,
and `graph.json`, which says what they fit. Where nothing fits, or the modules have changed since,
the exporter traces. What comes from here is held to torch like a fresh graph (`exporter.verify`).

    python -m exporter.traced    # trace `mini` anew, after a change of what the graphs compute
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import TensorProto
from torch import Tensor, nn

from exporter.graph import PrefixGraph, ServedGraph
from exporter.trace import prefix_onnx, served_onnx
from serve.errors import Failure
from serve.files import atomic_folder, read_json
from trainer.backbone import Backbone, load_backbone

FOLDER = Path(__file__).with_name("graphs")
MODEL, PREFIX, GEOMETRY = "model.onnx", "prefix.onnx", "graph.json"
_SOURCES = ("graph.py", "decoder.py", "layers.py", "trace.py")
_CONFIG = (
    "d_model", "d_kv", "d_ff", "num_layers", "num_decoder_layers", "num_heads", "vocab_size",
    "dense_act_fn", "is_gated_act", "layer_norm_epsilon", "relative_attention_num_buckets",
    "relative_attention_max_distance",
)  # fmt: skip


def geometry(served: ServedGraph, backbone: Backbone) -> dict[str, Any]:
    """Everything that a traced graph depends on besides the weights' values."""
    config = backbone.t5.model.config
    text = "".join(Path(__file__).with_name(name).read_text("utf-8") for name in _SOURCES)
    return {
        **{key: getattr(config, key) for key in _CONFIG},
        "tied": served.head is served.shared,
        "mode": served.mode,
        "prompt_tokens": served.prompt_tokens,
        "sources_sha256": hashlib.sha256(text.encode()).hexdigest(),
    }


def served_graphs(
    served: ServedGraph, backbone: Backbone
) -> tuple[onnx.ModelProto, onnx.ModelProto | None]:
    """The served graph and in mode `prefix` the prefix graph, weights inside.

    Taken from `exporter/graphs` where one fits, otherwise traced.

    Raises:
        Failure: torch cannot trace it.
    """
    modules = _modules(served)
    wanted = geometry(served, backbone)
    for path in sorted(FOLDER.glob(f"*/{GEOMETRY}")):
        if read_json(path) == wanted:
            models = [_filled(path.parent / name, module) for name, module in modules.items()]
            return models[0], models[1] if len(models) > 1 else None
    prefix = None
    if served.mode == "prefix":
        prefix = prefix_onnx(_prefix(modules[PREFIX]), backbone.t5.width)
    return served_onnx(served), prefix


def save(backbone: Backbone, mode: str, prompt_tokens: int, folder: Path) -> None:
    """Trace a backbone and keep the graphs without their weights.

    Raises:
        Failure: torch cannot trace it, or a constant was made of weights.
    """
    served = ServedGraph(backbone.t5, backbone.decoder_ids, mode, prompt_tokens).eval()
    modules = _modules(served)
    models = {MODEL: served_onnx(served)}
    if PREFIX in modules:
        models[PREFIX] = prefix_onnx(_prefix(modules[PREFIX]), backbone.t5.width)
    with atomic_folder(folder) as temporary:
        for name, model in models.items():
            known = modules[name].state_dict()
            for tensor in model.graph.initializer:
                if tensor.name in known:
                    tensor.ClearField("raw_data")
                elif tensor.data_type == TensorProto.FLOAT and math.prod(tensor.dims) > 1:
                    # The tracer folds small tensors with what is done to them; such a graph
                    # would keep these weights for ever.
                    raise Failure(f"{name}: the constant {tensor.name} was made of weights")
            (temporary / name).write_bytes(model.SerializeToString())
        text = json.dumps(geometry(served, backbone), indent=2)
        (temporary / GEOMETRY).write_text(text + "\n", "utf-8")


def _modules(served: ServedGraph) -> dict[str, nn.Module]:
    if served.mode != "prefix":
        return {MODEL: served}
    return {MODEL: served, PREFIX: PrefixGraph(served).eval()}


def _prefix(module: nn.Module) -> PrefixGraph:
    assert isinstance(module, PrefixGraph)
    return module


def _filled(path: Path, module: nn.Module) -> onnx.ModelProto:
    model = onnx.load(path)
    values: dict[str, Tensor] = module.state_dict()
    for tensor in model.graph.initializer:
        if tensor.name in values:
            value = values[tensor.name].detach().to("cpu", torch.float32).contiguous()
            if list(value.shape) != list(tensor.dims):
                raise Failure(
                    f"{path}: {tensor.name} is {list(tensor.dims)}, but the backbone's is "
                    f"{list(value.shape)}: remove {path.parent}, so that the graph is traced"
                )
            tensor.raw_data = value.numpy().tobytes()
    return model


if __name__ == "__main__":
    save(load_backbone("mini"), "prefix", 20, FOLDER / "mini-prefix-20")
