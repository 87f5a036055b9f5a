"""Reading labelled files, good and bad."""

from __future__ import annotations

import gzip
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest

from serve.cli import Command, run
from serve.errors import Failure, UserError
from trainer.configs import FinetuneConfig
from trainer.data import load_examples, load_task
from trainer.tables import iterate_rows
from trainer.tasks import Task

ROWS = [("good, really", 1), ('she said "no"', 0), ("two\nlines", 1), ("caf\u00e9 \U0001f600", 0)]


def write(
    path: Path, rows: list[tuple[Any, Any]], columns: tuple[str, str] = ("text", "label")
) -> Path:
    """The rows in the format of the suffix, written by hand except for Parquet."""
    if path.suffix == ".parquet":
        table = {columns[0]: [row[0] for row in rows], columns[1]: [row[1] for row in rows]}
        parquet.write_table(arrow.table(table), path)
        return path
    if path.suffix == ".jsonl":
        lines = [json.dumps(dict(zip(columns, row, strict=True))) for row in rows]
    else:
        comma = "," if path.suffix == ".csv" else "\t"
        quoted = [('"' + str(text).replace('"', '""') + '"', label) for text, label in rows]
        lines = [comma.join(columns), *(f"{text}{comma}{label}" for text, label in quoted)]
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_every_format_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    found = load_examples(write(tmp_path / f"a{suffix}", ROWS))
    assert found.texts == [text for text, _ in ROWS]
    assert found.labels.tolist() == [1, 0, 1, 0]
    assert found.labels.dtype == np.int64
    assert found.names == ("0", "1")
    assert found.counts.tolist() == [2, 2]


def test_a_compressed_file_reads_as_the_plain_one(tmp_path: Path) -> None:
    plain = write(tmp_path / "a.csv", ROWS)
    packed = tmp_path / "b.csv.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert load_examples(packed).texts == load_examples(plain).texts
    packed.write_bytes(packed.read_bytes()[:-20])
    with pytest.raises(Failure, match=r"b\.csv\.gz is damaged or cut short"):
        load_examples(packed)


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbftext,label\r\nfine,1\r\nawful,0\r\n")
    assert load_examples(path).texts == ["fine", "awful"]


@pytest.mark.parametrize("separator", [";", "\t", "|"])
def test_a_spreadsheet_may_have_written_the_file(tmp_path: Path, separator: str) -> None:
    # Its own separator, spaces around names, columns without a name, rows of separators alone.
    rows = [[" text ", "label", "", ""], ["good, really", "1", "", ""], ["", " ", "", ""],
            ["bad", "0", "", ""]]  # fmt: skip
    path = tmp_path / "a.csv"
    path.write_text("".join(separator.join(row) + "\r\n" for row in rows), "utf-8")
    found = load_examples(path)
    assert (found.texts, found.labels.tolist()) == (["good, really", "bad"], [1, 0])


def test_half_of_a_character_is_only_looked_for_where_it_can_be(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "\\ud83d\\ude00 \\\\ud83d", "label": true}\n'
                    '{"text": "no", "label": false}\n', "utf-8")  # fmt: skip
    found = load_examples(path)
    assert found.texts == ["\U0001f600 \\ud83d", "no"]
    assert (found.names, found.labels.tolist()) == (("false", "true"), [1, 0])


def test_class_names_count_without_case_and_indices_beside_them(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", [("a", "Positive"), ("b", "negative"), ("c", "1"), ("d", "0")])
    found = load_examples(path, labels=("negative", "positive"))
    assert found.labels.tolist() == [1, 0, 1, 0]


def test_names_are_found_and_sorted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [("x", "sad"), ("y", "glad"), ("z", "sad")])
    found = load_examples(path)
    assert (found.names, found.labels.tolist()) == (("glad", "sad"), [1, 0, 1])


def test_names_that_form_a_scale_keep_its_order(tmp_path: Path) -> None:
    names = ["very positive", "Negative", "neutral", "very negative", "positive"]
    found = load_examples(write(tmp_path / "a.csv", [(name, name) for name in names]))
    assert found.names == ("very negative", "Negative", "neutral", "positive", "very positive")
    assert found.labels.tolist() == [4, 1, 2, 0, 3]


