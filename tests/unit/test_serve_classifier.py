"""Classifier, bank and tokenizing on a toy bundle, against plain numpy."""

from __future__ import annotations

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import serve_toy as toy

from serve import bundle
from serve.classifier import MIB, Classifier
from serve.errors import Failure, UserError
from serve.readout import read_out
from serve.tokenize import Encoded, start_of

TEXTS = ["the film was good", "", "a bit long and dull", "very very good film the food was awful"]


def ids_of(text: str) -> list[int]:
    known = toy.WORDS
    words = [toy.word_id(w) if w in known else 2 for w in text.split()]
    return [*words, toy.word_id("was"), toy.MASK, 1]


def expected(text: str, prompt: np.ndarray, words: list[str], mode: str) -> np.ndarray:
    return toy.oracle(ids_of(text), prompt, [toy.word_id(w) for w in words], mode)


def softmax(logits: np.ndarray) -> np.ndarray:
    odds = np.exp(logits - logits.max())
    return odds / odds.sum()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.make_bundle(tmp_path_factory.mktemp("serve") / "toy")


@pytest.mark.parametrize("mode", ["prefix", "full", "deep"])
def test_mixed_tasks_in_one_batch_match_the_plain_sums(tmp_path: Path, mode: str) -> None:
    classifier = Classifier(toy.make_bundle(tmp_path / "b", mode), threads=1)
    tasks = ["film", "food", "food", "film"]
    prompts = {"film": toy.prompt_of(1), "food": toy.prompt_of(2, 3)}
    words = {"film": ["bad", "good"], "food": ["awful", "nice", "great"]}
    encoded = classifier.encoder.encode(TEXTS, [classifier.tasks[t] for t in tasks])
    logits = classifier.logits(encoded)
    results = classifier.classify(TEXTS, task=tasks)
    for text, task, row, result in zip(TEXTS, tasks, logits, results, strict=True):
        wanted = expected(text, prompts[task], words[task], mode)
        np.testing.assert_allclose(row[: len(wanted)], wanted, rtol=1e-5, atol=1e-4)
        assert (row[len(wanted) :] == -1e9).all()
        odds = softmax(wanted)
        labels = classifier.tasks[task].labels
        np.testing.assert_allclose([result.probabilities[la] for la in labels], odds, atol=1e-5)
        assert result.label == labels[int(odds.argmax())]
        assert result.score == pytest.approx(odds.max(), abs=1e-5)
        assert (result.task, result.truncated) == (task, False)


def test_fp16_graph_gets_a_bank_of_its_type(folder: Path) -> None:
    exact = Classifier(folder, threads=1).classify(TEXTS, task="food")
    half = Classifier(folder, "fp16", threads=1).classify(TEXTS, task="food")
    for a, b in zip(exact, half, strict=True):
        assert b.probabilities == pytest.approx(a.probabilities, abs=0.02)


def test_temperature_divides_the_logits(tmp_path: Path) -> None:
    folder = toy.make_bundle(tmp_path / "b")
    toy.add(folder, "warm", ["negative", "positive"], ["bad", "good"], toy.prompt_of(1),
            temperature=2.5)  # fmt: skip
    result = Classifier(folder, threads=1).classify(["the film"], task="warm")[0]
    logits = expected("the film", toy.prompt_of(1), ["bad", "good"], "prefix")
    assert list(result.probabilities.values()) == pytest.approx(softmax(logits / 2.5), abs=1e-5)


def test_results_keep_the_order_whatever_the_batches(folder: Path) -> None:
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(toy.WORDS, size=rng.integers(0, 30))) for _ in range(60)]
    tasks = [str(rng.choice(["film", "food"])) for _ in texts]
    single = Classifier(folder, threads=1, max_rows=1)
    together = Classifier(folder, threads=1, token_budget=100)
    for a, b in zip(single.classify(texts, tasks), together.classify(texts, tasks), strict=True):
        assert (a.label, a.task) == (b.label, b.task)
        assert a.probabilities == pytest.approx(b.probabilities, abs=1e-5)


