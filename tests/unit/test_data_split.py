"""Which rows are for training, and which for testing."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest

from serve.errors import UserError
from trainer.configs import TuneConfig
from trainer.data import Examples, choose_split, load_examples, load_task
from trainer.few_shot import draw


def write(path: Path, **columns: list[Any]) -> Path:
    """A Parquet file of these columns and, if it is not among them, a label column of 0 and 1."""
    count = len(next(iter(columns.values())))
    parquet.write_table(arrow.table({"label": [i % 2 for i in range(count)], **columns}), path)
    return path


def test_splits_follow_their_column(tmp_path: Path) -> None:
    marks = ["train", "dev", "test", "train"]
    path = write(tmp_path / "a.parquet", text=list("abcd"), split=marks)
    parts = {
        name: load_examples(path, split=name).texts for name in ("train", "validation", "test")
    }
    assert parts == {"train": ["a", "d"], "validation": ["b"], "test": ["c"]}


def test_the_split_column_is_found_however_it_is_spelt(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", text=list("abc"), **{" Split": ["train", "TEST", "train"]})
    assert load_examples(path, split="test").texts == ["b"]
    assert load_examples(path, split="train").texts == ["a", "c"]


def test_without_test_rows_the_validation_rows_test(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", text=list("abc"), split=["train", "dev", "train"])
    assert load_examples(path, split="test").texts == ["b"]
    assert load_examples(path, split="train").texts == ["a", "c"]


def test_a_set_without_splits_is_cut_by_its_texts(tmp_path: Path) -> None:
    texts = [f"text number {i // 2}" + "!" * (i % 2) for i in range(2000)]
    path = write(tmp_path / "a.parquet", text=texts)
    train, test = (load_examples(path, split=name) for name in ("train", "test"))
    assert len(train) + len(test) == 2000
    assert 300 < len(test) < 500  # a fifth
    # Two spellings of one text are on one side, and a shuffled file is cut in the same way.
    assert not {text.rstrip("!") for text in train.texts} & {t.rstrip("!") for t in test.texts}
    turned = write(tmp_path / "b.parquet", text=texts[::-1])
    assert sorted(load_examples(turned, split="test").texts) == sorted(test.texts)


def test_the_cut_of_plain_texts_is_the_same_for_ever(tmp_path: Path) -> None:
    # Another cut would let an evaluation meet texts that older prompts were tuned on.
    tested = [0, 1, 3, 18, 32, 34, 39]
    texts = [f"text number {i}" for i in range(40)]
    path = write(tmp_path / "sst2.parquet", text=texts)
    wanted = [texts[i] for i in tested]
    assert load_examples(path, split="test").texts == wanted
    assert load_task("sst2", "test", data_dir=tmp_path).texts == wanted
    examples = Examples(texts, np.zeros(40, np.int64), ("no", "yes"))
    assert choose_split(examples, [None] * 40, "test").texts == wanted
    assert len(choose_split(examples, [None] * 40, "train")) == 33


def test_all_rows_of_a_sentence_are_on_one_side(tmp_path: Path) -> None:
    texts = [f"text number {i}" for i in range(40) for _ in range(3)]
    aspects = ["LAPTOP#GENERAL", "BATTERY#QUALITY", "KEYBOARD#PRICE"] * 40
    write(tmp_path / "semeval-laptop.parquet", text=texts, aspect=aspects)
    parts = {
        name: {text.split(": ")[1] for text in load_task("semeval-laptop", name, data_dir=tmp_path)
        .texts}
        for name in ("train", "test")
    }  # fmt: skip
    # The sentences that a task without aspects is tested on.
    assert parts["test"] == {f"text number {i}" for i in (0, 1, 3, 18, 32, 34, 39)}
    assert not parts["train"] & parts["test"]
    assert len(load_task("semeval-laptop", "test", data_dir=tmp_path)) == 21


def test_a_format_without_a_text_column_is_cut_by_its_longest(tmp_path: Path) -> None:
    reviews = [f"text number {i}" for i in range(40)]
    path = write(tmp_path / "a.parquet", review=reviews, kind=["pen", "ink"] * 20)
    found = load_examples(path, "{review} ({kind})", split="test")
    assert found.texts == [f"text number {i} ({'pen' if i % 2 == 0 else 'ink'})"
                           for i in (0, 1, 3, 18, 32, 34, 39)]  # fmt: skip


@pytest.mark.parametrize(
    ("marks", "train", "validation", "test"),
    [
        (("Train", "Test", "Dev"), "a", "c", "b"),
        (("TRAIN ", " TEST", "VAL"), "a", "c", "b"),
        (("training", "testing", "Valid"), "a", "c", "b"),
        (("train", "Eval", "evaluation"), "a", "bc", "bc"),
        (("train", "test", "eval"), "a", "c", "b"),
    ],
)
def test_marks_count_without_case_and_by_their_usual_names(
    tmp_path: Path, marks: tuple[str, ...], train: str, validation: str, test: str
) -> None:
    path = write(tmp_path / "a.parquet", text=list("abc"), split=list(marks))
    found = ["".join(load_examples(path, split=name).texts)
             for name in ("train", "validation", "test")]  # fmt: skip
    assert found == [train, validation, test]


@pytest.mark.parametrize("mark", ["hold-out", "fold 1", 3])
def test_a_mark_that_is_not_known_is_refused(tmp_path: Path, mark: str | int) -> None:
    path = write(tmp_path / "a.parquet", text=list("ab"), split=[mark, mark])
    known = "train, training, validation, valid, val, dev, development, eval, evaluation, test, t"
    for name in ("train", "test"):
        with pytest.raises(UserError, match=f"'split' marks a row {mark!r}, .*{known}.*rename"):
            load_examples(path, split=name)
    assert load_examples(path).texts == ["a", "b"]  # nothing is asked of the column then


def test_rows_without_a_mark_are_left_out_aloud(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    marks = ["train", "test", "", None, "train"]
    path = write(tmp_path / "a.parquet", text=list("abcde"), split=marks)
    with caplog.at_level(logging.WARNING):
        assert load_examples(path, split="train").texts == ["a", "e"]
    assert "a.parquet: 2 rows have no mark in the column 'split'" in caplog.text


def test_validation_rows_are_not_made_of_training_rows(tmp_path: Path) -> None:
    plain = write(tmp_path / "a.parquet", text=list("abcd"))
    trained = write(tmp_path / "b.parquet", text=list("abcd"), split=["train"] * 4)
    for path in (plain, trained):
        with pytest.raises(UserError, match=r"marks no validation rows: pass --split test, .*mark"):
            load_examples(path, split="validation")
    path = write(tmp_path / "c.parquet", text=list("ab"), split=["train", "test"])
    with pytest.raises(UserError, match=r"validation: its column .* marks test, train: mark some"):
        load_examples(path, split="validation")


@pytest.mark.parametrize(("suffix", "separator"), [("csv", ";"), ("csv", "\t"), ("csv", "|"),
                                                   ("csv", ","), ("tsv", "\t")])  # fmt: skip
def test_a_files_own_validation_rows_choose_whatever_separates_its_columns(
    tmp_path: Path, suffix: str, separator: str
) -> None:
    path = tmp_path / f"a.{suffix}"
    other = "," if separator != "," else "and"  # a comma within the text, as in any sentence
    marks = ["train", "train", "dev", "test"] * 5
    lines = [("text", "label", "split")]
    lines += [(f"row {i}{other} done", ("bad", "good")[i // 4 % 2], m) for i, m in enumerate(marks)]
    path.write_text("\n".join(map(separator.join, lines)) + "\n", "utf-8")
    config = TuneConfig(data=str(path), out="")
    train, held = draw(config, config.resolve_task())
    assert {int(text.split()[1].rstrip(other)) % 4 for text in train.texts} == {0, 1}
    assert {int(text.split()[1].rstrip(other)) % 4 for text in held.texts} == {2}
    assert (len(train), len(held)) == (10, 5)


def test_a_file_is_read_once_for_all_that_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.parquet", text=list("abcdefgh"), label=["no", "yes"] * 4,
                 split=["train"] * 4 + ["dev"] * 2 + ["test"] * 2)  # fmt: skip
    config = TuneConfig(data=str(path), out="")
    task = config.resolve_task()
    path.unlink()
    train, held = draw(config, task)
    assert (sorted(train.texts), sorted(held.texts)) == (list("abcd"), list("ef"))


def test_a_files_own_validation_rows_are_balanced_too(tmp_path: Path) -> None:
    labels = ["bad", "good"] * 10 + ["bad"] * 12 + ["good"] * 3 + ["bad"]
    marks = ["train"] * 20 + ["validation"] * 15 + ["test"]
    path = write(tmp_path / "a.parquet", text=[f"t {i}" for i in range(36)], label=labels,
                 split=marks)  # fmt: skip

    def held(**flags: Any) -> Examples:
        config = TuneConfig(data=str(path), out="", train=4, **flags)
        return draw(config, config.resolve_task())[1]

    assert held().counts.tolist() == [12, 3]
    assert held(balanced=True).counts.tolist() == [3, 3]
    assert held(balanced=True, validation=4).counts.tolist() == [2, 2]
    assert held(balanced=True, seed=2).texts != held(balanced=True).texts
    with pytest.raises(UserError, match="3 samples of class 'good', but a balanced draw needs 4"):
        held(balanced=True, validation=8)


def test_texts_of_signs_alone_are_cut_one_by_one(tmp_path: Path) -> None:
    texts = [chr(0x1F600 + i) * n for i in range(60) for n in (1, 2)]
    path = write(tmp_path / "a.parquet", text=texts)
    assert 10 < len(load_examples(path, split="test")) < 40
