"""`evaluate`: which rows a prompt is scored on, and which of its classes theirs are."""

from __future__ import annotations

import json
import logging
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
import torch

from serve.cli import run as run_command
from serve.errors import UserError
from trainer import evaluate as command
from trainer.__main__ import commands
from trainer.backbone import load_backbone
from trainer.configs import EvaluateConfig
from trainer.data import Examples
from trainer.evaluate import run_evaluate
from trainer.prompt import Prompt, TaskRecord
from trainer.rows import Rows, Scorer
from trainer.tasks import get_task, make_task


def record_of(task_name: str, **fields: Any) -> TaskRecord:
    """The record of a prompt that was tuned on a registered task."""
    task = get_task(task_name)
    return replace(
        TaskRecord(task.name, list(task.labels), list(task.words), task.template), **fields
    )


class Seen:
    """What reached the model."""

    record: TaskRecord
    examples: Examples


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Runs the command on a prompt's record, with a model that only looks on."""
    seen = Seen()

    def look_on(
        backbone: Any, record: TaskRecord, params: Any, examples: Examples, **_: Any
    ) -> Any:
        seen.record, seen.examples = record, examples
        return {}

    monkeypatch.setattr(command, "evaluate", look_on)
    monkeypatch.setattr(command, "load_backbone", lambda *_, **__: types.SimpleNamespace())
    monkeypatch.setattr(command, "check_fits", lambda *_: None)

    def call(record: TaskRecord, **flags: Any) -> Seen:
        monkeypatch.setattr(command, "_load", lambda path: Prompt({}, record))
        run_evaluate(EvaluateConfig(**{"prompt": "p", "json": "-", "split": "all", **flags}))
        return seen

    return call


def write(path: Path, **columns: list[Any]) -> str:
    parquet.write_table(arrow.table(columns), path)
    return str(path)


def test_a_registered_tasks_file_is_read_as_it_was_in_tuning(run: Any, tmp_path: Path) -> None:
    columns = {
        "text": ["LOCATION1 is cheap", "LOCATION2 is loud"], "label": [1, 0],
        "target": ["LOCATION1", "LOCATION2"], "aspect": ["price", "transit-location"],
    }  # fmt: skip
    path = write(tmp_path / "mine.parquet", **columns)
    seen = run(record_of("sentihood", labels=["Down", "Up"]), data=path)
    assert seen.examples.texts == [
        "LOCATION1 price: LOCATION1 is cheap", "LOCATION2 transit location: LOCATION2 is loud"
    ]  # fmt: skip
    assert (seen.examples.names, seen.examples.labels.tolist()) == (("Down", "Up"), [1, 0])
    seen = run(record_of("sentihood"), data=path, text_column="text")  # the flag still wins
    assert seen.examples.texts == columns["text"]


def test_a_registered_tasks_rows_without_a_class_are_left_out(run: Any, tmp_path: Path) -> None:
    path = write(
        tmp_path / "mine.parquet", text=["Cold soup.", "Mixed.", "Fine."], aspect=["soup"] * 3,
        label=["negative", "conflict", "neutral"],
    )  # fmt: skip
    seen = run(record_of("semeval-restaurant"), data=path)
    assert seen.examples.texts == ["soup: Cold soup.", "soup: Fine."]
    assert seen.examples.labels.tolist() == [0, 1]


def test_a_name_that_is_registered_by_chance_changes_nothing(run: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "mine.parquet", text=["a", "b"], label=["in", "out"])
    labels = ["in", "out", "over"]
    seen = run(record_of("sentihood", labels=labels, words=labels), data=path)
    assert (seen.examples.texts, seen.examples.labels.tolist()) == (["a", "b"], [0, 1])


def test_a_file_of_a_registered_name_is_no_registered_task(run: Any, tmp_path: Path) -> None:
    """`tune --data sentihood.parquet` has read one column; and `evaluate` asks for its rows."""
    path = write(
        tmp_path / "sentihood.parquet", text=["a", "b"], label=[0, 1], target=["x"] * 2,
        aspect=["y"] * 2,
    )  # fmt: skip
    record = record_of("sentihood", registered="")
    assert run(record, data=path).examples.texts == ["a", "b"]
    with pytest.raises(UserError, match="'sentihood', which is no registered task"):
        run(record, data_dir=str(tmp_path))
    renamed = record_of("sentihood", name="places", registered="sentihood")
    assert run(renamed, data=path).examples.texts == ["x y: a", "x y: b"]
    assert run(renamed, data_dir=str(tmp_path)).examples.texts == ["x y: a", "x y: b"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"words": ["terrible", "great"]}, r"--words terrible great: .*says bad, good: leave --w"),
        ({"template": "{text} <extra_id_0>"}, r"--template .*says \{text\} It was <extra_id_0>\."),
        ({"labels": ["no", "yes"]}, "--labels no yes: .*says negative, positive: .*number the fil"),
        ({"labels": ["positive", "negative"]}, "task.json decides"),
    ],
)
def test_what_the_record_decides_is_refused(
    run: Any, tmp_path: Path, flags: dict[str, Any], message: str
) -> None:
    path = write(tmp_path / "sst2.parquet", text=["a", "b"], label=[0, 1])
    for name in ("sst2", "mine"):
        with pytest.raises(UserError, match=message):
            run(record_of("sst2", name=name), data=path, **flags)
    if "labels" not in flags:
        with pytest.raises(UserError, match=message):
            run(record_of("sst2"), task="sst2", data_dir=str(tmp_path), **flags)