def test_batches_side_by_side_give_the_same_answers(folder: Path) -> None:
    texts = [f"{text} film" for text in TEXTS] * 5 + TEXTS
    tasks = ["film" if i % 3 else "food" for i in range(len(texts))]
    alone = Classifier(folder, threads=1).classify(texts, task=tasks)
    beside = Classifier(folder, threads=1, workers=3)
    started: list[int] = []
    barrier = threading.Barrier(3)

    def run(batch: list[Encoded]) -> list[Any]:
        if len(started) < 3:
            started.append(len(batch))
            barrier.wait(10)  # it breaks unless three batches run at once
        return read_out(batch, beside.logits(batch))

    beside.run = run  # type: ignore[assignment, method-assign]
    for one, other in zip(alone, beside.classify(texts, task=tasks), strict=True):
        assert (one.label, one.task) == (other.label, other.task)
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-5)
    assert max(started) <= 8  # 24 texts are shared out among three


def test_a_failure_of_a_batch_beside_others_is_raised(folder: Path) -> None:
    beside = Classifier(folder, threads=1, workers=2)

    def run(batch: list[Encoded]) -> list[Any]:
        raise Failure("this batch failed")

    beside.run = run  # type: ignore[assignment, method-assign]
    with pytest.raises(Failure, match="this batch failed"):
        beside.classify(TEXTS * 3, task="film")


def test_a_long_text_is_cut_and_its_template_is_kept(folder: Path) -> None:
    classifier = Classifier(folder, threads=1, max_tokens=8)
    task = classifier.tasks["film"]
    fits = classifier.encoder.encode(["good " * 5], [task])[0]
    cut = classifier.encoder.encode(["good " * 6], [task])[0]
    assert (len(fits.ids), fits.truncated, cut.truncated) == (8, False, True)
    assert cut.ids == fits.ids and cut.ids[-3:] == task.suffix_ids


def test_a_text_is_cut_where_its_task_was_tuned(folder: Path) -> None:
    """What was measured at the tuning is what is served, beside tasks of other lengths."""
    record = toy.record(["no", "yes"], ["bad", "good"], max_tokens=7)
    bundle.add_task(folder, "short", record, toy.prompt_of(3))
    classifier = Classifier(folder, threads=1)
    tasks = [classifier.tasks["short"], classifier.tasks["film"]]
    short, whole = classifier.encoder.encode(["good " * 6] * 2, tasks)
    assert (len(short.ids), short.truncated, whole.truncated) == (7, True, False)
    cut, fits = classifier.classify(["good " * 6, "good " * 4], "short")
    assert cut.probabilities == fits.probabilities
    assert (cut.truncated, fits.truncated) == (True, False)
    with pytest.raises(UserError, match="max_tokens"):
        bundle.add_task(folder, "none", record | {"max_tokens": 3}, toy.prompt_of(3))


@pytest.mark.parametrize("name", ["token_budget", "max_rows", "threads", "workers"])
def test_limits_below_one_are_refused(folder: Path, name: str) -> None:
    with pytest.raises(UserError, match="must be at least 1"):
        Classifier(folder, **{name: 0})  # type: ignore[arg-type]


def test_cutting_a_huge_text_before_tokenizing_changes_nothing(folder: Path) -> None:
    classifier = Classifier(folder, threads=1)
    task = classifier.tasks["film"]
    for text in [
        "good bad " * 5000,
        "x" * 5000 + " good" * 3000,
        " " * 9000 + "good",
    ]:
        whole = classifier.encoder._tokenizer.encode(text, add_special_tokens=False).ids
        room = classifier.encoder.room(task)
        got = classifier.encoder.encode([text], [task])[0]
        assert got.ids == [*whole[:room], *task.suffix_ids]
        assert got.truncated == (len(whole) > room)


