"""Few-shot draws."""

from __future__ import annotations

import re
import unicodedata

import numpy as np
import pytest

from serve.errors import UserError
from trainer.data import Examples
from trainer.few_shot import draw_few_shot
from trainer.spelling import fingerprint, normalise


def pool(counts: list[int]) -> Examples:
    labels = np.repeat(np.arange(len(counts)), counts)
    names = tuple(f"class {i}" for i in range(len(counts)))
    return Examples([f"text {i}" for i in range(len(labels))], labels, names, "pool.csv")


def test_a_seed_stands_for_its_samples_on_every_platform() -> None:
    train, validation = draw_few_shot(pool([60, 60]), seed=7, train=4, validation=3)
    # The order of PCG64(7)'s first 120 doubles, whose bits numpy guarantees.
    doubles = np.random.Generator(np.random.PCG64(7)).random(120)
    order = sorted(range(120), key=lambda i: doubles[i])
    assert train.tolist() == order[:4]
    assert validation.tolist() == order[4:7]


@pytest.mark.parametrize("balanced", [False, True])
def test_samples_are_disjoint_and_repeatable(balanced: bool) -> None:
    examples = pool([100, 50, 60])
    first = draw_few_shot(examples, 3, balanced=balanced)
    again = draw_few_shot(examples, 3, balanced=balanced)
    other = draw_few_shot(examples, 4, balanced=balanced)
    assert [part.tolist() for part in first] == [part.tolist() for part in again]
    assert first[0].tolist() != other[0].tolist()
    assert len(set(first[0].tolist()) | set(first[1].tolist())) == 80


def test_every_class_is_in_train_even_where_the_first_draw_misses_one() -> None:
    examples = pool([300, 6])
    seeds = range(30)
    missed = 0
    for seed in seeds:
        doubles = np.random.Generator(np.random.PCG64(seed)).random(306)
        missed += not (examples.labels[np.argsort(doubles)[:40]] == 1).any()
        train, _ = draw_few_shot(examples, seed)
        assert (examples.labels[train] == 1).any()
    assert missed  # otherwise this test shows nothing


def test_balanced_draws_give_equal_shares() -> None:
    examples = pool([200, 20, 20])
    train, validation = draw_few_shot(examples, 0, train=20, validation=10, balanced=True)
    assert sorted(np.bincount(examples.labels[train]).tolist()) == [6, 7, 7]
    assert sorted(np.bincount(examples.labels[validation]).tolist()) == [3, 3, 4]
    # Mixed, so that the first batch does not hold one class only: 12 changes are to be expected.
    for chosen in (train, validation):
        assert (np.diff(examples.labels[chosen]) != 0).sum() > 3


@pytest.mark.parametrize(
    ("counts", "options", "message"),
    [
        ([30, 30], {}, r"has 60 rows to learn from .* 40 \+ 40 are .* up to 60 at most"),
        ([100, 0], {}, "pool.csv has no sample of class 'class 1'"),
        ([100, 100], {"classes": 3}, r"has no sample of class '2' \(of 3 classes\)"),
        ([50, 0, 50], {}, r"class 1' \(of 3 classes\): .* --labels 'class 0' 'class 2'$"),
        ([1, 1], {"train": 2, "validation": 1}, "has 2 rows .*, but 2 classes need one each and o"),
        ([0, 100, 0], {}, r"no sample of class 'class 0', 'class 2' \(of 3 classes\)"),
        ([50, 50, 50], {"train": 2}, "2 training samples cannot hold 3 classes"),
        (
            [100, 3],
            {"balanced": True},
            "3 samples of class 'class 1', but a balanced draw needs 40",
        ),
        ([20_000, 1], {"train": 2}, "none of 100 draws of 2 .* held class 'class 1'.*--balanced"),
    ],
)
def test_a_draw_that_cannot_be_is_explained(counts, options, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match=message):
        draw_few_shot(pool(counts), 0, **options)


def test_examples_can_be_taken_and_sampled() -> None:
    examples = pool([3, 2])
    part = examples.take([4, 0])
    assert (part.texts, part.labels.tolist()) == (["text 4", "text 0"], [1, 0])
    sample = examples.sample(3, seed=1)
    assert len(set(sample.texts)) == 3
    assert sample.texts == examples.sample(3, seed=1).texts
    assert len(examples.sample(99, seed=1)) == 5


def test_normalised_texts_forget_marks_case_and_space() -> None:
    assert normalise("It's  GREAT!") == normalise("it 's great") == "itsgreat"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("यह की बात", "यह का बात"),  # letters that differ by a vowel sign
        ("ราคาดี", "ราคาดู"),
        ("👍👍", "👎"),
        ("❤️", "!!!"),
    ],
)
def test_texts_that_differ_in_vowel_signs_or_are_signs_alone_are_told_apart(
    one: str, other: str
) -> None:
    assert fingerprint(one) != fingerprint(other)
    assert fingerprint(one) == fingerprint(one)


def test_composed_and_decomposed_letters_are_one_spelling() -> None:
    for text in ("한국어", "がぎぐ", "क़"):
        assert normalise(text) == normalise(unicodedata.normalize("NFD", text)) != ""


def test_the_key_of_a_latin_text_never_changes() -> None:
    # Another one would move a text to the other side of the cut between training and test rows.
    accents = [chr(mark) for mark in range(0x300, 0x370)]
    signs = [*accents, *"\ufe0f\u20e3\u200d❤👍.,'’-_ \u1dc4"]
    letters = [
        chr(code) for code in range(0x20000)
        if "LATIN" in unicodedata.name(chr(code), "") and chr(code).isalnum()
    ]  # fmt: skip
    texts = [before + sign + "x" for sign in signs for before in ("e", "İ", "ǰ", "é", "ſ", "Å")]
    for text in [*letters, *texts]:
        assert normalise(text) == re.sub(r"[\W_]+", "", text.casefold()), ascii(text)
    assert fingerprint("Très bon !") == 12414681698440526947
    assert fingerprint("Tre\u0300s bon") == 8935372076447013361
