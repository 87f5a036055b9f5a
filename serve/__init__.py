"""Serving of soft-prompt bundles with onnxruntime: no torch, no transformers."""
