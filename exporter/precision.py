"""Graphs of lower precision: int8 for CPUs, fp16 for GPUs.

Only products with a constant matrix, or one per head, change. Those of attention have none and stay
as they are.
"""

from __future__ import annotations

import logging
import platform
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from serve.errors import Failure, UserError

log = logging.getLogger(__name__)

PRECISIONS = ("fp32", "int8", "fp16")
# T5's feed-forward output passes 65504 in its larger sizes (transformers#5651).
OVERFLOWING = re.compile(r"feed\.(\d+\.)?w_out$")
# The residual stream holds that output, so it, and the norms that square it, stay wide too.
WIDE = ("Add", "Pow", "ReduceMean", "Sqrt", "Div", "Mul", "Range", "Sub", "Clip")

_HALF_BANK = ("bank_kv", "bank_states")
_MOVING = ("Reshape", "Gather")  # operators that take what they move in any type


@dataclass(frozen=True)
class Int8:
    """How weights are quantized; activations are always 8 bits without a sign."""

    signed: bool
    bits: int


# By instruction set, after what onnxruntime's kernels do there. AVX2 and AVX-512 without VNNI add
# two products of a signed and an unsigned byte in 16 bits, which saturates: with 7-bit weights it
# cannot, and unsigned weights take wider, slower kernels (docs/speed.md has both measured).
INT8 = {
    "any": Int8(signed=True, bits=7),  # the fastest that is right on every CPU
    "avx2": Int8(signed=False, bits=8),
    "avx512_vnni": Int8(signed=True, bits=8),
    "arm64": Int8(signed=True, bits=8),
}


def this_machine(cpuinfo: Path = Path("/proc/cpuinfo"), machine: str | None = None) -> str:
    """The name in `INT8` of this machine's instruction set, as for `--int8-target auto`.

    Args:
        cpuinfo, machine: where to look; the tests have their own.
    """
    if (machine or platform.machine()) in ("aarch64", "arm64"):
        return "arm64"
    flags = set(cpuinfo.read_text().split()) if cpuinfo.is_file() else set()
    if flags & {"avx512_vnni", "avx_vnni"}:
        return "avx512_vnni"
    return "avx2" if "avx2" in flags else "any"