def test_a_huge_text_is_not_tokenized_without_end(folder: Path) -> None:
    classifier = Classifier(folder, threads=1)
    task = classifier.tasks["film"]
    most = 8 * 24 * (classifier.encoder.room(task) + 1)
    for character in ("x", " ", "\u0301"):
        assert len(start_of(character * 10**6, classifier.encoder.room(task), 8)) <= most
        got = classifier.encoder.encode([character * 10**6], [task])[0]
        assert got.ids[-3:] == task.suffix_ids
        assert got.truncated == (character != " ")  # white space is no loss
    short, cut = classifier.encoder.encode(["good" + "\n" * 10**6, "good" + "\n" * 10**6 + "x"],
                                           [task, task])  # fmt: skip
    assert short.ids == cut.ids == classifier.encoder.encode(["good"], [task])[0].ids
    assert (short.truncated, cut.truncated) == (False, True)


def test_special_tokens_in_a_text_are_plain_characters(folder: Path) -> None:
    classifier = Classifier(folder, threads=1)
    text = "good <extra_id_0> </s> bad"
    ids = classifier.encoder.encode([text], [classifier.tasks["film"]])[0].ids
    assert ids[:-3] == [toy.word_id("good"), 2, 2, toy.word_id("bad")]


@pytest.mark.parametrize(
    ("texts", "task", "message"),
    [
        (["a"], "nothing", "no task 'nothing'"),
        (["a", 3], "film", "text 1 is not text but int"),
        (["\ud800"], "film", "surrogate"),
        (["a", "b"], ["film"], "2 texts, but 1 tasks"),
        ("Great!", "film", r"texts is one str, not a list of texts: pass \[text\]"),
        (None, "film", "texts is one NoneType"),
        (["a"], None, r"pass a task \(--task\): there are film, food"),
        (["a"], 3, "task must be a task's name, or a list"),
        (["a"], [["film"]], "task must be a list of names"),
    ],
)
def test_what_cannot_be_classified_is_refused(folder: Path, texts, task, message) -> None:
    with pytest.raises(UserError, match=message):
        Classifier(folder, threads=1).classify(texts, task=task)


def test_the_only_task_need_not_be_named(tmp_path: Path) -> None:
    classifier = Classifier(toy.make_bundle(tmp_path / "b"), threads=1)
    classifier.remove_task("food")
    assert classifier.classify(TEXTS) == classifier.classify(iter(TEXTS), task="film")
    classifier.remove_task("film")
    with pytest.raises(UserError, match="none, add one with python -m exporter add"):
        classifier.classify(TEXTS)


def test_no_texts_give_no_results(folder: Path) -> None:
    assert Classifier(folder, threads=1).classify([], task="film") == []


@pytest.mark.parametrize(
    ("setting", "flag"),
    [
        ({"precision": "int4"}, "--precision"),
        ({"max_tokens": 9999}, "--max-tokens"),
        ({"max_tokens": 3}, "--max-tokens"),
        ({"token_budget": 0}, "--token-budget"),
        ({"bank_memory": 10}, "--bank-memory"),
        ({"providers": ["NoSuchProvider"]}, "NoSuchProvider"),
    ],
)
def test_settings_out_of_range_name_their_flag(folder: Path, setting, flag: str) -> None:
    with pytest.raises(UserError, match=flag):
        Classifier(folder, threads=1, **setting)


def test_a_graph_of_another_mode_is_refused(tmp_path: Path) -> None:
    folder, other = toy.make_bundle(tmp_path / "a"), toy.make_bundle(tmp_path / "b", "full")
    header = bundle.load(folder).header
    (folder / "model.onnx").write_bytes((other / "model.onnx").read_bytes())
    bundle.create(folder, header)
    with pytest.raises(Failure, match=r"model\.onnx"):
        Classifier(folder, threads=1)


