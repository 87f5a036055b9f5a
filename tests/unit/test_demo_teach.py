"""Checks of a lesson, its split, its label words, and the files of the Teach tab."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("gradio")

from demo.lesson import EXAMPLES
from demo.tabs.teach import result_line
from demo.teach import Lessons, Start, choose_start, make_lesson, parse_labels, split
from demo.words import choose_words, whole_words
from serve.errors import UserError
from trainer.prompt import Prompt, TaskRecord


def test_labels_are_separated_by_commas_or_lines() -> None:
    assert parse_labels(" late delivery, refund\npraise,") == ["late delivery", "refund", "praise"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("", "2 to 10 labels.*these are 0"),
        ("one", "these are 1"),
        (",".join(f"l{i}" for i in range(11)), "these are 11"),
        ("Good, bad, good", "“Good” stands there twice"),
        ("x" * 41 + ", y", "longer than 40"),
    ],
)
def test_wrong_labels_get_a_sentence(value: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_labels(value)


def test_a_lesson_drops_doubles_and_empty_lines() -> None:
    lesson = make_lesson(" my   task ", ["a", "b"], [["x", " x ", "", "y"], ["z", "w"]])
    assert (lesson.name, lesson.texts, lesson.classes) == (
        "my task", ["x", "y", "z", "w"], [0, 0, 1, 1]
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "groups", "message"),
    [
        ("", [["x", "y"], ["z", "w"]], "name of 1 to 40"),
        ("n" * 41, [["x", "y"], ["z", "w"]], "name of 1 to 40"),
        ("t", [["x", "y"], ["z", "z "]], "“b” has 1 examples"),
        ("t", [["x", "y"], ["x", "w"]], "“x” is an example of two labels"),
        ("t", [["x", "y" * 5001], ["z", "w"]], "5,001 characters"),
        ("t", [[f"x{i}" for i in range(399)], ["z", "w"]], "401 examples; this page takes 400"),
    ],
)
def test_a_wrong_lesson_gets_a_sentence(name: str, groups: list[list[str]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_lesson(name, ["a", "b"], groups)


def test_the_split_holds_out_a_third_of_every_class() -> None:
    classes = [0] * 9 + [1] * 2 + [2] * 14
    learn, held = split(classes)
    assert sorted(learn + held) == list(range(25))
    assert [sum(classes[i] == c for i in held) for c in range(3)] == [3, 1, 4]
    assert split(classes) == (learn, held)


def test_the_example_lesson_is_a_lesson() -> None:
    lesson = make_lesson("shop", list(EXAMPLES), list(EXAMPLES.values()))
    assert len(lesson.texts) == 42


def test_label_words_are_single_tokens_and_all_different(tiny_t5: Path) -> None:
    from trainer.backbone import load_backbone

    backbone = load_backbone(str(tiny_t5))
    labels = ["good", "Food service", "zq", "food"]
    words = choose_words(backbone, labels)
    ids = [backbone.tokenizer.encode(word, add_special_tokens=False) for word in words]
    assert all(len(pieces) == 1 for pieces in ids)
    assert len({pieces[0] for pieces in ids}) == 4
    assert words[:2] == ["good", "food"]  # the label itself; the first of its words that is one
    assert words[2] not in ("good", "food")  # "zq" is two letters: the nearest whole word
    assert words[3] != "food"  # taken by the second label


def test_whole_words_of_both_kinds_of_vocabulary() -> None:
    sentence = {"▁good": 5, "good": 6, "▁to": 7, "▁Good": 8, "▁": 9, "<extra_id_0>": 10, "▁a1b": 11}
    assert whole_words(sentence) == {"good": 5}
    pieces = {"good": 5, "##good": 6, "to": 7, "[UNK]": 8, "refunds": 9, "##ing": 10, "!!!": 11}
    assert whole_words(pieces) == {"good": 5, "refunds": 9}


def test_a_label_that_mini_has_no_token_for_gets_the_nearest_word() -> None:
    from trainer.backbone import load_backbone

    backbone = load_backbone("mini")
    assert len(backbone.tokenizer.encode("backordered", add_special_tokens=False)) > 1
    words = choose_words(backbone, ["good", "backordered"])
    assert words[0] == "good"
    vocabulary = backbone.tokenizer.get_vocab()
    assert words[1].isalpha() and words[1] in vocabulary and words[1] != "good"


def test_the_run_of_the_lowest_held_out_loss_is_served() -> None:
    def prompt(loss: float) -> Any:
        return SimpleNamespace(task=SimpleNamespace(figures={"validation_loss": loss}))

    lessons = Lessons(prompts={"best": prompt(0.7), "words": prompt(0.4), "random": prompt(0.5)})
    assert lessons.winner() == "words"
    del lessons.prompts["words"]
    assert lessons.winner() == "random"


@pytest.mark.parametrize("count", [1, 4])
def test_a_lesson_begins_at_the_prompt_that_answers_its_examples_best(
    tiny_t5: Path, count: int
) -> None:
    """Best: the least mean cross-entropy, here summed up text by text."""
    from trainer.backbone import load_backbone
    from trainer.data import Examples
    from trainer.readout import Batch, class_scores, compile_template, encode_texts, word_ids
    from trainer.tasks import make_task

    backbone = load_backbone(str(tiny_t5))
    random = np.random.default_rng(5)
    prompts = {f"p{n}": random.normal(0, 3, (3, 32)).astype(np.float32) for n in range(count)}
    bundle = SimpleNamespace(
        mode="prefix", read_prompt=lambda name: {"prompt_embeddings": prompts[name]}
    )
    room: Any = SimpleNamespace(
        classifier=SimpleNamespace(bundle=bundle),
        lesson_starts=lambda: {name: name for name in prompts},
    )
    task = make_task("mood", ["bad", "good"])
    train = Examples(["the film", "a story", "food", "great acting"], np.array([0, 1, 1, 0]),
                     ("bad", "good"))  # fmt: skip
    rows = encode_texts(
        backbone.tokenizer, compile_template(backbone.tokenizer, task.template), train.texts, 128
    )
    words = torch.tensor(word_ids(backbone.tokenizer, task.words))

    def loss(name: str) -> float:
        params, total = {"prompt_embeddings": torch.from_numpy(prompts[name])[None]}, 0.0
        for ids, label in zip(rows, train.labels.tolist(), strict=True):
            batch = Batch(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool))
            scores = class_scores(
                backbone.t5, "prefix", params, batch, words, backbone.decoder_ids
            )[0].tolist()
            total += math.log(sum(map(math.exp, scores))) - scores[label]
        return total / len(rows)

    with torch.no_grad():
        losses = {name: loss(name) for name in prompts}
    wanted = min(losses, key=losses.__getitem__)
    assert count == 1 or wanted != "p0"  # the first would be taken without a look
    found = choose_start(room, backbone, task, train)
    assert (found.name, found.among) == (wanted, count)
    assert found.params["prompt_embeddings"].requires_grad
    np.testing.assert_array_equal(found.arrays()["prompt_embeddings"], prompts[wanted])


@pytest.mark.parametrize(("right", "doubted"), [(10, False), (7, True)])
def test_a_lesson_that_was_not_learned_is_told_of(right: int, doubted: bool) -> None:
    figures = {"validation_accuracy": right / 12, "best_step": 3, "steps": 9}
    record = TaskRecord("t", ["a", "b"], ["a", "b"], figures={**figures, "validation_loss": 0.7})
    lessons = Lessons(
        starts={"best": Start("metapt", 1, {})},
        prompts={"best": Prompt({}, record)},
        words=["a", "b"], classes=[0, 1] * 6,
    )  # fmt: skip
    line = result_line(lessons, right, {"best": "MetaPT start"})
    assert f"{right} of 12 right." in line
    assert ("hardly more than one answer" in line) == doubted


def test_a_csv_becomes_labels_and_their_examples(tmp_path: Path) -> None:
    import serve_toy as toy

    from demo.state import Room
    from demo.tabs.teach import fields_of_file
    from serve.classifier import Classifier

    room = Room(Classifier(toy.make_bundle(tmp_path / "bundle"), threads=1))
    path = tmp_path / "lesson.csv"
    path.write_text("label,text\nyes,I agree\nno,never\nyes,of\u00a0course\n")
    assert fields_of_file(str(path), room) == (["yes", "no"], ["I agree\nof course", "never"])
    path.write_text('label,text\n"very\nsad",I cry\nglad,I sing\nvery sad,I weep\n')
    assert fields_of_file(str(path), room) == (["very sad", "glad"], ["I cry\nI weep", "I sing"])
    # Without a header the first line is an example, whichever column the labels are in.
    path.write_text("great lamp,good\nnice chair, good\nawful vase,bad\npoor pen,bad\n")
    fields = (["good", "bad"], ["great lamp\nnice chair", "awful vase\npoor pen"])
    assert fields_of_file(str(path), room) == fields
    path.write_text("good,great lamp\ngood,nice chair\nbad,awful vase\nbad,poor pen\n")
    assert fields_of_file(str(path), room) == fields
    # A text that occurs twice does not make its column the labels'.
    path.write_text("good,great lamp\ngood,nice\nbad,awful\ngood,great lamp\nbad,poor\n")
    assert fields_of_file(str(path), room)[0] == ["good", "bad"]
    path.write_text("what,mood\ngreat lamp,good\nawful vase,bad\n")
    assert fields_of_file(str(path), room) == (["good", "bad"], ["great lamp", "awful vase"])
    path.write_text("text\nonly texts\n")
    with pytest.raises(UserError, match="two columns"):
        fields_of_file(str(path), room)


def test_arguments_of_auth() -> None:
    from demo.__main__ import parse_auth

    assert parse_auth("") is None
    assert parse_auth("ada:se:cret") == ("ada", "se:cret")
    for wrong in ("ada", "ada:", ":x"):
        with pytest.raises(UserError, match="--auth takes USER:PASSWORD"):
            parse_auth(wrong)


def test_a_file_whose_label_holds_a_comma_gets_a_sentence(tmp_path: Path) -> None:
    from demo.tabs.teach import fields_of_file

    room: Any = SimpleNamespace(limits=SimpleNamespace(megabytes=1.0))
    path = tmp_path / "a.csv"
    path.write_text('text,label\nx,"sad, angry"\ny,happy\n')
    with pytest.raises(UserError, match="“sad, angry” contains a comma"):
        fields_of_file(str(path), room)
    path.write_text("text,label\nx,sad\ny,happy\nz,sad\n")
    assert fields_of_file(str(path), room) == (["sad", "happy"], ["x\nz", "y"])
