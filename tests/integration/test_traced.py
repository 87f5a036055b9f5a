"""Graphs kept without weights, filled with a backbone's of the same geometry."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from exporter import traced
from exporter.export import export_bundle
from exporter.graph import ServedGraph
from serve.errors import Failure
from serve.files import read_json
from trainer.backbone import Backbone, load_backbone
from trainer.initial import initial_params
from trainer.prompt import Prompt, TaskRecord


@pytest.fixture
def other() -> Backbone:
    """A T5 of mini's geometry with every weight changed."""
    backbone = load_backbone("mini")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in backbone.t5.model.parameters():
            weight.mul_(1 + 0.3 * torch.randn(weight.shape, generator=generator))
    return backbone


def prompt_of(backbone: Any, tokens: int) -> Prompt:
    params = initial_params(backbone, "vocab", "prefix", tokens, 0)
    task = TaskRecord("film", ["no", "yes"], ["bad", "good"])
    return Prompt({name: value.detach() for name, value in params.items()}, task)


def test_kept_graphs_serve_other_weights_without_a_trace(
    tmp_path: Path, other: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("traced")

    monkeypatch.setattr(traced, "served_onnx", refuse)
    monkeypatch.setattr(traced, "prefix_onnx", refuse)
    # The export compares with torch itself and refuses a difference above 1e-4.
    bundle = export_bundle([prompt_of(other, 20)], other, tmp_path / "bundle")
    assert bundle.header["precisions"]["fp32"]["max_logit_difference"] < 1e-4
    with pytest.raises(AssertionError, match="traced"):  # the kept one is of 20 prompt tokens
        export_bundle([prompt_of(other, 21)], other, tmp_path / "longer")


def test_a_kept_graph_of_other_shapes_is_refused(
    tmp_path: Path, tiny_t5: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = load_backbone(str(tiny_t5))
    served = ServedGraph(backbone.t5, backbone.decoder_ids, "full", 4).eval()
    weight = onnx.TensorProto(name="shared", dims=[3, 32], data_type=1)
    model = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [], [weight]))
    folder = tmp_path / "graphs/tiny"
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    (folder / "graph.json").write_text(json.dumps(traced.geometry(served, backbone)))
    monkeypatch.setattr(traced, "FOLDER", tmp_path / "graphs")
    with pytest.raises(Failure, match=r"shared is \[3, 32\].*so that the graph is traced"):
        traced.served_graphs(served, backbone)


def test_a_graph_with_weights_folded_into_its_constants_is_not_kept(
    tmp_path: Path, tiny_t5: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folded = onnx.TensorProto(name="val_7", dims=[2, 2], data_type=1, raw_data=b"\0" * 16)
    model = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [], [folded]))
    monkeypatch.setattr(traced, "served_onnx", lambda _: model)
    with pytest.raises(Failure, match="val_7 was made of weights"):
        traced.save(load_backbone(str(tiny_t5)), "full", 4, tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_the_kept_graphs_are_those_of_the_modules() -> None:
    mini = load_backbone("mini")
    served = ServedGraph(mini.t5, mini.decoder_ids, "prefix", 20)
    kept = [read_json(path) for path in traced.FOLDER.glob(f"*/{traced.GEOMETRY}")]
    advice = "what the graphs compute may have changed: run python -m exporter.traced"
    assert traced.geometry(served, mini) in kept, advice
