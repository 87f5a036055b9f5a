"""Triton's onnxruntime backend for the tests: the same graph, run from Python.

Triton takes a `model.py` in a backend's folder for a backend written in Python. The package that
brings the server brings no backend for ONNX. Every run's batch is written down as a line of
`runs.txt` beside the model: the task numbers of its rows.
"""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """What the server calls."""

    def initialize(self, args):
        folder = Path(args["model_repository"])
        config = json.loads(args["model_config"])
        options = onnxruntime.SessionOptions()
        threads = config["parameters"]["intra_op_thread_count"]["string_value"]
        options.intra_op_num_threads = int(threads)
        path = folder / args["model_version"] / "model.onnx"
        self.session = onnxruntime.InferenceSession(str(path), options)
        self.inputs = [item.name for item in self.session.get_inputs()]
        self.outputs = [item["name"] for item in config["output"]]
        self.runs = folder / "runs.txt"

    def execute(self, requests):
        # The batcher hands over requests of one shape; the backend makes one batch of them.
        given = [
            {name: pb_utils.get_input_tensor_by_name(r, name).as_numpy() for name in self.inputs}
            for r in requests
        ]
        feed = {name: np.concatenate([item[name] for item in given]) for name in self.inputs}
        with self.runs.open("a") as file:
            file.write(" ".join(map(str, feed["task_id"].tolist())) + "\n")
        results = self.session.run(self.outputs, feed)
        ends = np.cumsum([len(item["task_id"]) for item in given])[:-1]
        parts = zip(*(np.split(result, ends) for result in results), strict=True)
        return [
            pb_utils.InferenceResponse(
                [pb_utils.Tensor(n, p) for n, p in zip(self.outputs, part, strict=True)]
            )
            for part in parts
        ]