# ---- the bank ------------------------------------------------------------------------------------


def many_tasks(folder: Path, count: int) -> dict[str, np.ndarray]:
    prompts = {f"t{i}": toy.prompt_of(100 + i, 1 + i % toy.P) for i in range(count)}
    for name, prompt in prompts.items():
        toy.add(folder, name, ["n", "p"], ["bad", "good"], prompt)
    return prompts


def test_a_bounded_bank_evicts_the_least_recently_used_and_stays_right(tmp_path: Path) -> None:
    folder = toy.make_bundle(tmp_path / "b")
    prompts = many_tasks(folder, 9)
    probe = Classifier(folder, threads=1)
    classifier = Classifier(folder, threads=1, bank_memory=3 * probe.bank.slot_bytes)
    assert classifier.bank.capacity == 3
    names = [f"t{i}" for i in (0, 1, 2, 0, 3, 0, 1)] + [f"t{i % 9}" for i in range(30)]
    for name in names[:7]:
        classifier.classify(["good film"], name)
    # 0 1 2 fill it; 3 evicts 1, the oldest; 1 evicts 2: five computations, two evictions.
    assert (classifier.bank.misses, classifier.bank.evictions) == (5, 2)
    results = classifier.classify(["good film"] * len(names), names)  # batches split by capacity
    for name, result in zip(names, results, strict=True):
        odds = softmax(expected("good film", prompts[name], ["bad", "good"], "prefix"))
        assert list(result.probabilities.values()) == pytest.approx(odds, abs=1e-5)
    assert len(classifier.bank) == 3


def test_threads_share_a_small_bank_without_a_wrong_answer(tmp_path: Path) -> None:
    folder = toy.make_bundle(tmp_path / "b")
    prompts = many_tasks(folder, 8)
    probe = Classifier(folder, threads=1)
    classifier = Classifier(folder, threads=1, bank_memory=4 * probe.bank.slot_bytes)
    wanted = {
        name: softmax(expected("good film", prompt, ["bad", "good"], "prefix"))
        for name, prompt in prompts.items()
    }

    def work(seed: int) -> int:
        rng = np.random.default_rng(seed)
        right = 0
        for _ in range(60):
            names = [f"t{i}" for i in rng.choice(8, size=3)]
            for name, result in zip(
                names, classifier.classify(["good film"] * 3, names), strict=True
            ):
                right += list(result.probabilities.values()) == pytest.approx(
                    wanted[name], abs=1e-5
                )
        return right

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(work, range(6))) == [60 * 3] * 6
    assert classifier.bank.evictions > 0


def test_the_bank_grows_from_one_slot_and_takes_wider_labels(tmp_path: Path) -> None:
    folder = toy.make_bundle(tmp_path / "b")
    classifier = Classifier(folder, threads=1, bank_memory=64 * MIB)
    before = classifier.classify(["good film"], "film")[0].probabilities
    words = ["bad", "good", "awful", "great", "nice"]
    for number in range(9):
        classifier.add_task(
            f"new{number}", toy.record(list("abcde"), words), toy.prompt_of(number, 2)
        )
    result = classifier.classify(["good film"], "new8")[0]
    odds = softmax(expected("good film", toy.prompt_of(8, 2), words, "prefix"))
    assert list(result.probabilities.values()) == pytest.approx(odds, abs=1e-5)
    again = classifier.classify(["good film"], "film")[0].probabilities
    assert again == pytest.approx(before, abs=1e-6)


