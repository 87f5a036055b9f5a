"""Compiling prompts: one ONNX graph for any number of tasks, and the bundle around it."""
