"""`label`: the reservoir, the classifier and the command."""

from __future__ import annotations

import pickle
import re
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import pytest
from label_toy import FINE, POOR, csv, reviews, write_material

from serve.cli import Command, run
from serve.errors import UserError
from trainer import label
from trainer.classifier import BundleLabeller, train_labeller, with_sentences
from trainer.corpus import Sentence
from trainer.data import Examples
from trainer.label import LabelConfig, run_label
from trainer.labels import class_names
from trainer.reservoir import BINS, Reservoir
from trainer.spelling import fingerprint


def chunk_of(count: int, classes: int, seed: int) -> tuple[list[Sentence], np.ndarray]:
    """Sentences "item 0", ... with random probabilities [count, classes]."""
    probabilities = np.random.default_rng(seed).dirichlet([0.5] * classes, count)
    return [Sentence(f"item {i}", "f.txt") for i in range(count)], probabilities


def test_a_reservoir_keeps_what_is_sure_and_counts_the_rest() -> None:
    stream, probabilities = chunk_of(500, 3, 0)
    found = Reservoir(10_000, 0.7, 0, 3)
    found.add(stream, probabilities, set())
    best, sure = probabilities.argmax(1), probabilities.max(1)
    for index in range(3):
        expected = [i for i in range(500) if best[i] == index and sure[i] >= 0.7]
        assert [entry.text for entry in found.kept[index]] == [f"item {i}" for i in expected]
        assert found.above(0.9)[index] == sum((best == index) & (sure >= 0.9))
    assert found.histogram.sum() == found.seen == 500
    assert found.histogram.shape == (3, BINS)


def test_a_confidence_on_a_threshold_counts_as_reaching_it() -> None:
    found = Reservoir(5, 0.7, 0, 2)
    found.add([Sentence("x", "f")], np.array([[0.3, 0.7]]), set())
    assert found.above(0.7).tolist() == [0, 1]
    assert len(found.kept[1]) == 1


def test_every_sentence_has_the_same_chance() -> None:
    # 60 sentences, 15 kept, 400 seeds: each is kept 100 times, give or take (sd 8.7).
    times = np.zeros(60)
    stream = [Sentence(f"s{i}", "f") for i in range(60)]
    for seed in range(400):
        found = Reservoir(15, 0.5, seed, 1)
        found.add(stream, np.ones((60, 1)), set())
        assert len(found.kept[0]) == 15
        for entry in found.kept[0]:
            times[int(entry.text[1:])] += 1
    assert times.sum() == 15 * 400
    assert abs(times - 100).max() < 40


def test_the_cut_into_chunks_does_not_matter() -> None:
    stream, probabilities = chunk_of(300, 2, 1)
    whole, parts = Reservoir(20, 0.5, 3, 2), Reservoir(20, 0.5, 3, 2)
    whole.add(stream, probabilities, set())
    for start in range(0, 300, 7):
        parts.add(stream[start : start + 7], probabilities[start : start + 7], set())
    assert whole.kept == parts.kept


def test_parts_merged_in_any_order_are_the_whole() -> None:
    stream, probabilities = chunk_of(400, 3, 4)
    stream[300:] = stream[:100]  # repeats, of kept sentences and of others
    probabilities[300:] = probabilities[:100]
    sure = int(np.flatnonzero(probabilities[:100].max(1) >= 0.6)[0])
    banned = {fingerprint(f"item {sure}")}
    whole = Reservoir(12, 0.6, 5, 3)
    whole.add(stream, probabilities, banned)
    merged = Reservoir(12, 0.6, 5, 3)
    for start in (300, 0, 200, 100):
        part = Reservoir(12, 0.6, 5, 3)
        rows = slice(start, start + 100)
        part.add(stream[rows], probabilities[rows], banned, [(start + i, 0) for i in range(100)])
        merged.merge(*part.part())
    assert merged.kept == whole.kept
    assert all(len(kept) == 12 for kept in whole.kept)
    assert (merged.repeated, merged.excluded, merged.seen) == (whole.repeated, 2, 400)
    np.testing.assert_array_equal(merged.confident, whole.confident)
    np.testing.assert_array_equal(merged.histogram, whole.histogram)


