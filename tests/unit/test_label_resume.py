"""`label` that was stopped: what it goes on with, and what it does not."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest
from label_toy import csv, reviews, write_material

from trainer import label
from trainer.label import LabelConfig, run_label
from trainer.reservoir import Reservoir


@pytest.fixture
def material(tmp_path: Path) -> dict[str, Any]:
    return write_material(tmp_path)


def test_a_killed_run_ends_as_one_that_was_not(
    material: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_label(LabelConfig(**{**material, "out": str(tmp_path / "whole.parquet")}))
    monkeypatch.setattr(label, "_CHECKPOINT_SECONDS", 0.0)
    add, calls = Reservoir.add, []

    def dying(self: Reservoir, *arguments: Any) -> None:
        calls.append(len(arguments[0]))
        if len(calls) == 6:
            raise KeyboardInterrupt
        add(self, *arguments)

    monkeypatch.setattr(Reservoir, "add", dying)
    with pytest.raises(KeyboardInterrupt):
        run_label(LabelConfig(**material))
    assert not Path(material["out"]).exists()
    run_label(LabelConfig(**material))
    assert sum(calls) - calls[5] == 801  # five chunks, then the rest: none twice
    found, whole = (
        parquet.read_table(path) for path in (material["out"], tmp_path / "whole.parquet")
    )
    assert found.equals(whole)
    assert sorted(p.name for p in Path(material["out"]).parent.iterdir()) == [
        "sure.parquet", "sure.run.json",
    ]  # fmt: skip


@pytest.fixture
def stopped(
    material: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """The material, and a checkpoint of a run over it that ended after three chunks."""
    flags = {**material, "exclude": [str(csv(tmp_path / "banned.csv", [("A text.", "bad")]))]}
    monkeypatch.setattr(label, "_CHECKPOINT_SECONDS", 0.0)
    add, calls = Reservoir.add, []

    def dying(self: Reservoir, *arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        add(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Reservoir, "add", dying)
        with pytest.raises(KeyboardInterrupt):
            run_label(LabelConfig(**flags))
    return flags


@pytest.mark.parametrize("change", ["labels", "names", "rows", "excluded"])
def test_what_another_classifier_annotated_is_not_gone_on_with(
    stopped: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture, change: str
) -> None:
    rows = reviews(300)
    if change == "labels":  # that were the wrong way round, say
        rows = [(text, {"bad": "good", "good": "bad"}[mood]) for text, mood in rows]
    elif change == "names":
        rows = [(text, {"bad": "awful", "good": "great"}[mood]) for text, mood in rows]
    elif change == "rows":
        rows = rows[:200]
    csv(tmp_path / "reviews.csv", rows)
    if change == "excluded":
        csv(tmp_path / "banned.csv", [("Another text.", "bad")])
    caplog.set_level(logging.INFO)
    run_label(LabelConfig(**stopped))
    assert "is of a run with other settings or data: it is not continued but rep" in caplog.text
    assert "going on after" not in caplog.text
    record = json.loads(Path(stopped["out"]).with_suffix(".run.json").read_text())
    assert record["sentences"] == 801


def test_the_same_command_goes_on(
    stopped: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    run_label(LabelConfig(**stopped))
    assert "going on after 192 sentences" in caplog.text
