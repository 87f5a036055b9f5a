"""The quick start's stages: what is made again when an option changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from trainer.quickstart import Files, QuickstartConfig, _train
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
