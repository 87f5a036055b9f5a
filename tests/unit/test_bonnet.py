"""What the demo shows under the bonnet: words, curves and the map."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from serve.errors import Failure, UserError
from trainer.backbone import load_backbone
from trainer.bonnet import cluster_map, nearest_words, read_curve, write_bonnet
from trainer.prompt import Prompt, TaskRecord


def test_a_prompt_of_words_is_read_as_these_words(tiny_t5: Path) -> None:
    backbone = load_backbone(str(tiny_t5))
    words = ["great", "food", "bad"]
    ids = [backbone.tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in words]
    table = backbone.t5.model.shared.weight.detach()
    prompt = Prompt({"prompt_embeddings": 3.0 * table[ids]}, TaskRecord())  # a cosine has no scale
    found = nearest_words(prompt, backbone, count=4)
    assert [token["position"] for token in found] == [0, 1, 2]
    for token, word, number in zip(found, words, ids, strict=True):
        assert token["words"][0] == [word, 1.0]
        cosines = torch.cosine_similarity(table[number][None], table, dim=1)
        cosines[backbone.tokenizer.all_special_ids] = -2
        want = cosines.sort(descending=True).values[:4].tolist()
        assert [value for _, value in token["words"]] == pytest.approx(want, abs=6e-4)


def test_curves_are_what_was_measured(tmp_path: Path) -> None:
    lines = [
        {"step": 0, "validation_loss": 0.7, "validation_accuracy": 0.5, "seconds": 1.0},
        {"step": 2, "loss": 0.6, "accuracy": None},
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    assert read_curve(tmp_path) == [
        {"step": 0, "validation_loss": 0.7, "validation_accuracy": 0.5},
        {"step": 2, "loss": 0.6},
    ]
    assert read_curve(tmp_path / "none") == []
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"st')
    with pytest.raises(Failure, match=r"metrics\.jsonl is damaged .*: train the prompt again"):
        read_curve(tmp_path)


def test_the_map_keeps_each_text_with_its_place(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    clusters = np.arange(60) % 2
    vectors = np.where(clusters[:, None] == 1, 5.0, -5.0) + rng.normal(0, 0.1, (60, 64))
    rows = [
        json.dumps({"text": f"{i} " + "x" * (300 if i == 7 else 3), "label": i % 3, "cluster": c})
        for i, c in enumerate(clusters.tolist())
    ]
    path = tmp_path / "c.jsonl"
    path.write_text("\n".join(rows) + "\n")
    found = cluster_map(path, vectors, 40, seed=3)
    assert {len(column) for column in found.values()} == {40}
    numbers = [int(text.split()[0]) for text in found["texts"]]
    assert len(set(numbers)) == 40
    assert found["clusters"] == [n % 2 for n in numbers]
    assert found["labels"] == [str(n % 3) for n in numbers]
    assert all(len(text) <= 202 for text in found["texts"])
    # Two far groups stay two: any point is nearer to its own group's centre.
    places = np.stack([found["x"], found["y"]], 1)
    own = np.array(found["clusters"])
    centres = np.stack([places[own == c].mean(0) for c in (0, 1)])
    nearest = ((places[:, None] - centres) ** 2).sum(2).argmin(1)
    assert np.array_equal(nearest, own)
    with pytest.raises(UserError, match=r"59 embeddings, but .* has 60 rows"):
        cluster_map(path, vectors[:59], 40, seed=3)
    path.write_text("\n".join(rows[:4]) + "\n")
    with pytest.raises(UserError, match="has 4 rows: too few for a map"):
        cluster_map(path, vectors[:4], 40, seed=3)
    write_bonnet(tmp_path)
    assert json.loads((tmp_path / "bonnet.json").read_text()) == {"format": 1}