def test_excluded_and_repeated_sentences_stay_out() -> None:
    texts = ["It's Great!", "its great", "Bad one.", "Other"]
    found = Reservoir(5, 0.5, 0, 1)
    found.add([Sentence(t, "f") for t in texts], np.ones((4, 1)), {fingerprint("BAD one")})
    assert [entry.text for entry in found.kept[0]] == ["It's Great!", "Other"]
    assert (found.excluded, found.repeated) == (1, 1)


def test_a_restored_reservoir_goes_on_as_if_never_stopped(tmp_path: Path) -> None:
    stream, probabilities = chunk_of(400, 3, 2)
    whole, first, second = (Reservoir(15, 0.5, 5, 3) for _ in range(3))
    whole.add(stream, probabilities, {fingerprint("item 7")})
    first.add(stream[:230], probabilities[:230], {fingerprint("item 7")})
    first.save(tmp_path / "state", {"a": 1})
    assert not second.restore(tmp_path / "state", {"a": 2})  # another run
    assert second.restore(tmp_path / "state", {"a": 1})
    second.add(stream[230:], probabilities[230:], {fingerprint("item 7")})
    assert second.kept == whole.kept
    for name in ("seen", "excluded", "repeated"):
        assert getattr(second, name) == getattr(whole, name)
    np.testing.assert_array_equal(second.histogram, whole.histogram)


def test_balanced_choice_takes_as_many_of_each_class() -> None:
    found = Reservoir(100, 0.0, 0, 2)
    stream = [Sentence(f"s{i}", "f") for i in range(50)]
    found.add(stream, np.eye(2)[[0] * 40 + [1] * 10], set())
    even = found.choose(balance=True)
    assert np.bincount(even["label"]).tolist() == [10, 10]
    assert len(set(even["text"])) == 20
    assert len(set(even["label"][:10].tolist())) == 2  # mixed
    assert np.bincount(found.choose(balance=False)["label"]).tolist() == [40, 10]


def test_the_classifier_learns_from_texts_and_their_sentences() -> None:
    rows = reviews(200)
    names = ("bad", "good")
    labels = np.array([names.index(mood) for _, mood in rows])
    examples = Examples([text for text, _ in rows], labels, names, "r")
    texts, found = with_sentences(examples, (4, 60))
    assert len(texts) == 600
    assert texts[200] + " " + texts[201] == texts[0]
    assert found[200] == found[201] == labels[0]
    labeller = train_labeller(examples)
    probabilities = labeller.probabilities(["The soup was awful.", "A superb and lovely view."])
    assert probabilities.argmax(1).tolist() == [0, 1]
    np.testing.assert_allclose(probabilities.sum(1), 1)
    figures = labeller.measure(examples.sample(50, 1), 0.5)
    assert figures["accuracy"] == 1.0
    assert labeller.probabilities([]).shape == (0, 2)


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        ((1, 60), ["Poor.", "It was bad.", "I will not go back."]),
        ((3, 5), ["It was bad.", "I will not go back."]),
        ((1, 3), ["Poor.", "It was bad."]),
        ((4, 4), []),
    ],
)
def test_sentences_of_some_lengths_only_are_learnt_from(
    words: tuple[int, int], kept: list[str]
) -> None:
    text = "Poor. It was bad. I will not go back."
    examples = Examples([text, "Good."], np.array([1, 0]), ("good", "bad"))
    texts, labels = with_sentences(examples, words)
    assert texts == [text, "Good.", *kept]
    assert labels.tolist() == [1, 0, *[1] * len(kept)]


