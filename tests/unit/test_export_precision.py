"""Products with a matrix per head, in int8."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from exporter.precision import INT8, head_products, quantize_heads

HEADS, ROWS, WIDE, NARROW = 3, 4, 16, 5


def model_of(weight: np.ndarray) -> onnx.ModelProto:
    """x [3, 4, 16] -> x @ weight."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [HEADS, ROWS, WIDE])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [HEADS, ROWS, NARROW])
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="product")
    graph = helper.make_graph([node], "g", [x], [y], [numpy_helper.from_array(weight, "w")])
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
