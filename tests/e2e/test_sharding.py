"""A backbone divided over processes gives the whole one's gradients and prompts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from accelerate_runs import launch, toy_clusters
from safetensors.torch import load_file
from transformers import T5ForConditionalGeneration

from serve.errors import UserError
from trainer.configs import FinetuneConfig
from trainer.parallel import Workers
from trainer.sharding import Shards, divide

# Gradients of equation 2 in float64, of the whole backbone and of the divided one.
GRADIENTS = """
import json, sys, torch
from trainer.backbone import load_backbone
from trainer.meta import outer_gradient
from trainer.modes import deepen
from trainer.parallel import workers
from trainer.readout import collate
from trainer.rows import Scorer

folder, out = sys.argv[1:]
team, found = workers(), {}
torch.manual_seed(0)
rows = [torch.randint(3, 60, (size,)).tolist() for size in (9, 3, 5, 4, 8, 2, 3, 4, 5, 6, 2, 9)]
batches = [collate(part, [0, 1] * 3) for part in (rows[:6], rows[6:])]
start = {"prompt_embeddings": torch.randn(5, 32, dtype=torch.float64)}
load = lambda **more: load_backbone(folder, dtype=torch.float64, **more)
whole, part = load(), load(shards=team.shards)
for mode in ("full", "prefix", "deep"):
    gradients = []
    for backbone in (whole, part):
        params = deepen(backbone.t5, start) if mode == "deep" else start
        params = {name: value.clone().requires_grad_() for name, value in params.items()}
        scorer = Scorer(backbone, ["good", "bad"], mode)
        outer_gradient(scorer, params, *batches, 3, inner_rate=1.0)
        gradients.append({name: value.grad for name, value in params.items()})
    for name, expected in gradients[0].items():
        error = (gradients[1][name] - expected).abs().max() / expected.abs().max()
        found[f"{mode} {name}"] = float(error)
sizes = [sum(w.numel() for w in b.t5.model.encoder.block.parameters()) for b in (whole, part)]
if team.main:
    json.dump({"errors": found, "sizes": sizes}, open(out, "w"))
team.wait()
"""


@pytest.fixture(scope="module")
def clusters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_clusters(tmp_path_factory.mktemp("data") / "clusters.parquet")


@pytest.mark.parametrize(("kind", "processes"), [("v1.0", 2), ("v1.1", 4)])
def test_second_order_gradients_are_those_of_the_whole(
    tiny_t5: Path, tiny_t5_v11: Path, tmp_path: Path, kind: str, processes: int
) -> None:
    script, out = tmp_path / "gradients.py", tmp_path / "found.json"
    script.write_text(GRADIENTS)
    folder = tiny_t5 if kind == "v1.0" else tiny_t5_v11
    done = launch(processes, folder, out, script=script, divided=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert set(found["errors"]) == {
        "full prompt_embeddings", "prefix prompt_embeddings", "deep kv", "deep states"
    }  # fmt: skip
    assert max(found["errors"].values()) < 1e-12, found["errors"]
    whole, part = found["sizes"]
    assert part < whole / processes * 1.05  # norms are in all of them


def test_meta_on_a_divided_backbone_ends_with_the_same_prompt(
    tiny_t5: Path, clusters: Path, tmp_path: Path
) -> None:
    flags = [
        "meta", "--data", clusters, "--backbone", tiny_t5, "--prompt-tokens", 3, "--steps", 6,
        "--evaluate-every", 3, "--mode", "deep", "--inner-rate", 1, "--device", "auto", "--out",
    ]  # fmt: skip
    prompts = []
    for count in (1, 2):
        done = launch(count, *flags, tmp_path / str(count), divided=True)
        assert done.returncode == 0, done.stderr
        assert ("each with a part of the backbone" in done.stderr) == (count > 1)
        (file,) = (tmp_path / str(count)).glob("*.safetensors")
        prompts.append(load_file(file))
    # AdamW divides by the root of the squared gradient, so rounding is not scaled down with it.
    torch.testing.assert_close(prompts[1], prompts[0], atol=2e-5, rtol=1e-5)


def test_heads_that_cannot_be_divided_evenly_are_refused(tiny_t5: Path) -> None:
    model = T5ForConditionalGeneration.from_pretrained(tiny_t5)
    with pytest.raises(UserError, match="4 heads cannot be divided evenly over 3"):
        divide(model, Shards(0, 3, lambda tensor: tensor))


@pytest.mark.parametrize(
    ("name", "value"),
    [("PARALLELISM_CONFIG_TP_SIZE", "2"), ("PARALLELISM_CONFIG_DP_SHARD_SIZE", "2")],
)
def test_a_backbone_is_divided_over_all_processes_or_none(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv("PARALLELISM_CONFIG_TP_SIZE", "4")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="--parallelism_config_tp_size 4"):
        Workers()


def test_full_tuning_of_a_divided_backbone_is_refused(
    tiny_t5: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    team = Workers()
    team.shards = Shards(0, 2, lambda tensor: tensor)
    monkeypatch.setattr("trainer.parallel.workers", lambda: team)
    config = FinetuneConfig(backbone=str(tiny_t5), out="out")
    with pytest.raises(UserError, match="full tuning trains the backbone's weights"):
        config.load_backbone(trainable=True)