def test_flags_that_say_the_same_and_prompts_without_a_record(run: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "mine.parquet", text=["a", "b"], label=[0, 1])
    same = {"words": ["bad", "good"], "labels": ["negative", "positive"]}
    assert run(record_of("sst2"), data=path, **same).record == record_of("sst2")
    other = {"words": ["no", "yes"], "labels": ["off", "on"], "template": "<extra_id_0>: {text}"}
    record = run(TaskRecord("google"), data=path, **other).record
    assert (record.words, record.labels) == (["no", "yes"], ["off", "on"])
    assert record.template == "<extra_id_0>: {text}"


def test_a_fully_tuned_model_takes_no_other_backbone(run: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "mine.parquet", text=["a", "b"], label=[0, 1])
    record = record_of("sst2", mode="none")
    with pytest.raises(UserError, match=r"p is a fully tuned model, .*: leave --backbone out"):
        run(record, data=path, backbone="mini")
    assert run(record, data=path).record.mode == "none"


def test_a_prompt_of_a_file_asks_for_rows(run: Any) -> None:
    for record in (record_of("sst2", name="reviews"), TaskRecord("reviews")):
        with pytest.raises(UserError, match=r"p is of 'reviews', which .*--data FILE, or a --task"):
            run(record)


def test_the_template_alone_scores_as_the_scorer_does(
    tiny_t5: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [f"the film was {word} and {word}" for word in ("good", "bad", "great", "awful")]
    path = write(tmp_path / "mine.parquet", text=texts, label=["good", "bad", "good", "bad"])
    argv = ["evaluate", "--data", path, "--split", "all", "--labels", "bad", "good"]
    argv += ["--json", "-", "--backbone", str(tiny_t5), "--device", "cpu"]
    assert run_command("python -m trainer", "", commands(argv), argv) == 0
    found = json.loads(capsys.readouterr().out)

    backbone = load_backbone(str(tiny_t5))
    task = make_task("mine", ["bad", "good"])
    labels = np.array([1, 0, 1, 0])
    rows = Rows(backbone, task.template, texts, labels, TaskRecord().max_tokens)
    scores = Scorer.of(backbone, task, "none").all({}, rows)
    loss = torch.nn.functional.cross_entropy(scores, torch.from_numpy(labels))
    assert found["loss"] == pytest.approx(float(loss), abs=1e-5)
    assert found["accuracy"] == float((scores.argmax(1).numpy() == labels).mean())
    assert (found["prompt"], found["mode"], found["rows"]) == (None, "none", 4)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    write(tmp_path / "sst2.parquet", text=["a", "b", "c"], label=["negative", "positive", "1"])
    return str(tmp_path)


@pytest.mark.parametrize(
    ("labels", "words", "codes", "matched"),
    [
        (["negative", "positive"], ["bad", "good"], [0, 1, 1], None),
        (["Positive", "negative"], ["good", "bad"], [1, 0, 0], None),
        (["good", "bad"], ["good", "bad"], [1, 0, 0], "negative is bad, positive is good"),
        (["unhappy", "happy"], ["bad", "good"], [0, 1, 1], "negative is unhappy, positive is happ"),
        (["0", "1"], ["good", "bad"], [1, 0, 0], "negative is 1, positive is 0"),
        (["0", "1"], ["awful", "great"], [0, 1, 1], "negative is 0, positive is 1"),
    ],
)
def test_classes_are_matched_by_name_or_else_by_order_aloud(
    run: Any, folder: str, caplog: pytest.LogCaptureFixture, labels: list[str], words: list[str],
    codes: list[int], matched: str | None,
) -> None:  # fmt: skip
    with caplog.at_level(logging.WARNING):
        seen = run(TaskRecord("mine", labels, words), task="sst2", data_dir=folder)
    assert seen.examples.labels.tolist() == codes
    assert seen.examples.names == tuple(labels)
    assert [message for message in caplog.messages if "by their order" in message] == (
        [] if matched is None else [caplog.messages[0]]
    )
    assert matched is None or matched in caplog.text


def test_classes_that_cannot_be_matched_are_refused(run: Any, folder: str) -> None:
    record = TaskRecord("mine", ["ham", "spam"], ["ham", "spam"])
    message = (
        r"knows the classes \(ham, spam\), but task 'sst2' has negative, positive, and neither .*: "
        "pass the task it was tuned for"
    )
    with pytest.raises(UserError, match=message):
        run(record, task="sst2", data_dir=folder)
    with pytest.raises(UserError, match=r"knows 3 classes \(a, b, c\), but task 'sst2' has 2"):
        run(TaskRecord("mine", list("abc"), list("abc")), task="sst2", data_dir=folder)


def test_labels_name_the_classes_of_a_registered_set(run: Any, tmp_path: Path) -> None:
    write(tmp_path / "sst2.parquet", text=["a", "b"], label=["ham", "spam"])
    record = record_of("sst2", labels=["spam", "ham"])
    for task in ("sst2", None):  # the prompt's own task is sst2
        seen = run(record, task=task, labels=["ham", "spam"], data_dir=str(tmp_path))
        assert seen.examples.labels.tolist() == [1, 0]


def test_the_help_names_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    def shown(name: str) -> str:
        argv = [name, "--help"]
        with pytest.raises(SystemExit):
            run_command("python -m trainer", "", commands(argv), argv)
        return " ".join(capsys.readouterr().out.split())

    text = shown("finetune")
    assert "`evaluate FOLDER` reads it" in text and "--model" not in text
    assert "own rows for validation, at most so many, where it marks others for testing" in text
    text = shown("evaluate")
    assert "rows of a fifth of its sentences, chosen by hash, which tuning never draws" in text
    assert "label word of each class, for a prompt without a task.json" in text
