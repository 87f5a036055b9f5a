"""Sentences, and keeping held-out ones out."""

from pathlib import Path
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from serve.errors import Failure, UserError
from trainer.pretraining.recipe import load_recipe
from trainer.pretraining.shards import BagOfWords, labelled_pool, labelled_rows
from trainer.pretraining.texts import HeldOut, pick, sentences

REVIEW = ("I went there on a Monday. The soup was cold and thin! "
          "Nobody said sorry. We will never, ever come back again.")  # fmt: skip


def test_sentences() -> None:
    assert sentences("One is here. Two (is) here! \"Three?\" Four\nFive goes on") == [
        "One is here.", "Two (is) here!", '"Three?', "Four", "Five goes on",
    ]  # fmt: skip
    assert sentences("It cost 3.50 in all, e.g. soup.") == ["It cost 3.50 in all, e.g. soup."]
    # A tokenised text without capitals: only a mark that stands alone ends a sentence.
    assert sentences("it ends . . . the mr. x ( it says ! ) goes\non . ok ?") == [
        "it ends . . .", "the mr. x ( it says !", "goes", "on .", "ok ?",
    ]  # fmt: skip


def test_held_out_ignores_case_and_marks() -> None:
    held = HeldOut(["The soup was COLD , and thin .", "Great!"])
    assert "the soup was cold and thin" in held
    assert "The soup was cold." not in held
    assert "Great!" not in held  # too short to say anything
    other = HeldOut(["El café estaba muy frío."])
    assert "EL CAFÉ ESTABA MUY FRÍO !" in other and "el caf estaba muy fro" not in other


def test_held_out_sentences_of_documents() -> None:
    held = HeldOut([REVIEW])
    assert "The soup was cold and thin!" in held
    # Joined to another, a sentence is still itself.
    assert "Nobody came. The soup was COLD and thin!" in held
    assert "Nobody came. The soup was warm." not in held


def test_a_held_out_sentence_is_found_in_whatever_is_joined(tmp_path: Path) -> None:
    held = HeldOut(["the film is a total mess ."])
    lines = [
        "I saw it on a rainy day in town.",
        "the film is a total mess.",
        "avoid it if you can.",
    ]
    document = "\n".join(
        lines * 3
    )  # lower case after a line feed: no end of a sentence by its marks
    pq.write_table(pa.table({"text": [document], "label": [0]}), tmp_path / "a.parquet")
    (tmp_path / "recipe.toml").write_text(
        '[[labelled]]\nname = "a"\nfile = "a.parquet"\nsplit = true\n'
        'columns = { polarity = ["label", { 0 = 0, 1 = 1 }] }\n'
    )
    entry = load_recipe(tmp_path / "recipe.toml", tmp_path).labelled[0]
    for wrong, error, said in (
        ('[[plain]]\nfile = "a.parquet"\ndocuments = "many"\n', UserError, "not as described"),
        ('held_out = ["b.parquet"]\n', UserError, "has no column 'text', which"),
        ('held_out = ["c.parquet"]\n', Failure, "is damaged or no Parquet file"),
    ):
        pq.write_table(pa.table({"body": [document]}), tmp_path / "b.parquet")
        (tmp_path / "c.parquet").write_bytes(b"PAR1")
        (tmp_path / "wrong.toml").write_text(wrong)
        with pytest.raises(error, match=said):
            load_recipe(tmp_path / "wrong.toml", tmp_path)
    count = 0
    for seed in range(40):
        for text, *_ in labelled_rows(entry, held, np.random.default_rng(seed)):
            assert "total mess" not in text and "\n" not in text
            count += 1
    assert count > 40