def test_names_that_differ_in_case_are_one_class(tmp_path: Path) -> None:
    marks = ["glad", "Positive", "positive ", "GLAD", "zest", "Apt"]
    found = load_examples(write(tmp_path / "a.csv", [(f"t{i}", m) for i, m in enumerate(marks)]))
    assert found.names == ("Apt", "glad", "Positive", "zest")  # by the alphabet, first spellings
    assert found.labels.tolist() == [1, 2, 2, 1, 3, 0]
    scale = ["Positive", "positive", "NEGATIVE"]
    found = load_examples(write(tmp_path / "b.csv", [(f"t{i}", m) for i, m in enumerate(scale)]))
    assert (found.names, found.counts.tolist()) == (("NEGATIVE", "Positive"), [1, 2])


def test_classes_that_are_named_twice_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", [("x", "good"), ("y", "bad")])
    with pytest.raises(UserError, match="the classes Good, bad, good have a name twice"):
        load_examples(path, labels=("Good", "bad", "good"))


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_stars_count_from_one(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"a{suffix}", [("x", 3), ("y", 1), ("z", 2)])
    found = load_examples(path)
    assert (found.names, found.labels.tolist()) == (("1", "2", "3"), [2, 0, 1])
    named = load_examples(path, labels=("1", "2", "3"))
    assert named.labels.tolist() == [2, 0, 1]


Labels = Sequence[str] | None


@pytest.mark.parametrize(
    ("suffix", "values", "labels", "names"),
    [
        (".csv", ["1.0", "4.5", "5.0"], None, ["1.0", "4.5", "5.0"]),
        (".jsonl", [4.5, 5.0, 5], ["4.5", "5"], ["4.5", "5", "5"]),
        (".csv", ["02", "none", "01", "03"], None, ["02", "none", "01", "03"]),
        (".csv", ["02", "01", "03"], None, ["2", "1", "3"]),
        (".jsonl", [True, False], ["true", "false"], ["true", "false"]),
        (".jsonl", [True, False], ["False", "True"], ["True", "False"]),
        (".jsonl", [True, False], ["negative", "positive"], ["positive", "negative"]),
        (".csv", ["-1", "1"], ["-1", "1"], ["-1", "1"]),
        (".csv", ["1", "4", "2"], ["1", "2", "4", "5"], ["1", "4", "2"]),
    ],
)
def test_a_value_that_is_spelt_as_a_class_is_that_class(
    tmp_path: Path, suffix: str, values: list[Any], labels: Labels, names: list[str]
) -> None:
    rows = [(f"t{i}", value) for i, value in enumerate(values)]
    found = load_examples(write(tmp_path / f"a{suffix}", rows), labels=labels)
    assert [found.names[code] for code in found.labels] == names


@pytest.mark.parametrize(
    ("suffix", "stray", "labels"),
    [
        (".csv", "0", ["1", "2", "3", "4", "5"]),  # by its place it would be class "1"
        (".csv", "1", ["0.5", "1.5"]),
        (".csv", "1", ["true", "false"]),
        (".jsonl", True, ["0", "1"]),
        (".csv", "0", ["2", "none"]),
    ],
)
def test_a_number_among_numbers_that_is_none_of_them_is_refused(
    tmp_path: Path, suffix: str, stray: Any, labels: list[str]
) -> None:
    path = write(tmp_path / f"a{suffix}", [("x", stray)])
    message = f"line {1 + (suffix == '.csv')}: label .* is not one of {', '.join(labels)}: correct"
    with pytest.raises(UserError, match=message):
        load_examples(path, labels=labels)


def test_integral_floats_are_indices(tmp_path: Path) -> None:
    # pandas writes them so when a column once held a missing value
    for name, rows in (
        ("a.csv", [("x", "1.0"), ("y", "0.0")]),
        ("a.parquet", [("x", 1.0), ("y", 0.0)]),
    ):
        found = load_examples(write(tmp_path / name, rows))
        assert (found.names, found.labels.tolist()) == (("0", "1"), [1, 0])


def test_a_format_joins_columns_and_reads_aspects(tmp_path: Path) -> None:
    table = {"text": ["Cold pizza."], "aspect": ["FOOD#STYLE_OPTIONS"], "label": [0]}
    parquet.write_table(arrow.table(table), tmp_path / "a.parquet")
    found = load_examples(
        tmp_path / "a.parquet", "{aspect}: {text}", labels=("negative", "positive")
    )
    assert found.texts == ["food style options: Cold pizza."]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("column", ["reviews.text", "Text: body", "say!r", "0", "two words"])
