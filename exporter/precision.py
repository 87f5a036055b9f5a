"""Graphs of lower precision: int8 for CPUs, fp16 for GPUs.

Only products with a constant weight matrix change. The products of attention, and the absorbed
ones of cross-attention, have no constant matrix (or one per head, whose per-channel form
onnxruntime 1.32 refuses at run time: "b zero point is not valid") and stay as they are.
"""

from __future__ import annotations

import logging
import re
import tempfile
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto

from serve.errors import Failure

log = logging.getLogger(__name__)

PRECISIONS = ("fp32", "int8", "fp16")
# T5's feed-forward output passes 65504 in its larger sizes (transformers#5651).
OVERFLOWING = re.compile(r"feed\.(\d+\.)?w_out$")
# The residual stream holds that output, so it, and the norms that square it, stay wide too.
WIDE = ("Add", "Pow", "ReduceMean", "Sqrt", "Div", "Mul", "Range", "Sub", "Clip")


def weight_products(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The products with a constant matrix [in, out]."""
    matrices = {tensor.name for tensor in model.graph.initializer if len(tensor.dims) == 2}
    return [
        node for node in model.graph.node if node.op_type == "MatMul" and node.input[1] in matrices
    ]


def int8_onnx(graph: Path, bits: int = 7) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """Weights as int8 per output channel, activations quantized as they come.

    Args:
        graph: an fp32 graph, its weights beside it.
        bits: 7 is safe on every CPU; 8 is a little finer, but on CPUs without VNNI instructions
            sums of two products can saturate.

    Returns:
        the model with weights inside, and figures for `bundle.json`.

    Raises:
        Failure: a product was left out, so the file would not be what its name says.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    wanted = [node.name for node in weight_products(onnx.load(graph, load_external_data=False))]
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # it recommends, on the root logger, a step that is done already
    try:
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "int8.onnx"
            quantize_dynamic(
                graph,
                target,
                op_types_to_quantize=["MatMul"],
                nodes_to_quantize=wanted,
                per_channel=True,
                reduce_range=bits == 7,
                weight_type=QuantType.QInt8,
                use_external_data_format=True,
                extra_options={"MatMulConstBOnly": True},
            )
            model = onnx.load(target)
    finally:
        root.setLevel(level)
    count = sum(node.op_type == "MatMulInteger" for node in model.graph.node)
    if count == 0 or count != len(wanted):
        raise Failure(
            f"only {count} of {len(wanted)} products became int8: the installed onnxruntime does "
            "not quantize this graph, export it as fp32"
        )
    figures = {"quantized_products": count, "weight_bits": bits, "per_channel": True}
    return model, figures


def fp16_onnx(graph: Path) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """Products in half precision; the residual stream, the norms and the feed-forward outputs,
    which overflow it, in single. Inputs and outputs become half precision too.

    Returns:
        the model with weights inside, and figures for `bundle.json`.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16

    model = onnx.load(graph)
    products = weight_products(model)
    wide = [node.name for node in products if OVERFLOWING.search(node.input[1])]
    model = convert_float_to_float16(
        model,
        keep_io_types=False,
        op_block_list=list(WIDE),
        node_block_list=wide,
        disable_shape_infer=False,
    )
    half = sum(t.data_type == TensorProto.FLOAT16 for t in model.graph.initializer)
    if half == 0:
        raise Failure("no weight became fp16: export the graph as fp32")
    return model, {"half_products": len(products) - len(wide), "wide_products": len(wide)}
