"""Compiling prompts: one ONNX graph for any number of tasks, and the bundle around it."""

import serve  # noqa: F401 - before onnxruntime: it turns its reports off
