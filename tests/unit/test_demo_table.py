"""Reading, filtering and paging tables of the demo's Many texts tab."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

pytest.importorskip("gradio")

from demo.table import read_lines, read_sheet, view
from demo.tabs.many import PAGE, distributions, page_of, write_csv
from serve.errors import UserError


def write(folder: Path, name: str, data: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def test_lines_are_texts_without_the_empty_ones() -> None:
    assert read_lines("one\n\n  two  \r\nthree", 10) == ["one", "two", "three"]


@pytest.mark.parametrize(("text", "message"), [("\n \n", "one text a line"), ("a\nb\nc", "3 rows")])
def test_no_line_and_too_many_lines_are_named(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_lines(text, 2)


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_the_separator_is_found_and_quotes_hold_it(tmp_path: Path, delimiter: str) -> None:
    text = f'id{delimiter}review\n1{delimiter}"good{delimiter} really\ngood"\n2{delimiter}bad\n'
    sheet = read_sheet(write(tmp_path, "a.csv", text), 10, 1)
    assert sheet.header == ["id", "review"]
    assert sheet.column("review") == [f"good{delimiter} really\ngood", "bad"]
    assert sheet.guess(("text", "review")) == "review"


def test_a_column_without_a_known_name_is_guessed_by_its_length(tmp_path: Path) -> None:
    sheet = read_sheet(write(tmp_path, "a.csv", "k,v\n1,a long sentence\n2,another one\n"), 10, 1)
    assert sheet.guess(("text",)) == "v"


def test_one_column_without_a_header_keeps_its_first_row(tmp_path: Path) -> None:
    sheet = read_sheet(write(tmp_path, "a.csv", "I loved it\nNever again\n"), 10, 1)
    assert sheet.column("text") == ["I loved it", "Never again"]


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path) -> None:
    sheet = read_sheet(write(tmp_path, "a.csv", b"\xef\xbb\xbftext,n\nhello,1\n"), 10, 1)
    assert sheet.header == ["text", "n"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.xlsx", "text\nx\n", "not a CSV"),
        ("a.csv", "text\ncaf\xe9\n".encode("latin-1"), "not UTF-8 text .byte 9."),
        ("a.csv", "", "is empty"),
        ("a.csv", "text,label\n", "a header and no rows"),
        ("a.csv", "text,label\nx,1\ny\n", "Row 3 of .* has 1 cells, its header 2"),
        ("a.csv", "\ntext,label\n\nx,1\ny\n", "Row 5 of .* has 1 cells, its header 2"),
        ("a.csv", "I like it\nso, so\n", "Row 2 of .* has 2 cells, its header 1"),
        ("a.csv", "text,text\nx,1\n", "two columns of one name"),
        ("a.csv", 'text,n\n"x,1\n', "not a well-formed CSV"),
        ("a.csv", "text\n" + "x\n" * 11, "11 rows; this page takes 10"),
        ("a.csv", "x" * 10_001, "0.0 MB; this page takes 0.01 MB"),
        ("a.csv", "te\0xt\nx\n", "NUL"),
    ],
)
def test_a_wrong_file_gets_a_sentence(
    tmp_path: Path, name: str, data: str | bytes, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        read_sheet(write(tmp_path, name, data), 10, 0.01)


def answers(count: int = 7) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "row": range(1, count + 1),
            "text": [f"Text {chr(97 + i % 26)}*" for i in range(count)],
            "label": ["yes" if i % 2 else "no" for i in range(count)],
            "confidence": [((i * 3) % 7 + 3) / 10 for i in range(count)],
        }
    )


def test_filter_and_order_agree_with_plain_python() -> None:
    table = answers()
    kept = view(table, "no", 0.7, "", "least sure first")
    plain = [r for r in table.to_dict("records") if r["label"] == "no" and r["confidence"] <= 0.7]
    plain.sort(key=lambda r: r["confidence"])
    assert kept["row"].tolist() == [r["row"] for r in plain] == [1, 7]


@pytest.mark.parametrize(
    ("order", "key"),
    [
        ("as given", lambda r: r["row"]),
        ("least sure first", lambda r: r["confidence"]),
        ("most sure first", lambda r: -r["confidence"]),
        ("by text", lambda r: r["text"]),
    ],
)
def test_every_order_is_as_it_is_called(order: str, key: Any) -> None:
    """Rows that are equal in it stay as they were."""
    table = answers(30)
    wanted = [r["row"] for r in sorted(table.to_dict("records"), key=key)]
    assert view(table, None, 1, "", order)["row"].tolist() == wanted


def test_a_search_is_literal_and_without_case() -> None:
    assert view(answers(), None, 1, "TEXT C*", "as given")["row"].tolist() == [3]
    assert view(answers(), None, 1, ".", "as given").empty


def test_pages_hold_fifty_rows_and_a_number_out_of_range_is_brought_back() -> None:
    table = answers(2 * PAGE + 1)
    rows, page, where = page_of(table, table, 9)
    assert (len(rows), page, where) == (1, 3, "101 of 101 rows, page 3 of 3")
    assert page_of(table, table, 0)[1] == 1
    assert page_of(table, table.head(0), 1) == ([], 1, "0 of 101 rows, page 1 of 1")


def test_distributions_count_every_row_once() -> None:
    table = answers(40)
    counts, spread = distributions(table)
    assert dict(zip(counts["label"], counts["rows"], strict=True)) == {"no": 20, "yes": 20}
    assert spread["rows"].sum() == 40
    low = spread[spread["confidence"] == "30–40 %"]["rows"].sum()
    assert low == sum(0.3 <= value < 0.4 for value in table["confidence"])


def test_an_answer_of_whole_confidence_is_counted_with_the_surest() -> None:
    table = answers(4).assign(confidence=[1.0, 0.9, 0.89, 0.0])
    _, spread = distributions(table)
    counts = spread.groupby("confidence")["rows"].sum().to_dict()
    assert counts == {"90–100 %": 2, "80–90 %": 1, "0–10 %": 1}


def test_the_download_reads_back(tmp_path: Path) -> None:
    table = answers()
    with open(write_csv(table, "my/../task"), encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["text"] for row in rows] == table["text"].tolist()
    assert [row["label"] for row in rows] == table["label"].tolist()
