"""Sentences from files of any size."""

from __future__ import annotations

import bz2
import gzip
import json
from pathlib import Path

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest

from serve.errors import UserError
from trainer.corpus import BadFiles, documents, find_files, sentences, split_sentences


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One here. Two there! Three?", ["One here.", "Two there!", "Three?"]),
        ("Dr. Smith met J. R. Jones.", ["Dr. Smith met J. R. Jones."]),
        ("Born in the U.S. Army base. Then left.", ["Born in the U.S. Army base.", "Then left."]),
        ("So did I. She laughed.", ["So did I.", "She laughed."]),
        ('"Go!" He went. (Really.) Yes.', ['"Go!"', "He went.", "(Really.)", "Yes."]),
        ("It cost 3.50 dollars. 12 came.", ["It cost 3.50 dollars.", "12 came."]),
        ("well... that was it. fine", ["well... that was it. fine"]),
        ("Well... That was it.", ["Well...", "That was it."]),
        ("a  line\nanother\t one\n\n", ["a line", "another one"]),
        ("tokenised text . Next one !", ["tokenised text .", "Next one !"]),
        ("", []),
    ],
)
def test_sentences_end_where_they_end(text: str, expected: list[str]) -> None:
    assert split_sentences(text) == expected


def test_all_formats_and_compressions_give_their_texts(tmp_path: Path) -> None:
    texts = ["First of all, this.", "Caf\u00e9 two."]
    (tmp_path / "a.txt").write_text("\n".join(texts), "utf-8")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress("\n".join(texts).encode()))
    lines = "\n".join(json.dumps({"text": text}) for text in texts)
    (tmp_path / "c.jsonl.bz2").write_bytes(bz2.compress(lines.encode()))
    (tmp_path / "d.csv").write_text('text\n"' + '"\n"'.join(texts) + '"\n', "utf-8")
    parquet.write_table(arrow.table({"text": [*texts, None]}), tmp_path / "e.parquet")
    (tmp_path / "f.png").write_bytes(b"no text")
    files = find_files([str(tmp_path)])
    assert [path.name[0] for path in files] == ["a", "b", "c", "d", "e"]
    for path in files:
        assert [text.strip() for text in documents(path, "text")] == texts


def test_files_come_by_path_folder_and_glob_each_once(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.csv"):
        (tmp_path / name).write_text("text\n", "utf-8")
    found = find_files([str(tmp_path / "b.txt"), str(tmp_path / "*.txt"), str(tmp_path)])
    assert [path.name for path in found] == ["b.txt", "a.txt", "c.csv"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.txt", "does not exist, nor matches"),
        ("*.jsonl", "does not exist, nor matches"),
        ("a.png", "must end in .txt, .csv"),
        ("empty.txt", "is empty"),
        ("folder", "holds no text"),
    ],
)
def test_files_that_are_not_there_are_named(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.png").write_bytes(b"x")
    (tmp_path / "empty.txt").write_bytes(b"")
    with pytest.raises(UserError, match=message) as error:
        find_files([str(tmp_path / name)])
    assert f"--corpus {tmp_path / name}" in str(error.value)


def test_lines_in_another_encoding_are_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"good line\ncaf\xe9\nlast line\n")
    assert [text.strip() for text in documents(path, "text")] == ["good line", "last line"]
    assert "1 lines are not UTF-8" in caplog.text


def test_paragraphs_join_lines_and_are_cut_before_they_fill_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("A sentence over\ntwo lines.\n\n  \nNext\none\n", "utf-8")
    assert list(documents(path, "text", "paragraph")) == ["A sentence over two lines.", "Next one"]
    monkeypatch.setattr("trainer.corpus._BLOCK", 10)
    path.write_text("word\n" * 9, "utf-8")
    found = list(documents(path, "text", "paragraph"))
    assert len(found) > 2
    assert " ".join(found).split() == ["word"] * 9


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.csv", "a.parquet"])
def test_progress_adds_up_to_the_size_of_the_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    rows = [f"row number {i} of many" for i in range(10_000)]
    if name == "a.parquet":
        parquet.write_table(arrow.table({"text": rows}), path)
    else:
        content = "\n".join(["text", *rows]).encode()
        path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    steps: list[int] = []
    assert sum(1 for _ in documents(path, "text", advance=steps.append)) in (10_000, 10_001)
    assert abs(sum(steps) - path.stat().st_size) <= 3  # Parquet's is rounded
    assert len(steps) > 1


def test_sentences_are_chosen_by_their_words(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("Too short. This one has five words. This has\n", "utf-8")
    found = list(sentences([path], min_words=3, max_words=5))
    assert [(s.text, s.source) for s in found] == [("This one has five words.", "a.txt")]
    words = {count: " ".join(["Word"] * count) + "." for count in range(1, 8)}
    path.write_text("\n".join(words.values()), "utf-8")
    found = list(sentences([path], min_words=3, max_words=5))
    assert [s.text for s in found] == [words[3], words[4], words[5]]


def test_a_share_of_the_files_below_one_lets_none_pass() -> None:
    assert BadFiles(10, 0.1).allowed and BadFiles(2, 0.5).allowed
    assert not BadFiles(9, 0.1).allowed and not BadFiles(10, 0.0).allowed
