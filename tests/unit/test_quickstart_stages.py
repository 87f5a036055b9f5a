"""The quick start's stages: what is made again when an option changes."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from trainer.quickstart import STARTS, TASKS, Files, QuickstartConfig, _export, _train
from trainer.runs import write_record


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The stages' results in the order in which they are written, by stand-ins that only write."""
    names: list[str] = []

    def stand_in(config: Any) -> None:
        out = Path(config.out)
        names.append(out.name)
        if out.suffix:
            out.write_text("rows")
            write_record(out.with_suffix(".run.json"), "stage", config)
        else:
            out.mkdir(exist_ok=True)
            write_record(out, "stage", config)

    def source(files: Files, config: Any) -> None:
        files.rated.write_text("rows")
        stand_in(config)

    monkeypatch.setattr("trainer.quickstart.write_source", source)
    for place in ("label.run_label", "cluster.run_cluster", "source.run_meta", "tune.run_tune"):
        monkeypatch.setattr(f"trainer.{place}", stand_in)
    return names


TUNED = ["vader-product-2-from-metapt", "vader-tweet-2-from-metapt"]
RANDOM = ["vader-product-2-from-random", "vader-tweet-2-from-random"]


@pytest.mark.parametrize(
    ("change", "again"),
    [
        ({}, []),
        ({"test_rows": 7}, []),
        ({"meta_steps": 7}, ["metapt", *TUNED]),
        ({"clusters": 7}, ["clusters.parquet", "metapt", *TUNED]),
        ({"sentences": 70}, ["labelled.parquet", "clusters.parquet", "metapt", *TUNED]),
        ({"epochs": 7}, [*TUNED, *RANDOM]),
        (
            {"seed": 7},
            ["open_text.txt", "labelled.parquet", "clusters.parquet", "metapt", *TUNED, *RANDOM],
        ),
    ],
)
def test_a_changed_option_makes_again_what_it_decides(
    made: list[str], tmp_path: Path, change: dict[str, Any], again: list[str]
) -> None:
    config = QuickstartConfig(out=str(tmp_path))
    _train(config, Files(tmp_path))
    assert len(made) == 8
    made.clear()
    _train(replace(config, **change), Files(tmp_path))
    assert sorted(made) == sorted(again)
    made.clear()
    _train(replace(config, **change), Files(tmp_path))
    assert made == []


def test_a_stage_that_was_cut_off_before_the_next_is_followed_by_it(
    made: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = QuickstartConfig(out=str(tmp_path))
    _train(config, Files(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr("trainer.cluster.run_cluster", lambda config: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            _train(replace(config, sentences=70), Files(tmp_path))
    made.clear()
    _train(replace(config, sentences=70), Files(tmp_path))
    assert made == ["clusters.parquet", "metapt", *TUNED]


def test_a_change_of_the_model_behind_a_name_makes_again_what_rests_on_it(
    made: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of_weights(config: Any) -> None:
        out = Path(config.out)
        made.append(out.name)
        out.mkdir(exist_ok=True)
        write_record(out, "stage", config, backbone_sha256=weights[0])

    weights = ["old"]
    for place in ("source.run_meta", "tune.run_tune"):
        monkeypatch.setattr(f"trainer.{place}", of_weights)
    monkeypatch.setattr("trainer.backbone.weights_hash", lambda folder: weights[0])
    config = QuickstartConfig(out=str(tmp_path))
    _train(config, Files(tmp_path))
    made.clear()
    _train(config, Files(tmp_path))
    assert made == []
    weights[0] = "new"
    _train(config, Files(tmp_path))
    assert sorted(made) == sorted(["metapt", *TUNED, *RANDOM])


def test_a_bundle_without_its_bonnet_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = Files(tmp_path)
    prompts = [files.prompt(task, start) for task in TASKS for start in STARTS] + [files.metapt]
    for prompt in prompts:
        prompt.mkdir()
        (prompt / "task.json").write_text("{}")
        os.utime(prompt / "task.json", (1, 1))
    files.bundle.mkdir()
    (files.bundle / "bundle.json").write_text("{}")
    exported: list[Any] = []
    monkeypatch.setattr("trainer.backbone.load_backbone", lambda name: None)
    monkeypatch.setattr("exporter.export.export_bundle", lambda *a, **k: exported.append(a))
    monkeypatch.setattr("trainer.tables.iterate_rows", lambda *_: [])
    monkeypatch.setattr("trainer.embed.embed", lambda texts, quiet: None)
    monkeypatch.setattr("trainer.bonnet.write_bonnet",
                        lambda bundle, *_: (bundle / "bonnet.json").write_text("{}"))  # fmt: skip
    for _ in range(2):  # the second time all is there
        _export(QuickstartConfig(out=str(tmp_path)), files)
        assert len(exported) == 1
