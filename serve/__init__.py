"""Serving of soft-prompt bundles with onnxruntime: no torch, no transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from serve.classifier import Classifier, Result

__all__ = ["Classifier", "Result"]


def __getattr__(name: str) -> Any:
    # On first use: the trainer imports serve.errors, and needs no onnxruntime for it.
    if name in __all__:
        from serve import classifier

        return getattr(classifier, name)
    raise AttributeError(f"module 'serve' has no attribute '{name}'")
