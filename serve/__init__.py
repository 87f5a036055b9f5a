"""Serving of soft-prompt bundles with onnxruntime: no torch, no transformers."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

# From 1.29 on onnxruntime's own packages report models and runs to their maker, and keep an id of
# the device, unless this is set before they are imported (onnxruntime#27379).
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from serve.classifier import Classifier, Result

__all__ = ["Classifier", "Result"]


def __getattr__(name: str) -> Any:
    # On first use: the trainer imports serve.errors, and needs no onnxruntime for it.
    if name in __all__:
        from serve import classifier

        return getattr(classifier, name)
    raise AttributeError(f"module 'serve' has no attribute '{name}'")