def test_a_skewed_set_does_not_skew_the_classifier() -> None:
    """Nine of ten texts are good, but nothing in them tells which."""
    examples = Examples(["the film"] * 40, np.array([1] * 36 + [0] * 4), ("bad", "good"))
    found = train_labeller(examples).probabilities(["the film"])
    np.testing.assert_allclose(found, [[0.5, 0.5]], atol=1e-3)


def test_an_embedding_classifier_is_a_regression_on_the_encoders_vectors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sklearn.linear_model import LogisticRegression

    class Letters:
        def encode(self, texts: Sequence[str], **_: object) -> np.ndarray:
            counts = np.array([[text.count(c) for c in "abcdefgo"] for text in texts], np.float32)
            return counts / np.linalg.norm(counts, axis=1, keepdims=True)

    asked: list[object] = []

    def choose(source: str, engine: str, otherwise: str) -> str:
        asked.extend([engine, otherwise])
        return source

    monkeypatch.setenv("METAPT_CACHE", str(tmp_path))
    monkeypatch.setattr("trainer.classifier.choose_encoder", choose)
    monkeypatch.setattr("trainer.classifier.load_encoder", lambda source: Letters())
    texts = ["good food", "a good deed", "bad", "a bad cab", "bad beef"]
    labels = np.array([1, 1, 0, 0, 0])
    labeller = train_labeller(Examples(texts, labels, ("no", "yes")), "embedding", engine="auto")
    assert asked == ["auto", "onnx"]
    unseen = ["good", "bad dog", "a cab"]
    model = LogisticRegression(C=1.0, class_weight="balanced")
    expected = model.fit(Letters().encode(texts), labels).predict_proba(Letters().encode(unseen))
    np.testing.assert_allclose(labeller.probabilities(unseen), expected, atol=1e-4)
    assert labeller.probabilities([]).shape == (0, 2)


def test_a_word_said_again_counts_by_the_logarithm() -> None:
    labeller = train_labeller(Examples(["good film", "bad film"], np.arange(2), ("a", "b")))
    found = np.sort(labeller.model[:-1].transform(["good good good film"]).data)
    rare, unseen = np.log(3 / 2) + 1, np.log(3 / 1) + 1  # of the two texts, one and none have it
    plain = np.array([
        (1 + np.log(3)) * rare,  # good
        1 * 1,  # film, which both have
        1 * rare,  # good film
        (1 + np.log(2)) * unseen,  # good good
    ])  # fmt: skip
    np.testing.assert_allclose(found, np.sort(plain / np.linalg.norm(plain)))


class Exported:
    """Stands for `serve.classifier.Classifier`: two tasks; opened bundles are noted down."""

    opened: list[dict[str, Any]] = []

    def __init__(self, folder: str, **settings: Any):
        self.opened.append({"folder": folder, **settings})
        self.tasks = {
            "mood": SimpleNamespace(labels=["bad", "good"], words=["bad", "good"]),
            "upside": SimpleNamespace(labels=["Good", "Bad"], words=["yes", "no"]),
            "answers": SimpleNamespace(labels=["no", "yes"], words=["no", "yes"]),
            "words": SimpleNamespace(labels=["plus", "minus"], words=["good", "bad"]),
            "stars": SimpleNamespace(labels=["1", "2", "3"], words=["bad", "okay", "good"]),
        }

    def classify(self, texts: list[str], task: str) -> list[Any]:
        sure = [0.9 if any(word in text for word in FINE) else 0.2 for text in texts]
        # Labels in another order than the task's: they are looked up by name.
        names = {"upside": ("Good", "Bad"), "words": ("plus", "minus")}
        upper, lower = names.get(task, ("good", "bad"))
        return [SimpleNamespace(probabilities={upper: p, lower: 1 - p}) for p in sure]