def test_a_column_that_a_file_lacks_is_named_before_anything_is_made(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"], "stars": [0]}), tmp_path / "a.parquet")
    (tmp_path / "recipe.toml").write_text(
        '[[labelled]]\nname = "a"\nfile = "a.parquet"\n'
        'columns = { polarity = ["label", { 0 = 0, 1 = 1 }] }\n'
    )
    with pytest.raises(UserError, match=r"a\.parquet has no column 'label', which .*recipe\.toml"):
        load_recipe(tmp_path / "recipe.toml", tmp_path)


def test_labelled_rows_leave_held_out_sentences_out(tmp_path: Path) -> None:
    long = " ".join([REVIEW, REVIEW.replace("soup", "fish")])
    pq.write_table(pa.table({"text": [long], "label": [0]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": ["the fish was cold and thin !"]}), tmp_path / "h.parquet")
    (tmp_path / "recipe.toml").write_text(
        'held_out = ["h.parquet"]\n[[labelled]]\nname = "a"\nfile = "a.parquet"\nsplit = true\n'
        'columns = { polarity = ["label", { 0 = 0, 1 = 1 }] }\n'
    )
    recipe = load_recipe(tmp_path / "recipe.toml", tmp_path)
    held = HeldOut.read(recipe.held_out)
    found: set[str] = set()
    for seed in range(20):
        rows = list(labelled_rows(recipe.labelled[0], held, np.random.default_rng(seed)))
        assert all(classes == {"polarity": 0} for _, classes, _, _ in rows)
        found |= {text for text, *_ in rows}
    assert "The soup was cold and thin!" in found
    assert "The fish was cold and thin!" not in found


def test_pick_keeps_the_edges() -> None:
    for seed in range(20):
        texts = [text for text, edge in pick(REVIEW, np.random.default_rng(seed), middle=0) if edge]
        assert len(texts) == 3
        assert texts[0].startswith("I went there")
        assert texts[-1].endswith("We will never, ever come back again.")


def test_pick_joins_the_next_sentence_one_time_in_four() -> None:
    long = " ".join(f"Sentence number {i} has just six words." for i in range(30))
    parts = sentences(long)
    alone = joined = 0
    for seed in range(200):
        for text, edge in pick(long, np.random.default_rng(seed), middle=2):
            found = sentences(text)
            start = parts.index(found[0])
            assert found == parts[start : start + len(found)]
            assert edge == (start in (0, 28, 29))
            alone += len(found) == 1 and start < 29  # the last has no next
            joined += len(found) == 2
    assert 0.2 < joined / (alone + joined) < 0.3


def test_only_edges_and_agreeing_sentences_inherit_a_label(tmp_path: Path) -> None:
    middle = ["Alpha beta gamma delta.", "Alpha beta gamma epsilon.", "Alpha beta gamma zeta."]
    words = " ".join(["The first words of it.", *middle, "Next to last it was.", "The end of it."])
    pq.write_table(
        pa.table({"text": [words, words, words], "star": [1, 4, 9]}), tmp_path / "a.parquet"
    )
    (tmp_path / "recipe.toml").write_text(
        '[[labelled]]\nname = "a"\nfile = "a.parquet"\nsplit = true\n'
        'columns.polarity = ["star", { 1 = 0, 9 = 1 }]\n'
        'columns.star = ["star", { 1 = 0, 4 = 1, 9 = 4 }]\n'
    )
    entry = load_recipe(tmp_path / "recipe.toml", tmp_path).labelled[0]
    vocabulary = {w: i for i, w in enumerate(["[UNK]", "Alpha"])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()

    def checker(texts: list[str]) -> np.ndarray:  # every sentence sounds glad
        return np.full(len(texts), 3.0)

    pool = labelled_pool(entry, tokenizer, HeldOut([]), cast(BagOfWords, checker), seed=0)
    middles = np.array([pool.text(i)[0] == vocabulary["Alpha"] for i in range(len(pool))])
    stars, polarity = pool.columns["star"], pool.columns["polarity"]
    # Edges keep what the review says; of the middles only those of the glad review do.
    assert set(stars[~middles].tolist()) >= {0, 1, 4}
    assert set(stars[middles].tolist()) == {-1, 4}
    assert set(polarity[middles].tolist()) == {-1, 1}
