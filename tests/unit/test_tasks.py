"""The task registry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from serve.errors import UserError
from trainer.options import TaskOptions
from trainer.tasks import (
    PAPER_TASKS,
    Task,
    format_columns,
    get_task,
    make_task,
    readable_aspect,
    task_names,
)

CLASSES = {
    "sst5": 5, "sst2": 2, "amazon5": 5, "amazon2": 2, "sentihood": 2, "semeval-restaurant": 3,
    "semeval-laptop": 3, "yelp5": 5,
}  # fmt: skip


def test_the_papers_tasks_have_its_numbers_of_classes() -> None:
    assert {name: get_task(name).classes for name in (*PAPER_TASKS, "yelp5")} == CLASSES


def test_vader_has_two_and_five_classes_of_four_domains() -> None:
    found = {name for name in task_names() if name.startswith("vader-")}
    domains = ("film", "product", "tweet", "editorial")
    assert found == {f"vader-{domain}-{classes}" for domain in domains for classes in (2, 5)}
    assert {get_task(name).vader for name in found} == set(domains)


@pytest.mark.parametrize("name", task_names())
def test_a_task_says_where_its_rows_come_from(name: str) -> None:
    task = get_task(name)
    assert task.name == name
    assert task.vader or (task.hub and task.files)
    assert task.description


def test_words_are_one_scale() -> None:
    assert get_task("sst2").words == ("bad", "good")
    assert get_task("semeval-laptop").words == ("bad", "okay", "good")
    assert get_task("sst5").words == ("terrible", "bad", "okay", "good", "great")


def test_aspect_tasks_put_the_aspect_before_the_text() -> None:
    for name, columns in {
        "semeval-restaurant": ["aspect", "text"],
        "semeval-laptop": ["aspect", "text"],
        "sentihood": ["target", "aspect", "text"],
    }.items():
        assert format_columns(get_task(name).text_format) == columns


def test_an_unknown_task_is_named_with_what_there_is() -> None:
    with pytest.raises(UserError, match=r"--task sst7: no such task; there are sst5, sst2"):
        get_task("sst7")


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("FOOD#QUALITY", "food quality"),
        ("RESTAURANT#GENERAL", "restaurant"),
        ("BATTERY#OPERATION_PERFORMANCE", "battery operation performance"),
        ("RESTAURANT#MISCELLANEOUS", "restaurant"),
        ("transit-location", "transit location"),
        ("LOCATION1", "LOCATION1"),
    ],
)
def test_aspects_become_words(code: str, words: str) -> None:
    assert readable_aspect(code) == words


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": ("a", "b", "c")}, "3 labels .* but 2 words"),
        ({"labels": ("a",), "words": ("x",)}, "needs at least 2"),
        ({"words": ("x", "x")}, "the word 'x' twice"),
        ({"labels": ("a", "a")}, "the label 'a' twice"),
        ({"template": "It was <extra_id_0>."}, r"must hold \{text\}"),
        ({"template": "{text} It was good."}, "<extra_id_0>"),
    ],
)
def test_a_task_that_cannot_work_is_refused(change: dict[str, object], message: str) -> None:
    fields: dict[str, object] = {"name": "t", "labels": ("a", "b"), "words": ("x", "y"), **change}
    with pytest.raises(UserError, match=message):
        Task(**fields)  # type: ignore[arg-type]


def test_labels_serve_as_words_unless_they_are_numbers() -> None:
    assert make_task("mood", ["Happy", "Sad"]).words == ("happy", "sad")
    with pytest.raises(UserError, match=r"label '0' says nothing.*--words"):
        make_task("stars", ["0", "1"])
    assert make_task("stars", ["0", "1"], ["bad", "good"]).words == ("bad", "good")


def test_a_file_brings_its_own_classes(tmp_path: Path) -> None:
    path = tmp_path / "moods.csv"
    path.write_text("say,mood\nhello,Happy\noh no,sad\nyes,Happy\n", "utf-8")
    flags: dict[str, Any] = {"data": str(path), "text_column": "say", "label_column": "mood"}
    task = TaskOptions(**flags).resolve_task()
    assert (task.name, task.labels, task.words) == ("moods", ("Happy", "sad"), ("happy", "sad"))
    template = "<extra_id_0>: {text}"
    named = TaskOptions(**flags, words=["great", "bad"], template=template).resolve_task()
    assert (named.words, named.template) == (("great", "bad"), template)


def test_a_template_that_names_a_column_is_told_where_columns_go() -> None:
    template = "{aspect}: {text} It was <extra_id_0>."
    with pytest.raises(UserError, match=r"--text-column '\{aspect\}: \{text\}'"):
        TaskOptions(task="sst2", template=template).resolve_task()


def test_words_without_labels_are_said_beside_the_classes_that_were_found(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A file's classes are in alphabetical order, which a user may not expect."""
    (tmp_path / "a.csv").write_text("text,label\nx,good\ny,bad\n", "utf-8")
    with caplog.at_level("INFO"):
        TaskOptions(data=str(tmp_path / "a.csv"), words=["great", "awful"]).resolve_task()
    assert "label words: great for 'bad', awful for 'good'" in caplog.text


def test_a_registered_task_may_get_another_number_of_classes() -> None:
    labels, words = ["negative", "neutral", "positive"], ["bad", "okay", "good"]
    task = TaskOptions(task="sst2", labels=labels, words=words).resolve_task()
    assert (task.labels, task.words) == (tuple(labels), tuple(words))
    assert task.files == ("sst2",)
    with pytest.raises(UserError, match=r"3 labels .* but 2 words .*: pass one word per label"):
        TaskOptions(task="sst2", labels=labels).resolve_task()
