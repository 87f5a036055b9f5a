"""What a lower precision costs: the figures that decide whether it is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from exporter import measure
from exporter.measure import ROWS, Validation, answer, compare, load_validation
from exporter.record import template_ids
from serve.errors import UserError
from trainer.prompt import TaskRecord
from trainer.readout import compile_template, encode_texts
from trainer.tasks import Task


def test_figures_of_a_variant_by_hand() -> None:
    gone = -1e4  # a class that the task does not have
    plain = np.array([[2, 1, gone], [0, 1, gone], [3, 0, gone], [1, 2, gone]], np.float32)
    other = np.array([[1, 2, 0], [0.5, 1, 0], [3, 0, 0], [1, 2, 0]], np.float32)
    other[:, 2] = -2e4  # as far away as it likes: it is no class
    validation = Validation("film", 0, [[1]] * 4, np.array([0, 1, 1, 1]))
    assert compare(plain, other, validation) == {
        "task": "film", "texts": 4, "accuracy": 0.5, "accuracy_change": -0.25, "agreement": 0.75,
        "max_logit_difference": 1.0, "mean_logit_difference": pytest.approx(2.5 / 8),
    }  # fmt: skip
    same = compare(plain, plain, validation)
    assert (same["accuracy"], same["accuracy_change"], same["agreement"]) == (0.75, 0.0, 1.0)


def test_answers_come_back_in_the_order_of_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    rows = [rng.integers(1, 50, rng.integers(1, 20)).tolist() for _ in range(2 * ROWS + 7)]
    sizes = []

    def graph(_: Any, values: dict[str, np.ndarray]) -> np.ndarray:
        """What a graph would be asked, answered by the rows' sums and lengths."""
        sizes.append(values["input_ids"].shape)
        assert set(values["task_id"].tolist()) == {3} and values["scale"] == 2
        return np.stack([values["input_ids"].sum(1), values["attention_mask"].sum(1)], 1)

    monkeypatch.setattr(measure, "run", graph)
    validation = Validation("film", 3, rows, np.zeros(len(rows), np.int64))
    got = answer(None, {"scale": np.array(2)}, validation)  # type: ignore[arg-type]
    assert got.tolist() == [[sum(row), len(row)] for row in rows]
    assert [count for count, _ in sizes] == [ROWS, ROWS, 7]
    # Sorted by length: no batch is padded to more than the next one's shortest row.
    lengths = sorted(map(len, rows))
    assert [width for _, width in sizes] == [lengths[ROWS - 1], lengths[2 * ROWS - 1], lengths[-1]]


@pytest.mark.parametrize(("own", "limit"), [(10, 64), (64, 10), (0, 10)])
def test_texts_are_cut_as_in_training(tiny_t5: Path, tmp_path: Path, own: int, limit: int) -> None:
    from transformers import AutoTokenizer

    template = "film: {text} It was <extra_id_0>."
    tokenizer = Tokenizer.from_file(str(tiny_t5 / "tokenizer.json"))
    before, after = template_ids(template, tokenizer, "p")
    record = {
        "labels": ["bad", "good"], "words": ["bad", "good"], "word_ids": [5, 6],
        "template": template, "prefix_ids": before, "suffix_ids": after, "max_tokens": own,
    }  # fmt: skip
    texts = ["the food was not very good but the story is great", "b<unk>ad", "a film " * 200]
    data = tmp_path / "v.csv"
    data.write_text("text,label\n" + "".join(f"{t},{i % 2}\n" for i, t in enumerate(texts)))
    tasks = [Task("film", ("bad", "good"), ("bad", "good"), template)]
    found = load_validation(str(data), None, ["film"], [record], tasks, tokenizer, limit)
    theirs = AutoTokenizer.from_pretrained(tiny_t5)
    want = encode_texts(theirs, compile_template(theirs, template), texts, 10)
    assert found.rows == want
    assert all(row[: len(before)] == before and row[-len(after) :] == after for row in want)
    assert [len(row) for row in want][::2] == [10, 10] and found.labels.tolist() == [0, 1, 0]


def test_rows_of_a_registered_task_are_read_with_their_aspects(
    tiny_t5: Path, tmp_path: Path
) -> None:
    """As `evaluate` reads them: a text of two aspects has an answer for each, and rows of a class
    that the task drops are no rows."""
    template = "{text} It was <extra_id_0>."
    tokenizer = Tokenizer.from_file(str(tiny_t5 / "tokenizer.json"))
    before, after = template_ids(template, tokenizer, "p")
    record = {
        "labels": ["no", "so so", "yes"], "words": ["bad", "film", "good"],
        "word_ids": [5, 6, 7], "template": template, "prefix_ids": before, "suffix_ids": after,
    }  # fmt: skip
    data = tmp_path / "v.csv"
    data.write_text(
        "text,aspect,label\ngood but not very,food,no\ngood but not very,story,yes\n"
        "good,story,conflict\n"
    )

    def read(registered: str | None, column: str | None = None) -> list[list[int]]:
        own = TaskRecord("film", record["labels"], record["words"], template, registered=registered)
        return load_validation(
            str(data), None, ["film"], [record], [own.as_task()], tokenizer, 64, column
        ).rows

    def tokens(*texts: str) -> list[list[int]]:
        return [
            [*before, *tokenizer.encode(t, add_special_tokens=False).ids, *after] for t in texts
        ]

    want = tokens("food: good but not very", "story: good but not very")
    assert read("semeval-restaurant") == want
    assert read("semeval-restaurant", "{aspect}: {text}") == want
    with pytest.raises(UserError, match=r"'conflict' is not one of .*: correct the row$"):
        read("")
    data.unlink()
    with pytest.raises(UserError, match=r"--validation .*v\.csv does not exist"):
        read("")
