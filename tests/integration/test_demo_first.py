"""Which bundle the demo shows when none is named, and the one it makes at its first start."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from demo import bundles
from demo.first import FirstConfig, make, shipped_tasks, starts
from demo.state import Room
from serve.classifier import Classifier
from serve.errors import Failure
from serve.files import sha256
from trainer.backbone import load_backbone
from trainer.shipped import load_shipped


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("METAPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def quickstart(folder: Path, digest: str) -> None:
    bundle = folder / bundles.QUICKSTART
    bundle.mkdir(parents=True)
    document = {"backbone": {"id": "mini", "sha256": digest}}
    (bundle / "bundle.json").write_text(json.dumps(document))


def test_the_named_bundle_comes_first_then_the_quickstarts(cache: Path, tmp_path: Path) -> None:
    quickstart(tmp_path, sha256(bundles.MINI / "model.safetensors"))
    assert bundles.find_bundle("some/bundle")() == Path("some/bundle")
    assert bundles.find_bundle(None)() == bundles.QUICKSTART


def test_a_quickstart_of_another_mini_is_not_shown(cache: Path, tmp_path: Path) -> None:
    quickstart(tmp_path, "0" * 64)
    assert bundles.from_quickstart() is None


def test_a_bundle_that_was_made_before_is_used_until_the_backbone_changes(
    cache: Path, tmp_path: Path
) -> None:
    made = bundles.shipped() / "bundle"
    made.mkdir(parents=True)
    (made / "bundle.json").write_text("{}")
    assert bundles.find_bundle(None)() == made
    other = tmp_path / "other"
    other.mkdir()
    (other / "model.safetensors").write_bytes(b"other weights")
    assert bundles.shipped(other) != bundles.shipped()
    before = bundles.shipped(other)
    (other / "metapt_start").mkdir()
    (other / "metapt_start" / "adapter_model.safetensors").write_bytes(b"a start")
    assert bundles.shipped(other) != before


def test_a_bundle_that_cannot_be_made_is_told(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(Failure, match="python -m demo BUNDLE"):
        bundles.find_bundle(None)()


def test_the_first_bundle_holds_what_ships_and_nothing_is_trained(tmp_path: Path) -> None:
    make(FirstConfig(out=str(tmp_path / "first")))
    room = Room(Classifier(tmp_path / "first" / "bundle", threads=1, spin=False))
    backbone = load_backbone("mini")
    tasks = shipped_tasks(backbone)
    assert room.main_tasks() == list(tasks) and len(tasks) >= 5
    begin = starts(backbone, 20)
    assert set(room.lesson_starts()) == ({"metapt"} if "metapt" in begin else set(tasks))
    for name in tasks:
        assert room.bundled[name].labels == tasks[name].task.words
        assert room.bundled[name].info["method"] == "shipped"
    # The served prompt is the file's.
    words = tasks["opposite"].task.words
    shipped = load_shipped(backbone, f"polarity:{','.join(words)}").params["prompt_embeddings"]
    served = room.classifier.bundle.read_prompt(room.bundled["opposite"])["prompt_embeddings"]
    assert abs(served - shipped.numpy()).max() < 1e-6
    assert {"words", "curves"} <= set(
        json.loads((tmp_path / "first" / "bundle" / "bonnet.json").read_text())
    )


def test_a_backbone_without_prompts_has_nothing_to_show(tiny_t5: Path, tmp_path: Path) -> None:
    with pytest.raises(Failure, match="ships no prompts to show: name a bundle"):
        make(FirstConfig(out=str(tmp_path / "first"), backbone=str(tiny_t5)))
    assert not (tmp_path / "first").exists()