def test_a_bundle_annotates_and_travels_by_its_folder(
    material: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr("serve.classifier.Classifier", Exported)
    labeller = BundleLabeller(str(tmp_path), "mood")
    copy = pickle.loads(pickle.dumps(labeller))
    np.testing.assert_allclose(
        copy.probabilities(["A lovely day.", "An ugly day."]), [[0.1, 0.9], [0.8, 0.2]]
    )
    assert copy.probabilities([]).shape == (0, 2)
    assert Exported.opened[-1]["folder"] == str(tmp_path)
    assert Exported.opened[-1]["threads"] == 1
    with pytest.raises(UserError, match=r"has the tasks answers, mood, .*: pass --bundle-task"):
        BundleLabeller(str(tmp_path))
    with pytest.raises(UserError, match=r"--bundle-task tone: .* has answers, mood, "):
        BundleLabeller(str(tmp_path), "tone")

    flags = {"classifier": "bundle", "bundle": str(tmp_path), "bundle_task": "mood"}
    run_label(LabelConfig(**{**material, "data": None}, **flags))
    assert "classifier" not in capsys.readouterr().out  # nothing to measure it on
    table = parquet.read_table(material["out"]).to_pydict()
    for text, index in zip(table["text"], table["label"], strict=True):
        assert any(word in text for word in (POOR, FINE)[index])
    run_label(LabelConfig(**material, **flags))
    assert "classifier (bundle): accuracy 1.000" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"has the classes 1, 2, 3, but .* has bad, good"):
        run_label(LabelConfig(**material, **{**flags, "bundle_task": "stars"}))
    with pytest.raises(UserError, match="--classifier bundle and --bundle FOLDER go together"):
        run_label(LabelConfig(**material, bundle="b"))
    # Classes are matched by what they are called or stand for, never by their numbers.
    for task, said in (("upside", False), ("words", True)):
        caplog.clear()
        run_label(LabelConfig(**material, **{**flags, "bundle_task": task}))
        assert "classifier (bundle): accuracy 1.000" in capsys.readouterr().out
        assert ("by their order: bad is minus, good is plus" in caplog.text) == said
    with pytest.raises(UserError, match=r"has the classes no, yes, but .* has bad, good"):
        run_label(LabelConfig(**material, **{**flags, "bundle_task": "answers"}))


def test_a_class_without_training_rows_is_named() -> None:
    examples = Examples(["a b c d"] * 4, np.zeros(4, np.int64), ("bad", "good"), "r.csv")
    with pytest.raises(UserError, match=r"r\.csv has no training row of class 'good'"):
        train_labeller(examples)
    with pytest.raises(UserError, match=r"r\.csv holds rows of class 'bad' only: .* at least two"):
        train_labeller(Examples(["a b c d"] * 4, np.zeros(4, np.int64), ("bad",), "r.csv"))


@pytest.fixture
def material(tmp_path: Path) -> dict[str, Any]:
    return write_material(tmp_path)


