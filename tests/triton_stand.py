"""Stands in for Triton in the tests: runs an ensemble of a model repository, request by request.

It obeys the configurations as Triton does: types and shapes of every tensor are checked against
them, tensors go from step to step by the ensemble's maps, and an input is reshaped where its
configuration says so.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from google.protobuf import text_format

from serve.classifier import Classifier

NUMPY = {
    "TYPE_INT64": np.int64, "TYPE_FP32": np.float32, "TYPE_FP16": np.float16,
    "TYPE_BOOL": np.bool_, "TYPE_STRING": np.object_,
}  # fmt: skip


TEXTS = [
    "", "good film", "bad", "very long " * 60, "</s> <extra_id_0> great", "ünïcode 😀",
    "the food was nice " * 5,
]  # fmt: skip


def schema() -> Any:
    """Triton's compiled schema, without the rest of its client, which wants gRPC."""
    found = importlib.util.find_spec("tritonclient")
    if found is None or not found.submodule_search_locations:
        pytest.skip("needs the package tritonclient for Triton's schema")
    path = Path(found.submodule_search_locations[0]) / "grpc" / "model_config_pb2.py"
    name = "tritonclient.grpc.model_config_pb2"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[name] = module
    return sys.modules[name]


def read_config(folder: Path) -> Any:
    """`config.pbtxt` as Triton parses it; an unknown field or enum is an error."""
    return text_format.Parse((folder / "config.pbtxt").read_text("utf-8"), schema().ModelConfig())


class TritonError(Exception):
    pass


class Tensor:
    def __init__(self, name: str, value: np.ndarray) -> None:
        self.name, self._value = name, value

    def as_numpy(self) -> np.ndarray:
        return self._value


class InferenceResponse:
    def __init__(self, output_tensors: list[Tensor] | None = None, error: Any = None) -> None:
        self.tensors, self.error = output_tensors or [], error


def backend_utils() -> types.ModuleType:
    """What the Python backend gives to its models."""
    module = types.ModuleType("triton_python_backend_utils")
    vars(module).update(
        Tensor=Tensor,
        TritonError=TritonError,
        InferenceResponse=InferenceResponse,
        get_input_tensor_by_name=lambda request, name: Tensor(name, request[name]),
    )
    return module


class Triton:
    """A loaded repository."""

    def __init__(self, repository: Path) -> None:
        self.configs = {item.name: read_config(item) for item in repository.iterdir()}
        self.models: dict[str, Any] = {}
        for name, config in self.configs.items():
            assert config.name == name  # Triton refuses another
            version = repository / name / "1"
            assert version.is_dir()
            if config.backend == "python":
                self.models[name] = self._python(version)
            elif config.backend == "onnxruntime":
                options = ort.SessionOptions()
                options.intra_op_num_threads = 1
                self.models[name] = ort.InferenceSession(str(version / "model.onnx"), options)

    @staticmethod
    def _python(version: Path) -> Any:
        sys.modules["triton_python_backend_utils"] = backend_utils()
        sys.path.append(str(version))  # as the Python backend does
        try:
            spec = importlib.util.spec_from_file_location("model", version / "model.py")
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        finally:
            sys.path.remove(str(version))
            for name in [n for n in sys.modules if n.split(".")[0] == "metapt_text"]:
                del sys.modules[name]
            del sys.modules["triton_python_backend_utils"]
        model = module.TritonPythonModel()
        model.initialize({"model_repository": str(version.parent), "model_version": "1"})
        return model

    def infer(self, name: str, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Run a model or an ensemble on one request.

        Raises:
            TritonError: as a model answered.
        """
        config = self.configs[name]
        self._check(config.input, inputs)
        if config.platform == "ensemble":
            outputs = self._ensemble(config, inputs)
        elif config.backend == "python":
            (response,) = self.models[name].execute([inputs])
            if response.error is not None:
                raise response.error
            outputs = {tensor.name: tensor.as_numpy() for tensor in response.tensors}
        else:
            feed = dict(inputs)
            for item in config.input:
                if item.HasField("reshape"):
                    rows = len(feed[item.name])
                    feed[item.name] = feed[item.name].reshape(rows, *item.reshape.shape)
            wanted = [item.name for item in config.output]
            outputs = dict(zip(wanted, self.models[name].run(wanted, feed), strict=True))
        self._check(config.output, outputs)
        return outputs

    def _ensemble(self, config: Any, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        pool = dict(inputs)
        for step in config.ensemble_scheduling.step:
            given = {key: pool[value] for key, value in step.input_map.items()}
            outputs = self.infer(step.model_name, **given)
            pool |= {value: outputs[key] for key, value in step.output_map.items()}
        return {item.name: pool[item.name] for item in config.output}

    @staticmethod
    def _check(wanted: Any, given: dict[str, np.ndarray]) -> None:
        kinds = schema().DataType
        assert {item.name for item in wanted} == set(given)
        for item in wanted:
            value = given[item.name]
            assert value.dtype == NUMPY[kinds.Name(item.data_type)], item.name
            assert value.ndim == 1 + len(item.dims), item.name
            for size, dim in zip(value.shape[1:], item.dims, strict=True):
                assert dim in (-1, size), item.name


def column(values: list[str] | list[bytes]) -> np.ndarray:
    """Texts as a BYTES tensor [n, 1]."""
    raw = [value.encode() if isinstance(value, str) else value for value in values]
    return np.array(raw, np.object_)[:, None]


def assert_answers(server: Any, folder: Path, precision: str = "fp32") -> None:
    """The ensemble's answers are the classifier's, for every text and task in one request.

    server: has `infer`; folder: of the bundle.
    """
    classifier = Classifier(folder, precision, threads=1)
    names = list(classifier.tasks)
    texts = [text for text in TEXTS for _ in names]
    tasks = names * len(TEXTS)
    wanted = classifier.classify(texts, tasks)
    got = server.infer("metapt", TEXT=column(texts), TASK=column(tasks))
    tolerance = 1e-5 if precision == "fp32" else 1e-2
    for row, result in enumerate(wanted):
        assert got["LABEL"][row, 0].decode() == result.label
        assert got["SCORE"][row, 0] == pytest.approx(result.score, abs=tolerance)
        assert bool(got["TRUNCATED"][row, 0]) == result.truncated
        probabilities = list(result.probabilities.values())
        padding = [0.0] * (got["PROBABILITIES"].shape[1] - len(probabilities))
        assert got["PROBABILITIES"][row] == pytest.approx(probabilities + padding, abs=tolerance)
    assert got["TRUNCATED"].any() and not got["TRUNCATED"].all()
