"""The whole path on made-up sentences: label, cluster, meta, tune, export, serve."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest

from serve.cli import run
from trainer.__main__ import commands
from trainer.backbone import load_backbone
from trainer.data import load_task
from trainer.evaluate import evaluate
from trainer.prompt import load_prompt
from trainer.tables import iterate_rows
from trainer.vader import CACHE_NAME

NOUNS = ["film", "food", "story", "room", "plot", "acting", "service"]
WORDS = {-2.0: ["bad", "awful", "terrible"], 2.0: ["good", "great", "positive"]}


def write_sentences(folder: Path) -> None:
    """A cache of rated sentences, so that nothing is fetched."""
    generator = np.random.default_rng(0)
    rows: dict[str, list[object]] = {"domain": [], "mean": [], "text": []}
    for domain in ("film", "product", "tweet", "editorial"):
        for number in range(260):
            mean = float(generator.choice([-2.0, 2.0]))
            first, second = generator.choice(NOUNS, 2, replace=False)
            text = f"this {first} {number} and that {second} was {generator.choice(WORDS[mean])}"
            for name, value in (("domain", domain), ("mean", mean), ("text", text)):
                rows[name].append(value)
    folder.mkdir()
    parquet.write_table(arrow.table(rows), folder / CACHE_NAME)


def test_quickstart(
    tiny_t5: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_sentences(tmp_path / "cache")
    monkeypatch.setenv("METAPT_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "out"
    argv = [
        "quickstart", "--backbone", str(tiny_t5), "--out", str(out), "--prompt-tokens", "4",
        "--sentences", "60", "--clusters", "2", "--meta-steps", "3", "--epochs", "4",
        "--test-rows", "30",
    ]  # fmt: skip
    assert run("python -m trainer", "", commands(argv), argv) == 0, capsys.readouterr().err
    shown = capsys.readouterr().out
    assert "MetaPT start" in shown and "python -m demo" in shown

    # No sentence that a prompt is tuned or tested on was in the source data.
    source = {row["text"] for _, row in iterate_rows(out / "clusters.parquet", ["text"])}
    for task in ("vader-product-2", "vader-tweet-2"):
        assert not source & set(load_task(task).texts)

    # What onnxruntime served is what the trainer measures in torch.
    report = json.loads((out / "report.json").read_text())
    backbone = load_backbone(str(tiny_t5))
    for task, row in report["tasks"].items():
        examples = load_task(task, "test").sample(30, 1)
        for start in ("metapt", "random"):
            prompt = load_prompt(out / f"{task}-from-{start}")
            want = evaluate(backbone, prompt.task, prompt.params, examples)["accuracy"]
            assert row[start] == pytest.approx(want)

    # A second run finds everything there and reports the same.
    before = (out / "bundle" / "bundle.json").read_bytes()
    assert run("python -m trainer", "", commands(argv), argv) == 0
    assert (out / "bundle" / "bundle.json").read_bytes() == before
    again = json.loads((out / "report.json").read_text())
    for task, row in report["tasks"].items():
        assert again["tasks"][task]["metapt"] == row["metapt"]