def test_a_corpus_becomes_balanced_pseudo_labels(
    material: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    banned = "The lovely staff was great and superb, and it must NOT get in"
    csv(tmp_path / "down.csv", [(banned.replace(",", ""), "good")])
    run_label(LabelConfig(**material, exclude=[str(tmp_path / "down.csv")], threshold=0.6))
    table = parquet.read_table(material["out"]).to_pydict()
    assert list(table) == ["text", "label", "confidence", "source"]
    assert np.bincount(table["label"]).tolist() == [50, 50]
    for text, index in zip(table["text"], table["label"], strict=True):
        assert any(word in text for word in (POOR, FINE)[index])  # names sort as bad, good
    assert min(table["confidence"]) >= 0.6
    assert set(table["source"]) == {"corpus.txt"}
    assert not any("must not get in" in text for text in table["text"])
    printed, errors = capsys.readouterr()
    assert "accuracy 1.000" in printed
    assert "%|" not in errors  # a bar is for a terminal
    assert "801 sentences; 1 excluded" in printed
    assert (tmp_path / "out" / "sure.run.json").is_file()


def test_the_file_says_what_its_classes_are_called(material: dict[str, Any]) -> None:
    for flags in (material, {**material, "corpus": [], "labelled": True}):
        run_label(LabelConfig(**flags))
        Path(material["out"]).with_suffix(".run.json").unlink()  # as where only the file is copied
        assert class_names(material["out"]) == ["bad", "good"]


def test_labelled_rows_pass_through_with_their_own_labels(
    material: dict[str, Any], tmp_path: Path
) -> None:
    rows = reviews(30)
    data = csv(tmp_path / "r.csv", rows[:25])
    out = tmp_path / "o.parquet"
    run_label(LabelConfig(labelled=True, data=str(data), out=str(out)))
    table = parquet.read_table(out).to_pydict()
    assert np.bincount(table["label"]).tolist() == [12, 12]
    moods = dict(rows)
    for text, index in zip(table["text"], table["label"], strict=True):
        assert moods[text] == ("bad", "good")[index]


def test_labelled_rows_of_some_lengths_only(tmp_path: Path) -> None:
    words = ["one", "two words", "three of them", "now there are four"]
    data = csv(
        tmp_path / "r.csv", [(f"{text} {i}", str(i % 2)) for text in words for i in range(4)]
    )
    out = tmp_path / "o.parquet"
    run_label(LabelConfig(labelled=True, data=str(data), out=str(out), min_words=3, max_words=4))
    kept = parquet.read_table(out)["text"].to_pylist()
    assert sorted(kept) == sorted(f"{text} {i}" for text in words[1:3] for i in range(4))
    with pytest.raises(UserError, match="no text of 1 to 1 words: raise --max-words"):
        run_label(LabelConfig(labelled=True, data=str(data), out=str(out), max_words=1))


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    """Eight times the corpus, less than half as much again in memory."""

    class Stub:
        classes = 2

        def probabilities(self, texts: Sequence[str]) -> np.ndarray:
            high = np.array([0.5 + (hash(text) % 50) / 100 for text in texts])
            return np.stack([high, 1 - high], axis=1)

    peaks = []
    for lines in (1000, 8000):
        path = tmp_path / f"{lines}.txt"
        line = "This is sentence number %09d of the corpus. And here is another one, %09d.\n"
        path.write_text("".join(line % (i, i) for i in range(lines)), "utf-8")
        config = LabelConfig(
            corpus=[str(path)], out=str(tmp_path / "o.parquet"), per_class=50, chunk=128
        )
        tracemalloc.start()
        found = label._annotate(config, [path], Stub(), set())  # type: ignore[arg-type]
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert found.seen == 2 * lines
    assert peaks[1] < 1.5 * peaks[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--corpus"], "--corpus"),
        (["--labelled"], "--labelled reads no --corpus"),
        (["--min-words", "9", "--max-words", "3"], "--min-words 9 is above --max-words 3"),
        (["--labels", "good", "bad", "--task", "sst2"], "--labels names the classes of --data"),
        (["--labels", "fine", "poor"], "label '(good|bad)' is not one of fine, poor"),
        (["--out", "result.csv"], "the name must end in .parquet"),
        (["--threshold", "1.5"], "--threshold must be at most 1"),
        (["--threshold", "1"], "no sentence of class .* lower --threshold"),
        (["--min-words", "50"], "holds no sentence of 50 to 60 words"),
        (["--data", "none.csv"], "none.csv does not exist"),
        (["--exclude", "none.csv"], "--exclude none.csv does not exist"),
    ],
)
def test_bad_flags_end_in_one_line_and_code_2(
    material: dict[str, Any], change: list[str], message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    flags = ["--corpus", *material["corpus"], "--data", material["data"], "--out", material["out"]]
    code = run(
        "trainer", "", {"label": Command(LabelConfig, run_label)}, ["label", *flags, *change]
    )
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert (code, len(lines)) == (2, 1)
    assert re.search(message, lines[0])
    assert not Path(material["out"]).exists()