def test_a_column_is_found_whatever_its_name(tmp_path: Path, suffix: str, column: str) -> None:
    path = write(tmp_path / f"a{suffix}", [("fine {text}", 1), ("dire", 0)], (column, "label"))
    assert load_examples(path, column).texts == ["fine {text}", "dire"]
    found = load_examples(path, "{" + column + "} / {" + column + "}")
    assert found.texts == ["fine {text} / fine {text}", "dire / dire"]


def test_a_format_without_a_column_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", [("fine", 1)])
    with pytest.raises(
        UserError, match=r"--text-column text\{: a format .* '\{aspect\}: \{text\}'"
    ):
        load_examples(path, "text{")


def test_classes_to_drop_are_left_out_by_name_or_index(tmp_path: Path) -> None:
    labels = ("negative", "positive")
    names = write(tmp_path / "a.csv", [("a", "positive"), ("b", "Conflict"), ("c", "negative")])
    assert load_examples(names, labels=labels, drop=("conflict",)).texts == ["a", "c"]
    numbers = write(tmp_path / "b.csv", [("a", 1), ("b", 2), ("c", 0)])
    assert load_examples(numbers, labels=labels, drop=("conflict",)).texts == ["a", "c"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", "a.csv is empty"),
        ("a.csv", b"text,label\n", "has no rows"),
        (
            "a.csv",
            b"body,label\nx,1\n",
            "has no column 'text': it has body, label; .*--text-column",
        ),
        ("a.csv", b"text,text,label\nx,y,1\n", "the column 'text' twice"),
        ("a.csv", b"text,label\nx,1\ny,z,0\n", "line 3 has 3 fields, but the header has 2"),
        ("a.csv", b'text,label\n"x" y,1\n', "line 2: .* write a quote as two"),
        ("a.csv", b"text,label\nok,1\ncaf\xe9,0\n", "line 3: byte 0xe9 at offset 19 is not UTF-8"),
        ("a.csv", "text,label\nx,1\n".encode("utf-16"), "is UTF-16: save it as UTF-8"),
        (
            "a.tsv",
            b'text\tlabel\nfine\t1\n"So-called" art\t0\n',
            "line 3: .* write a quote as two",
        ),
        (
            "a.tsv",
            b'text\tlabel\nfine\t1\n"So called art\t0\nbad\t0\nthis is called "art"\t1\n',
            "line 5: .* write a quote as two",
        ),
        (
            "a.tsv",
            b'text\tlabel\nfine\t1\n"Art\t0\nbad\t0\nit is art"\t1\n',
            "line 3: a quote is opened and not closed before line 5",
        ),
        (
            "a.csv",
            b'text\tlabel\n"So called\t0\nbad\t0\nwell"\t1\n',
            "line 2: a quote is opened and not closed before line 4",
        ),
        ("a.jsonl", b"[" * 100_000 + b"\n", "line 1 is nested too deeply"),
        ("a.csv", b"text,label\nx,7\n", "line 2: label '7' is not one of no, yes"),
        ("a.csv", b"text,label\nx,2\n", r"label '2' .* from 0 to 1 \(indices count from 0\)"),
        ("a.csv", b"text,label\nx,-1\n", "label '-1' is not one of"),
        ("a.csv", b"text,label\nx,maybe\n", "label 'maybe' is not one of no, yes"),
        ("a.csv", b"text,label\n,1\n", "line 2: 'text' is empty"),
        ("a.csv", b"text,label\n  ,1\n", "line 2: 'text' is empty"),
        ("a.jsonl", b'{"text": "x", "label": 1}\n{oops\n', "line 2 is not JSON"),
        ("a.jsonl", b'{"label": ' + b"1" * 5000 + b"}\n", "line 1 is not JSON .Exceeds"),
        ("a.jsonl", b"[1]\n", "line 1 is not a JSON object"),
        ("a.jsonl", b'{"body": "x", "label": 1}\n', "line 1 has no 'text': it has body, label"),
        ("a.jsonl", b'{"text": 5, "label": 1}\n', "line 1: 'text' is int '5', not text"),
        ("a.jsonl", b'{"text": null, "label": 1}\n', "line 1: 'text' is missing"),
        ("a.jsonl", b'{"text": "x", "label": 0.5}\n', "line 1: label 0.5 is not one of"),
        ("a.jsonl", b'{"text": "x", "label": null}\n', "line 1: the label is empty: fill it in"),
        ("a.jsonl", b'{"text": "x", "label": NaN}\n', "line 1: the label is empty"),
        ("a.jsonl", b'{"text": "\\uD83d", "label": 1}\n', "line 1: 'text' holds half of a char"),
        ("a.csv", b"text,label\nx, \n", "line 2: the label is empty"),
        ("a.csv", b"text,label\rx,1\ry,0\r", "line 1 holds a carriage return that ends no line"),
        ("a.xlsx", b"PK", "the name must end in .csv, .tsv, .jsonl or .parquet"),
    ],
)
def test_a_bad_file_is_refused_in_one_line_that_names_it(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load_examples(path, labels=("no", "yes"))
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("flag", "advice"),
    [
        ("--data", "pass --text-column and --label-column"),
        ("--exclude", "pass --exclude-column"),
        ("--corpus", "pass --corpus-column"),
        ("--source", "name its columns text and label"),
    ],
)
@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_missing_column_names_the_flag_that_the_file_goes_with(
    tmp_path: Path, suffix: str, flag: str, advice: str
) -> None:
    path = write(tmp_path / f"a{suffix}", ROWS, ("body", "label"))
    with pytest.raises(UserError, match=f"no .*'text': it has body, label; {advice}$"):
        list(iterate_rows(path, ["text"], flag=flag))
    with pytest.raises(UserError, match=r"it has body, label; rename it$"):
        list(iterate_rows(path, ["text"], flag=flag, advice="rename it"))