def weight_products(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The products with a constant matrix [in, out]."""
    matrices = {tensor.name for tensor in model.graph.initializer if len(tensor.dims) == 2}
    return [
        node for node in model.graph.node if node.op_type == "MatMul" and node.input[1] in matrices
    ]


def head_products(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The products with a constant matrix per head [H, in, out]: the absorbed ones of
    cross-attention."""
    stacks = {tensor.name for tensor in model.graph.initializer if len(tensor.dims) == 3}
    return [
        node for node in model.graph.node if node.op_type == "MatMul" and node.input[1] in stacks
    ]


def quantize_heads(model: onnx.ModelProto, kind: Int8) -> int:
    """`head_products` in int8, each column of each head with a scale of its own; the model is
    changed.

    onnxruntime's quantizer knows no scales per head, and those per column that it writes for such
    a constant onnxruntime 1.32 refuses at run time ("b zero point is not valid"). Without a zero
    point the scales are an ordinary factor, and the five operators run as one all the same. For a
    single text these constants are a quarter of what is read, where they stay in fp32.

    Returns:
        the number of products.
    """
    wanted = {node.name for node in head_products(model)}
    known = {tensor.name: tensor for tensor in model.graph.initializer}
    # Weights without a sign need a zero point; 7 bits with one are right on those CPUs as well.
    nodes, largest = [], 127 if kind.signed and kind.bits == 8 else 63
    for node in model.graph.node:
        if node.name not in wanted:
            nodes.append(node)
            continue
        left, name, out = node.input[0], node.input[1], node.output[0]
        if f"{name}_heads" not in known:
            values = numpy_helper.to_array(known[name])
            scale = np.abs(values).max(axis=1, keepdims=True) / largest + np.finfo(np.float32).tiny
            steps = np.rint(values / scale).astype(np.int8)
            for suffix, array in (("heads", steps), ("head_scales", scale.astype(np.float32))):
                known[f"{name}_{suffix}"] = numpy_helper.from_array(array, f"{name}_{suffix}")
                model.graph.initializer.append(known[f"{name}_{suffix}"])
            model.graph.initializer.remove(known[name])
        part = lambda suffix, out=out: f"{out}_{suffix}"  # noqa: E731
        make = helper.make_node
        nodes += [
            make("DynamicQuantizeLinear", [left], [part("q"), part("scale"), part("zero")]),
            make("MatMulInteger", [part("q"), f"{name}_heads", part("zero")], [part("sum")]),
            make("Cast", [part("sum")], [part("float")], to=TensorProto.FLOAT),
            make("Mul", [part("scale"), f"{name}_head_scales"], [part("scales")]),
            make("Mul", [part("float"), part("scales")], [out]),
        ]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return len(wanted)


def halve_bank(model: onnx.ModelProto) -> int:
    """Take the bank's keys, values and states in half precision; the model is changed.

    They are the memory that grows with the tasks. What a batch needs of them is widened to single
    precision once it is gathered.

    Returns:
        the number of inputs; none in mode `full`, whose bank is small.
    """
    half = {item.name for item in model.graph.input if item.name in _HALF_BANK}
    for item in model.graph.input:
        if item.name in half:
            item.type.tensor_type.elem_type = TensorProto.FLOAT16
    count, widened, nodes = len(half), set(), []
    for node in model.graph.node:  # in the order of execution
        if half & set(node.input):
            if node.op_type in _MOVING:
                half.add(node.output[0])
            else:
                for place, name in enumerate(node.input):
                    if name not in half:
                        continue
                    node.input[place] = f"{name}_wide"
                    if name not in widened:
                        cast = helper.make_node("Cast", [name], [f"{name}_wide"],
                                                to=TensorProto.FLOAT)  # fmt: skip
                        nodes.append(cast)
                        widened.add(name)
        nodes.append(node)
    stale = [item for item in model.graph.value_info if item.name in half]
    for item in stale:
        model.graph.value_info.remove(item)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return count


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what onnxruntime's converters log: advice to take steps that are taken already, and
    whole nodes as protobuf prints them."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)


def int8_onnx(graph: Path, target: str = "any") -> tuple[onnx.ModelProto, dict[str, Any]]:
    """Weights in 8 or 7 bits per output channel, activations quantized as they come; the bank in
    half precision.

    Args:
        graph: an fp32 graph, its weights beside it.
        target: a name in `INT8`, or `auto` for this machine's.

    Returns:
        the model with weights inside, and figures for `bundle.json`.

    Raises:
        UserError: an unknown target.
        Failure: a product was left out, so the file would not be what its name says.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    if target == "auto":
        target = this_machine()
    if target not in INT8:
        raise UserError(f"--int8-target '{target}' is unknown: use auto, {', '.join(INT8)}")
    kind = INT8[target]
    wanted = [node.name for node in weight_products(onnx.load(graph, load_external_data=False))]
    with _quiet(), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "int8.onnx"
        quantize_dynamic(
            graph,
            path,
            op_types_to_quantize=["MatMul"],
            nodes_to_quantize=wanted,
            per_channel=True,
            reduce_range=kind.bits == 7,
            weight_type=QuantType.QInt8 if kind.signed else QuantType.QUInt8,
            use_external_data_format=True,
            extra_options={"MatMulConstBOnly": True},
        )
        model = onnx.load(path)
    count = sum(node.op_type == "MatMulInteger" for node in model.graph.node)
    if count == 0 or count != len(wanted):
        raise Failure(
            f"only {count} of {len(wanted)} products became int8: the installed onnxruntime does "
            "not quantize this graph, export it as fp32"
        )
    count += quantize_heads(model, kind)
    halve_bank(model)
    return model, {
        "quantized_products": count, "weight_bits": kind.bits, "signed_weights": kind.signed,
        "target": target, "per_channel": True,
    }  # fmt: skip


def join_wide(model: onnx.ModelProto) -> int:
    """Keep in single precision what goes from one wide operator to the next; the model is changed.

    onnxruntime's converter narrows what each of them gives and widens it again for its reader. That
    loses range and bits just where they are needed, and hides the norms from onnxruntime's fusions.
    Before onnxruntime 1.32 it also writes a cast anew for each reader, under one name.

    Returns:
        the number of casts taken away.
    """
    before = len(model.graph.node)
    nodes = list({node.output[0]: node for node in model.graph.node}.values())
    casts = [node for node in nodes if node.op_type == "Cast"]
    # By the converter's names: `x_cast_to_fp16` is what a wide operator gives, before it becomes x.
    wide = {n.output[0] for n in casts if n.input[0] == f"{n.output[0]}_cast_to_fp16"}
    direct = {
        node.output[0]: f"{node.input[0]}_cast_to_fp16"
        for node in casts
        if node.input[0] in wide and node.output[0] == f"{node.input[0]}_cast_to_fp32"
    }
    for node in nodes:
        for place, name in enumerate(node.input):
            node.input[place] = direct.get(name, name)
    nodes = [node for node in nodes if node.output[0] not in direct]
    read = {name for node in nodes for name in node.input}
    read |= {item.name for item in model.graph.output}
    nodes = [node for node in nodes if node.output[0] not in wide or node.output[0] in read]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return before - len(nodes)


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
    with _quiet():
        model = convert_float_to_float16(
            model,
            keep_io_types=False,
            op_block_list=list(WIDE),
            node_block_list=wide,
            disable_shape_infer=False,
        )
    join_wide(model)
    half = sum(t.data_type == TensorProto.FLOAT16 for t in model.graph.initializer)
    if half == 0:
        raise Failure("no weight became fp16: export the graph as fp32")
    return model, {"half_products": len(products) - len(wide), "wide_products": len(wide)}