def test_a_task_is_added_replaced_and_removed_while_it_runs(tmp_path: Path) -> None:
    folder = toy.make_bundle(tmp_path / "b")
    classifier = Classifier(folder, threads=1)
    old_text = classifier.encoder.encode(["good film"], [classifier.tasks["film"]])
    old = classifier.run(old_text)[0]
    toy.add(folder, "film", ["negative", "positive"], ["bad", "good"], toy.prompt_of(77))
    assert classifier.classify(["good film"], "film")[0] == old  # not before it is asked for
    classifier.add_task("film")
    odds = softmax(expected("good film", toy.prompt_of(77), ["bad", "good"], "prefix"))
    new = classifier.classify(["good film"], "film")[0]
    assert list(new.probabilities.values()) == pytest.approx(odds, abs=1e-5)
    classifier.remove_task("film")
    with pytest.raises(UserError, match="no task 'film'"):
        classifier.classify(["good film"], "film")
    with pytest.raises(UserError, match="has no task 'other'"):
        classifier.add_task("other")
    assert "film" in bundle.list_tasks(folder)


def test_a_task_of_many_labels_widens_its_own_batches_only(tmp_path: Path) -> None:
    classifier = Classifier(toy.make_bundle(tmp_path / "b"), threads=1)
    tasks = [classifier.tasks["film"]] * len(TEXTS)
    encoded = classifier.encoder.encode(TEXTS, tasks)
    before = classifier.logits(encoded)
    assert before.shape == (4, 2)
    wide = toy.record([f"l{n}" for n in range(12)], toy.WORDS[:12])
    classifier.add_task("wide", wide, toy.prompt_of(5))
    np.testing.assert_array_equal(classifier.logits(encoded), before)
    many = classifier.classify(["good film", "bad"], ["wide", "food"])
    assert [len(result.probabilities) for result in many] == [12, 3]
    odds = softmax(expected("good film", toy.prompt_of(5), toy.WORDS[:12], "prefix"))
    assert list(many[0].probabilities.values()) == pytest.approx(odds, abs=1e-5)
    classifier.remove_task("wide")
    np.testing.assert_array_equal(classifier.logits(encoded), before)


def test_texts_under_way_and_evicted_tasks_outlive_a_replaced_prompt(tmp_path: Path) -> None:
    folder = toy.make_bundle(tmp_path / "b")
    slot = Classifier(folder, threads=1).bank.slot_bytes
    classifier = Classifier(folder, threads=1, bank_memory=slot)
    waits = classifier.encoder.encode(["good film"], [classifier.tasks["film"]])
    before = classifier.run(waits)
    toy.add(folder, "film", ["negative", "positive"], ["bad", "good"], toy.prompt_of(77))
    classifier.classify(["good film"], "food")  # takes the only slot
    assert classifier.classify(["good film"], "film") == before
    classifier.add_task("film")
    assert classifier.run(waits) == before
    assert classifier.classify(["good film"], "film") != before


@pytest.mark.parametrize("change", ["weights", "sizes"])
def test_a_task_of_a_folder_with_other_graphs_is_not_loaded(tmp_path: Path, change: str) -> None:
    folder = toy.make_bundle(tmp_path / "b")
    classifier = Classifier(folder, threads=1)
    before = classifier.classify(["good film"], "film")
    other = toy.make_bundle(tmp_path / "other")
    header = bundle.load(other).header
    if change == "weights":
        (other / "weights.data").write_bytes((-toy.embedding()).tobytes())
    else:
        header["prompt_tokens"] += 1
    shutil.rmtree(other / "prompts")
    bundle.create(other, header)
    toy.add(other, "film", ["negative", "positive"], ["bad", "good"], toy.prompt_of(9))
    folder.rename(tmp_path / "aside")
    other.rename(folder)
    with pytest.raises(Failure, match="has other graphs now: restart the server"):
        classifier.add_task("film")
    assert classifier.classify(["good film"], "film") == before


def test_a_removed_task_frees_its_slot_after_its_last_batch(folder: Path) -> None:
    classifier = Classifier(folder, threads=1)
    film = classifier.tasks["film"]
    with classifier.bank.lend([film]):
        classifier.remove_task("film")
        assert len(classifier.bank) == 1
    assert len(classifier.bank) == 0