def test_a_missing_file_and_a_folder_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none.csv does not exist"):
        load_examples(tmp_path / "none.csv")
    with pytest.raises(UserError, match="is a folder"):
        load_examples(tmp_path)


def test_parquet_errors_name_the_row_and_damage_is_a_failure(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", [("x", 1), (None, 0)])
    with pytest.raises(UserError, match="row 2: 'text' is missing"):
        load_examples(path)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(Failure, match=r"a\.parquet is damaged or no Parquet file"):
        load_examples(path)


def test_a_column_of_scores_is_no_column_of_classes(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", [(f"t{i}", f"id{i}") for i in range(300)])
    with pytest.raises(UserError, match="300 different values"):
        load_examples(path)
    path = write(tmp_path / "b.csv", [("x", 1), ("y", 90210)])
    with pytest.raises(UserError, match="line 3: label '90210' is no class index"):
        load_examples(path)


def test_ratings_with_a_gap_or_below_zero_say_how_to_name_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "a.csv", [("v", 1), ("w", 5), ("x", 4), ("y", 2)])
    with caplog.at_level(logging.INFO):
        assert load_examples(path).names == ("1", "2", "3", "4", "5")
    assert "'label' has no 3: where there is no such class, pass --labels 1 2 4 5" in caplog.text
    assert load_examples(path, labels=["1", "2", "4", "5"]).labels.tolist() == [0, 3, 2, 1]
    path = write(tmp_path / "b.csv", [("x", 1), ("y", -1)])
    advice = r"pass --labels -1 1 \(and to tune --words bad good\)$"
    with pytest.raises(UserError, match=rf"line 3: label '-1' is no class index: .*{advice}"):
        load_examples(path)
    argv = ["finetune", "--data", str(path), "--labels", "-1", "1", "--words", "bad", "good"]
    found: list[Task] = []
    table = {"finetune": Command(FinetuneConfig, lambda given: found.append(given.resolve_task()))}
    assert run("trainer", "", table, [*argv, "--out", "x"]) == 0
    assert (found[0].labels, found[0].words) == (("-1", "1"), ("bad", "good"))


def test_a_data_folder_is_searched_by_the_tasks_names(tmp_path: Path) -> None:
    write(tmp_path / "sst2.csv", [("fine", 1), ("poor", 0)])
    assert load_task("sst2", data_dir=tmp_path).texts == ["fine", "poor"]
    with pytest.raises(UserError, match=r"has no sst5.parquet for task 'sst5'"):
        load_task("sst5", data_dir=tmp_path)
    for name in ("sst2", "vader-film-2"):  # whose texts are in no folder, but who asks for one
        with pytest.raises(UserError, match=r"--data-dir .*none is not a folder"):
            load_task(name, data_dir=tmp_path / "none")


def test_a_file_wins_over_a_folder(tmp_path: Path) -> None:
    write(tmp_path / "sst2.csv", [("from the folder", 1)])
    own = write(tmp_path / "own.csv", [("my own", 0)], ("body", "mark"))
    found = load_task("sst2", data=own, data_dir=tmp_path, text_column="body", label_column="mark")
    assert found.texts == ["my own"]
    assert found.names == ("negative", "positive")
