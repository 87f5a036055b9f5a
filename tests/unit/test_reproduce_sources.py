"""Sources that `reproduce` builds: what must not be in them, and when they are taken again."""

from __future__ import annotations

import csv
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import pytest
from reproduce_toy import FIVE, sentence

from serve.errors import Failure, UserError
from trainer import hub
from trainer.reproduce import sources
from trainer.reproduce.config import ReproduceConfig
from trainer.reproduce.sources import downstream_texts, source_files
from trainer.tasks import PAPER_TASKS, Hub


def write_rows(path: Path, header: list[str], rows: list[list[Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writerows([header, *rows])


def write_yelp(folder: Path) -> list[list[Any]]:
    """A Yelp-5 whose stars one word tells; its rows."""
    generator = np.random.default_rng(2)
    rows = [
        [sentence(FIVE[i % 5], generator), i % 5, "test" if i % 4 == 0 else "train"]
        for i in range(300)
    ]
    write_rows(folder / "yelp5.csv", ["text", "label", "split"], rows)
    return rows


@pytest.fixture
def labels(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The configurations that `label` is called with, in place of calling it."""
    calls: list[Any] = []

    def fake(config: Any) -> None:
        calls.append(config)
        Path(config.out).write_text("a source")

    monkeypatch.setattr(sources, "run_label", fake)
    return calls


@pytest.fixture
def no_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """No downstream set can be had."""

    def fails(source: Hub, split: str | None, task: str) -> list[dict[str, Any]]:
        raise Failure("the hub does not answer")

    monkeypatch.setattr(hub, "load", fails)


def test_downstream_texts_do_not_get_into_a_source(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of every kind of file, of --tasks outside the paper's, and without the aspect before them."""
    data = tmp_path / "data"
    data.mkdir()
    yelp = write_yelp(data)
    generator = np.random.default_rng(3)
    corpus = [sentence(FIVE[i % 5], generator) for i in range(400)]
    corpus = [text for text in dict.fromkeys(corpus) if text not in {row[0] for row in yelp}]
    banned = corpus[:3]
    write_rows(data / "sst2.tsv", ["text", "label"], [[banned[0], 0], ["a film", 1]])
    opinions = [["LOCATION1", "price", banned[1], 0], ["LOCATION1", "food", "room", 1]]
    write_rows(data / "sentihood.csv", ["target", "aspect", "text", "label"], opinions)
    (tmp_path / "open.txt").write_text("\n".join([*corpus, yelp[0][0], yelp[1][0]]))
    config = ReproduceConfig(
        what="table1", tasks=["sst2", "yelp5"], data_dir=str(data), out=str(tmp_path / "out"),
        text=[str(tmp_path / "open.txt")],
    )  # fmt: skip
    files = source_files(config, ["text", "yelp"])
    found = parquet.read_table(files["text"])["text"].to_pylist()
    assert set(corpus[3:20]) & set(found)
    assert not {banned[0], banned[1], yelp[0][0], yelp[1][0]} & set(found)
    # MetaPT(Y) trains on Yelp-5: only what is measured on may not be in it.
    own = set(parquet.read_table(files["yelp"])["text"].to_pylist())
    tested = {row[0] for row in yelp if row[2] == "test"}
    trained = {row[0] for row in yelp if row[2] == "train"} - tested
    assert own and own <= trained
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert any("the texts of amazon2 are not excluded from the source" in w for w in warnings)
    assert not any("of sst2 are not" in w for w in warnings)


def test_sets_of_the_hub_are_excluded_with_all_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str | None] = []

    def rows(source: Hub, split: str | None, task: str) -> list[dict[str, Any]]:
        asked.append(split)
        return [
            {"title": "Fine", "content": "It lasts. Buy it.", "label": 1, "split": "train"},
            {"title": "Broken", "content": "Never again.", "label": 0, "split": "test"},
        ]

    monkeypatch.setattr(hub, "load", rows)
    assert downstream_texts("amazon2", None, None) == [
        "Fine. It lasts. Buy it.", "Broken. Never again.", "It lasts. Buy it.", "Never again.",
    ]  # fmt: skip
    assert set(asked) == {None}


def test_a_source_is_taken_again_only_with_the_flags_it_was_made_with(
    tmp_path: Path, labels: list[Any], no_sets: None
) -> None:
    def make(**flags: Any) -> dict[str, Path]:
        given = {"text": ["a.txt"], "out": str(tmp_path), "tasks": ["sst2"], **flags}
        return source_files(ReproduceConfig(what="table1", **given), ["text"])

    path = tmp_path / "sources/text.parquet"
    assert make() == {"text": path} and len(labels) == 1
    assert make(tasks=["sst5"], seeds=[7]) == {"text": path}  # the paper's tasks are always out
    for flags, message in (
        ({"text": ["b.txt"]}, "made with another --text: .* --source "),
        ({"data_dir": "data"}, "another --data-dir"),
        ({"tasks": ["vader-film-2"]}, "another --tasks"),
    ):
        with pytest.raises(UserError, match=message):
            make(**flags)
    assert len(labels) == 1 and path.read_text() == "a source"
    path.unlink()
    make(text=["b.txt"])  # as the message says
    assert labels[-1].corpus == ["b.txt"] and make(text=["b.txt"]) == {"text": path}
    with pytest.raises(UserError, match="--source is missing"):
        make(text=[])
    (tmp_path / "sources/text.request.json").unlink()
    with pytest.raises(UserError, match="flags that are not known"):
        make(text=["b.txt"])


def test_a_build_that_failed_is_not_bound_to_its_flags(
    tmp_path: Path, labels: list[Any], no_sets: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ReproduceConfig(what="table1", out=str(tmp_path), text=["a.txt"])
    with monkeypatch.context() as patch:
        patch.setattr(sources, "run_label", lambda config: (_ for _ in ()).throw(Failure("no")))
        with pytest.raises(Failure, match="no"):
            source_files(config, ["text"])
    config.text = ["b.txt"]
    source_files(config, ["text"])
    assert [call.corpus for call in labels] == [["b.txt"]]
    record = json.loads((tmp_path / "sources/text.request.json").read_text())
    assert record == {"text": ["b.txt"], "data_dir": None, "tasks": list(PAPER_TASKS)}
