"""Products with a matrix per head, in int8; what stays wide in fp16."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.transformers.float16 import convert_float_to_float16

from exporter.precision import (
    INT8,
    fp16_onnx,
    halve_bank,
    head_products,
    int8_onnx,
    join_wide,
    quantize_heads,
)

HEADS, ROWS, WIDE, NARROW = 3, 4, 16, 5


def model_of(weight: np.ndarray) -> onnx.ModelProto:
    """x [3, 4, 16] -> x @ weight."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [HEADS, ROWS, WIDE])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [HEADS, ROWS, NARROW])
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="product")
    graph = helper.make_graph([node], "g", [x], [y], [numpy_helper.from_array(weight, "w")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def one_product(weight: np.ndarray, name: str = "w") -> onnx.ModelProto:
    """x [B, in] -> x @ weight."""
    info, full = helper.make_tensor_value_info, TensorProto.FLOAT
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", name], ["y"], name="product")], "g",
        [info("x", full, ["B", weight.shape[0]])], [info("y", full, ["B", weight.shape[1]])],
        [numpy_helper.from_array(weight, name)],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize("target", sorted(INT8))
def test_each_column_of_each_head_has_a_scale_of_its_own(target: str) -> None:
    random = np.random.default_rng(0)
    sizes = 10.0 ** random.integers(-3, 3, (HEADS, 1, NARROW))
    sizes[1, 0, 2] = 0.0  # a column without any weight
    weight = (random.standard_normal((HEADS, WIDE, NARROW)) * sizes).astype(np.float32)
    values = random.standard_normal((HEADS, ROWS, WIDE)).astype(np.float32)
    model = model_of(weight)
    assert quantize_heads(model, INT8[target]) == 1
    assert not head_products(model)
    assert [tensor.name for tensor in model.graph.initializer] == ["w_heads", "w_head_scales"]
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    got = session.run(None, {"x": values})[0]
    error = np.abs(got - values @ weight) / np.where(sizes > 0, sizes, 1.0)
    assert error.max() < 0.2  # of the column's own deviation, of which a product has four


# The largest step of a weight by target: 127 where a byte's whole range is right on that CPU, and
# 63 where a zero point would be needed, or a product of two could saturate.
@pytest.mark.parametrize(
    ("target", "largest"), [("any", 63), ("avx2", 63), ("avx512_vnni", 127), ("arm64", 127)]
)
def test_a_heads_columns_use_all_the_steps_that_their_cpu_takes(target: str, largest: int) -> None:
    weight = np.random.default_rng(1).standard_normal((HEADS, WIDE, NARROW)).astype(np.float32)
    model = model_of(weight)
    quantize_heads(model, INT8[target])
    steps, scales = (numpy_helper.to_array(tensor) for tensor in model.graph.initializer)
    assert (np.abs(steps).max(axis=1) == largest).all()
    # Nearest steps: no weight is further off than half of one.
    step = np.abs(weight).max(axis=1, keepdims=True) / largest
    assert (np.abs(steps * scales - weight) <= 0.501 * step).all()


@pytest.mark.parametrize(
    ("target", "low", "high"),
    [("any", -64, 64), ("avx2", 0, 255), ("avx512_vnni", -127, 127), ("arm64", -127, 127)],
)
def test_a_matrixs_weights_are_in_the_range_of_their_cpu(
    tmp_path: Path, target: str, low: int, high: int
) -> None:
    weight = np.random.default_rng(1).standard_normal((WIDE, 64)).astype(np.float32)
    onnx.save(one_product(weight), tmp_path / "g.onnx")
    model, _ = int8_onnx(tmp_path / "g.onnx", target)
    found = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    steps = found["w_quantized"].astype(np.int64)
    assert (steps.min(), steps.max()) == (low, high)
    if target == "any":  # two products with inputs of up to 255 are added in 16 bits
        assert 2 * 255 * np.abs(steps).max() < 2**15
    back = (steps - found["w_zero_point"]) * found["w_scale"]
    assert (np.abs(back - weight) <= 0.501 * found["w_scale"]).all()


def test_a_halved_bank_is_widened_where_it_is_used() -> None:
    half, full = TensorProto.FLOAT16, TensorProto.FLOAT
    info = helper.make_tensor_value_info
    nodes = [
        helper.make_node("Reshape", ["bank_kv", "flat"], ["rows"]),
        helper.make_node("Gather", ["rows", "which"], ["one"], axis=0),
        helper.make_node("Transpose", ["one"], ["turned"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["one", "turned"], ["square"]),
        helper.make_node("Gather", ["bank_states", "which"], ["states"], axis=0),
        helper.make_node("MatMul", ["square", "states"], ["y"]),
    ]
    model = helper.make_model(
        helper.make_graph(
            nodes, "g",
            [info("bank_kv", full, ["N", 2, 4, 3]), info("bank_states", full, ["N", 4, 5]),
             info("which", TensorProto.INT64, ["G"])],
            [info("y", full, ["G", 4, 5])],
            [numpy_helper.from_array(np.array([-1, 4, 3]), "flat")],
            value_info=[info("rows", full, ["M", 4, 3]), info("one", full, ["G", 4, 3])],
        ),
        opset_imports=[helper.make_opsetid("", 20)], ir_version=10,
    )  # fmt: skip
    assert halve_bank(model) == 2
    onnx.checker.check_model(model, full_check=True)
    types = {item.name: item.type.tensor_type.elem_type for item in model.graph.input}
    assert types == {"bank_kv": half, "bank_states": half, "which": TensorProto.INT64}
    casts = [node.input[0] for node in model.graph.node if node.op_type == "Cast"]
    assert casts == ["one", "states"]  # once each, after the bank's rows are gathered
    random = np.random.default_rng(0)
    kv = random.standard_normal((3, 2, 4, 3)).astype(np.float16)
    states = random.standard_normal((3, 4, 5)).astype(np.float16)
    which = np.array([2, 0])
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    got = session.run(None, {"bank_kv": kv, "bank_states": states, "which": which})[0]
    rows = kv.astype(np.float32).reshape(-1, 4, 3)
    for index, place in enumerate(which.tolist()):
        wanted = rows[place] @ rows[place].T @ states[place].astype(np.float32)
        np.testing.assert_allclose(got[index], wanted, rtol=1e-5, atol=1e-5)


def test_a_graph_without_a_bank_is_left_alone() -> None:
    model = model_of(np.ones((HEADS, WIDE, NARROW), np.float32))
    before = model.SerializeToString()
    assert halve_bank(model) == 0 and model.SerializeToString() == before


def test_between_wide_operators_nothing_is_narrowed() -> None:
    """Two operators that are kept wide hand on what half precision cannot hold."""
    info, full = helper.make_tensor_value_info, TensorProto.FLOAT
    tensors = {
        "up": np.array(1e6, np.float32), "down": np.array(1e-6, np.float32),
        "w": np.eye(4, dtype=np.float32) * 2,
    }  # fmt: skip
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="first"),
        helper.make_node("Mul", ["a", "up"], ["b"], name="wide_up"),
        helper.make_node("Mul", ["b", "down"], ["c"], name="wide_down"),
        helper.make_node("Mul", ["b", "down"], ["d"], name="wide_again"),
        helper.make_node("Add", ["c", "d"], ["e"], name="last"),
        helper.make_node("MatMul", ["e", "w"], ["y"], name="second"),
    ]
    model = helper.make_model(
        helper.make_graph(
            nodes, "g", [info("x", full, ["B", 4])], [info("y", full, ["B", 4])],
            [numpy_helper.from_array(value, name) for name, value in tensors.items()],
        ),
        opset_imports=[helper.make_opsetid("", 20)], ir_version=10,
    )  # fmt: skip
    half = convert_float_to_float16(
        model, keep_io_types=False, node_block_list=["wide_up", "wide_down", "wide_again"]
    )
    values = np.linspace(0.5, 3, 8, dtype=np.float32).reshape(2, 4)

    def answer() -> np.ndarray:
        session = ort.InferenceSession(half.SerializeToString(), providers=["CPUExecutionProvider"])
        return session.run(None, {"x": values.astype(np.float16)})[0]

    assert not np.isfinite(answer()).all()  # as the converter leaves it
    casts = sum(node.op_type == "Cast" for node in half.graph.node)
    removed = join_wide(half)
    assert removed > 0
    assert sum(node.op_type == "Cast" for node in half.graph.node) == casts - removed
    names = [node.name for node in half.graph.node]
    assert len(names) == len(set(names))  # onnxruntime before 1.32 refuses others
    np.testing.assert_allclose(answer(), 8 * values, rtol=2e-3)
    assert join_wide(half) == 0


@pytest.mark.parametrize("name", ["decoder.feed.1.w_out", "feed.w_out"])
def test_a_feed_forward_output_beyond_half_precision_stays_right_in_fp16(
    tmp_path: Path, name: str
) -> None:
    """The residual stream takes it as it is, and a norm brings it back into range."""
    random = np.random.default_rng(0)
    tensors = {
        name: random.uniform(200, 400, (4, 4)).astype(np.float32),
        "norm": np.array(1e-5, np.float32),
        "w": random.standard_normal((4, 4)).astype(np.float32),
    }
    nodes = [
        helper.make_node("MatMul", ["x", name], ["out"], name="feed"),
        helper.make_node("Mul", ["out", "norm"], ["normed"], name="norm"),
        helper.make_node("MatMul", ["normed", "w"], ["y"], name="next"),
    ]
    info, full = helper.make_tensor_value_info, TensorProto.FLOAT
    graph = helper.make_graph(
        nodes, "g", [info("x", full, ["B", 4])], [info("y", full, ["B", 4])],
        [numpy_helper.from_array(value, key) for key, value in tensors.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, tmp_path / "g.onnx")
    half, figures = fp16_onnx(tmp_path / "g.onnx")
    assert figures == {"half_products": 1, "wide_products": 1}
    # onnxruntime's CPU kernels widen what they add up, so there an overflow need not show.
    types = {tensor.name: tensor.data_type for tensor in half.graph.initializer}
    assert types == {name: full, "norm": full, "w": TensorProto.FLOAT16}
    x = random.uniform(100, 200, (3, 4)).astype(np.float16)
    out = x.astype(np.float64) @ tensors[name]
    assert out.min() > 65504
    session = ort.InferenceSession(half.SerializeToString(), providers=["CPUExecutionProvider"])
    wanted = out * 1e-5 @ tensors["w"]
    np.testing.assert_allclose(session.run(None, {"x": x})[0], wanted, rtol=0.01, atol=0.02)


def test_fp16_puts_no_words_of_the_converter_into_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    info, full = helper.make_tensor_value_info, TensorProto.FLOAT
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="half"),
        helper.make_node("Mul", ["a", "w"], ["y"], name="wide"),  # the same weight, kept wide
    ]
    graph = helper.make_graph(
        nodes, "g", [info("x", full, [4, 4])], [info("y", full, [4, 4])],
        [numpy_helper.from_array(np.eye(4, dtype=np.float32), "w")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, tmp_path / "g.onnx")
    with caplog.at_level("INFO"):
        fp16_onnx(tmp_path / "g.onnx")
    assert caplog.messages == []
