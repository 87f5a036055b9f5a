"""How onnxruntime runs a bundle on a GPU: where its nodes are, and a run as a CUDA graph."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from benchmarks.serving import Side
from serve.classifier import Classifier
from serve.engine import CPU, CUDA, PROVIDER_OPTIONS, on_device
from serve.tokenize import Encoded


def feed_of(classifier: Classifier, batch: list[Encoded]) -> dict[str, ort.OrtValue]:
    """What the graph is given for a batch."""
    engine, seen = classifier._engine, {}
    run = engine.run
    engine.run = lambda feed, **more: seen.update(feed) or run(feed, **more)  # type: ignore
    try:
        classifier.logits(batch)
    finally:
        del engine.run
    return {name: seen[name] for name in engine.inputs}


def placement(classifier: Classifier, batch: list[Encoded], work: Path) -> dict[str, Any]:
    """Nodes of a run by provider and by what they are: what is left to the CPU, what is copied."""
    engine, options, runs = classifier._engine, ort.SessionOptions(), 3
    options.enable_profiling = True
    options.profile_file_prefix = str(work / "profile")
    options.log_severity_level = 3
    providers = [(p, PROVIDER_OPTIONS.get(p, {})) for p in engine._session.get_providers()]
    session = ort.InferenceSession(str(engine.graph), options, providers=providers)
    for _ in range(runs):
        session.run_with_ort_values(engine.outputs, feed_of(classifier, batch))
    path = Path(session.end_profiling())
    events = json.loads(path.read_text("utf-8"))
    path.unlink()
    nodes = [e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
    count = Counter((e["args"]["provider"], e["args"]["op_name"]) for e in nodes)
    found: dict[str, Any] = {"nodes": {}, "kinds": {}}
    for (provider, kind), number in count.most_common():
        found["nodes"][provider] = found["nodes"].get(provider, 0) + number // runs
        found["kinds"].setdefault(provider, {})[kind] = number // runs
    copies = sum(n for (_, kind), n in count.items() if kind.startswith("Memcpy")) // runs
    return {**found, "memcpy": copies}


def graphed(classifier: Classifier, batch: list[Encoded]) -> Side:
    """A batch at its fixed shape as one CUDA graph: text copied in, logits copied out."""
    feed, engine = feed_of(classifier, batch), classifier._engine
    options = ort.SessionOptions()
    options.log_severity_level = 3
    for item in engine._session.get_inputs():
        for name, size in zip(item.shape, feed[item.name].shape(), strict=True):
            if isinstance(name, str):
                options.add_free_dimension_override_by_name(name, size)
    settings = {**PROVIDER_OPTIONS[CUDA], "enable_cuda_graph": "1"}
    session = ort.InferenceSession(
        str(engine.graph), options, providers=[(CUDA, settings), CPU], enable_fallback=0
    )
    binding, there = session.io_binding(), {}
    text = {name: value.numpy() for name, value in feed.items() if value.device_name() == "cpu"}
    for name, value in feed.items():
        there[name] = on_device(value.numpy(), "cuda")
        binding.bind_ortvalue_input(name, there[name])
    kind = engine._session.get_outputs()[0].type
    dtype = np.float16 if "float16" in kind else np.float32
    shape = [len(batch), feed["label_ids"].shape()[1]]
    out = ort.OrtValue.ortvalue_from_shape_and_type(shape, dtype, "cuda", 0)
    binding.bind_ortvalue_output(engine.outputs[0], out)

    def run() -> np.ndarray:
        for name, value in text.items():
            there[name].update_inplace(value)
        session.run_with_iobinding(binding)
        return out.numpy().astype(np.float32)

    return run
