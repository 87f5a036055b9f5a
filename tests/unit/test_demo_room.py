"""The demo without its page: visitors, why, compare, on the toy bundle."""

from __future__ import annotations

import html
import math
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import serve_toy as toy

pytest.importorskip("gradio")

from demo import compare, why
from demo.parts import cut_note, plain
from demo.state import MAX_TEXT, Limits, Room, random_like, record_of
from demo.tabs.many import classify_all
from serve import bundle
from serve.classifier import Classifier
from serve.errors import UserError
from serve.readout import Result

TEXT = "the film was very long and great"


@pytest.fixture
def room(tmp_path: Path) -> Room:
    return Room(Classifier(toy.make_bundle(tmp_path / "bundle"), threads=1))


def teach(room: Room, session: str, name: str, seed: int = 5) -> None:
    record = toy.record(["left", "right"], ["dull", "nice"])
    room.add(session, name, record, {"prompt_embeddings": toy.prompt_of(seed)})


# ---- visitors --------------------------------------------------------------------------------


def test_a_taught_task_is_its_visitors_alone(room: Room) -> None:
    teach(room, "ada", "side")
    assert room.names("ada") == ["film", "food", "side"]
    assert room.names("bob") == ["film", "food"]
    answer = room.classify("ada", ["nice film"], "side").results[0]
    assert set(answer.probabilities) == {"left", "right"}
    with pytest.raises(UserError, match=r"no task “side” here\. Choose one of: film, food"):
        room.classify("bob", ["nice film"], "side")
    with pytest.raises(UserError, match="no task"):  # nor by the name it has in the classifier
        room.classify("bob", ["nice film"], room.key("ada", "side"))


def test_two_visitors_may_use_one_name_for_two_tasks(room: Room) -> None:
    teach(room, "ada", "side", seed=5)
    teach(room, "bob", "side", seed=6)
    a, b = (room.classify(who, [TEXT], "side").results[0].score for who in ("ada", "bob"))
    assert abs(a - b) > 1e-4


def test_tasks_go_with_their_visitor(room: Room) -> None:
    before = set(room.classifier.tasks)
    teach(room, "ada", "side")
    room.leave("ada")
    assert set(room.classifier.tasks) == before
    assert room.names("ada") == ["film", "food"]


def test_tasks_go_with_a_visitor_who_has_been_silent_for_an_hour(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr("demo.state.time.monotonic", lambda: now[0])
    before = set(room.classifier.tasks)
    for who in ("ada", "bob"):
        teach(room, who, "side")
    now[0] += 3600
    room.visitor("eve")
    assert room.names("bob") == ["film", "food", "side"]  # not silent: he asks
    now[0] += 1
    room.visitor("eve")
    assert room.names("ada") == ["film", "food"]
    assert room.names("bob") == ["film", "food", "side"]
    assert set(room.classifier.tasks) == before | {room.key("bob", "side")}


def test_a_run_that_ends_after_its_visitor_left_serves_nothing(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set(room.classifier.tasks)
    add = room.classifier.add_task

    def leave_meanwhile(*args: object) -> object:
        room.leave("ada")
        return add(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(room.classifier, "add_task", leave_meanwhile)
    with pytest.raises(UserError, match="left"):
        teach(room, "ada", "side")
    assert set(room.classifier.tasks) == before


def test_who_left_before_the_end_is_not_taken_for_a_new_visitor(room: Room) -> None:
    before = set(room.classifier.tasks)
    visitor = room.visitor("ada")
    room.leave("ada")
    record = toy.record(["left", "right"], ["dull", "nice"])
    with pytest.raises(UserError, match="left"):
        room.add("ada", "side", record, {"prompt_embeddings": toy.prompt_of(5)}, visitor=visitor)
    assert visitor.cancel.is_set() and set(room.classifier.tasks) == before


def test_teaching_a_name_again_replaces_the_task(room: Room) -> None:
    teach(room, "ada", "side", seed=5)
    first = room.classify("ada", [TEXT], "side").results[0].score
    teach(room, "ada", "side", seed=9)
    assert room.names("ada") == ["film", "food", "side"]
    assert abs(room.classify("ada", [TEXT], "side").results[0].score - first) > 1e-4


def test_one_table_is_of_one_prompt_though_a_lesson_replaces_it(room: Room) -> None:
    teach(room, "ada", "side", seed=5)
    alone = room.classify("ada", [TEXT], "side").results[0]
    rows = classify_all(room, "ada", [TEXT] * 600, "side")
    next(rows)
    record = toy.record(["up", "down"], ["nice", "dull"])
    room.add("ada", "side", record, {"prompt_embeddings": toy.prompt_of(9)})
    table = list(rows)[-1][1]
    assert table is not None
    assert set(table["label"]) == {alone.label} and len(table) == 600
    assert table["p(left)"].nunique() == 1


def test_nobody_waits_for_the_variants_of_a_task(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on, made = threading.Event(), threading.Event(), []
    make = room._make_variants

    def slowly(key: str) -> dict[str, str]:
        begun.set()
        assert go_on.wait(10)
        made.append(key)
        return make(key)

    monkeypatch.setattr(room, "_make_variants", slowly)
    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(room.variants, who, "film") for who in ("ada", "bob")]
        assert begun.wait(10)
        assert pool.submit(room.key, "eve", "food").result(timeout=5) == "food"
        go_on.set()
        first, second = (future.result(timeout=10) for future in asked)
    assert first == second and made == ["film"]  # made once, for both


def test_variants_that_a_later_lesson_has_not_go(room: Room) -> None:
    record = toy.record(["left", "right"], ["dull", "nice"])
    arrays = [{"prompt_embeddings": toy.prompt_of(seed)} for seed in (5, 6, 7)]
    room.add("ada", "side", record, arrays[0], {"from-best": arrays[1], "metapt": arrays[2]})
    room.add("ada", "side", record, arrays[0], {"metapt": arrays[1]})
    assert set(room.variants("ada", "side")) == {"tuned", "metapt"}
    own = [name for name in room.classifier.tasks if name.startswith("visitor.")]
    assert len(own) == 2
    room.leave("ada")
    assert not [name for name in room.classifier.tasks if name.startswith("visitor.")]


def test_the_number_of_tasks_is_bounded(tmp_path: Path) -> None:
    classifier = Classifier(toy.make_bundle(tmp_path / "bundle"), threads=1)
    room = Room(classifier, Limits(tasks=1, visitors=1))
    with pytest.raises(UserError, match="bundle has a task “film”"):
        room.check_can_teach("ada", "film")
    room.check_can_teach("ada", "side")
    teach(room, "ada", "side")
    room.check_can_teach("ada", "side")
    with pytest.raises(UserError, match="taught 1 tasks"):
        room.check_can_teach("ada", "other")
    with pytest.raises(UserError, match="Too many visitors"):
        room.check_can_teach("bob", "side")


def test_a_long_text_is_refused_in_words(room: Room) -> None:
    with pytest.raises(UserError, match="5,001 characters; this page takes 5,000"):
        room.classify("ada", ["x" * (MAX_TEXT + 1)], "film")


def test_sizes_are_those_of_the_files(room: Room) -> None:
    folder = room.classifier.bundle.folder
    shared = (folder / "model.onnx").stat().st_size + (folder / "weights.data").stat().st_size
    assert room.backbone_bytes() == shared
    task = room.bundled["film"]
    assert room.prompt_bytes(task) == (folder / task.prompt).stat().st_size


# ---- why -------------------------------------------------------------------------------------


def test_weights_are_those_of_texts_that_lack_the_word(room: Room) -> None:
    found = why.explain(room, "ada", TEXT, "film")
    assert found.batches == 1
    words = TEXT.split()
    assert [TEXT[p.start : p.end] for p in found.pieces] == words
    label = found.result.label
    whole = room.classifier.classify([TEXT], "film")[0].probabilities[label]
    for index, piece in enumerate(found.pieces):
        without = " ".join(words[:index] + words[index + 1 :])
        p = room.classifier.classify([without], "film")[0].probabilities[label]
        assert piece.without == pytest.approx(p, abs=1e-6)
        weight = math.log(whole / (1 - whole)) - math.log(p / (1 - p))
        assert piece.weight == pytest.approx(weight, abs=1e-4)


def test_a_long_text_is_cut_into_neighbours() -> None:
    text = " ".join(f"w{i}" for i in range(250))
    pieces = why.spans(text, 96)
    assert len(pieces) == 84  # 250 words in threes
    assert [text[a:b] for a, b in pieces[:2]] == ["w0 w1 w2", "w3 w4 w5"]
    assert text[pieces[-1][0] : pieces[-1][1]] == "w249"


def test_coloured_words_are_escaped_and_complete(room: Room) -> None:
    text = 'good <script>alert("x")</script> film'
    shown = why.coloured(text, why.explain(room, "ada", text, "film"))
    assert "<script" not in shown
    assert (
        re.sub(r"<[^>]*>", "", shown)
        == "good &lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt; film"
    )


FOUND = why.Explanation(
    Result("good", 0.8, {"good": 0.8, "bad": 0.2}, False, "film"),
    [
        why.Piece(0, 3, 0.5, 0.7, "good"),
        why.Piece(4, 7, -2.0, 0.96, "good"),
        why.Piece(8, 13, 1.5, 0.4, "bad"),
        why.Piece(14, 15, 0.0, 0.8, "good"),
    ],
    1.0,
    1,
)  # of the text "one two three ."


def test_a_word_is_tinted_by_its_side_and_by_its_share_of_the_heaviest() -> None:
    shown = why.coloured("one two three .", FOUND)
    spans = re.findall(r'class="(\w+)" style="--a:([\d.]+)" title="([^"]*)">([^<]*)<', shown)
    told = "without it: good {} (whole text 80%)"
    assert [(word, kind, float(shade)) for kind, shade, _, word in spans] == [
        ("one", "for", 0.19),  # 0.75 x 0.5 / 2
        ("two", "against", 0.75),
        ("three", "for", 0.56),
        (".", "for", 0.0),
    ]
    assert [title for _, _, title, _ in spans] == [
        told.format(share) for share in ("70%", "96%", "40%", "80%")
    ]


def test_the_heaviest_words_come_first_whichever_their_side() -> None:
    rows = [
        ["two", "-2.00", "96%", "good"], ["three", "+1.50", "40%", "bad"],
        ["one", "+0.50", "70%", "good"], [".", "+0.00", "80%", "good"],
    ]  # fmt: skip
    assert why.ranking("one two three .", FOUND) == rows
    assert why.ranking("one two three .", FOUND, 2) == rows[:2]


def test_no_word_is_told(room: Room) -> None:
    with pytest.raises(UserError, match="no word"):
        why.explain(room, "ada", " \n", "film")


# ---- compare ---------------------------------------------------------------------------------


def test_compare_reads_every_prompt_under_the_tasks_labels(tmp_path: Path) -> None:
    folder = toy.make_bundle(tmp_path / "bundle")
    toy.add(folder, "film-from-random", ["negative", "positive"], ["bad", "good"], toy.prompt_of(3))
    toy.add(
        folder, "metapt", ["bad", "good"], ["bad", "good"], toy.prompt_of(4),
        info={"method": "metapt"},
    )  # fmt: skip
    room = Room(Classifier(folder, threads=1))
    assert room.names("ada") == ["film", "food"]  # starts and second prompts are no tasks
    found = compare.compare(room, "ada", TEXT)
    assert {task: set(row) for task, row in found.answers.items()} == {
        "film": {"tuned", "from-random", "metapt", "random"},
        "food": {"tuned", "metapt", "random"},
    }
    ids = [2 if w not in toy.WORDS else toy.word_id(w) for w in TEXT.split()]
    ids += [toy.word_id("was"), toy.MASK, 1]
    words = [toy.word_id(word) for word in ("awful", "nice", "great")]
    logits = toy.oracle(ids, toy.prompt_of(4), words, "prefix")
    odds = np.exp(logits - logits.max())
    assert list(found.answers["food"]["metapt"].probabilities.values()) == pytest.approx(
        (odds / odds.sum()).tolist(), abs=1e-5
    )


def test_a_changed_answer_is_marked_and_names_are_escaped(room: Room) -> None:
    teach(room, "ada", "<b>side</b>")
    found = compare.compare(room, "ada", TEXT)
    html = compare.table(found, {})
    assert "<b>side" not in html and "&lt;b&gt;side" in html and "changed" not in html
    old = found.labels()
    changed = {key: ("nix" if key == "film/tuned" else label) for key, label in old.items()}
    html = compare.table(found, changed)
    assert html.count("class=changed") == 1 and "was nix" in html


def test_noise_for_comparison_is_as_wide_as_the_prompts_own_numbers() -> None:
    generator = np.random.default_rng(3)
    spreads = {"kv": 0.02, "states": 7.0}
    prompt = {
        name: generator.normal(5.0, spread, (40, 100)).astype(np.float32)
        for name, spread in spreads.items()
    }
    found = random_like(prompt)
    assert set(found) == set(spreads)
    for name, spread in spreads.items():
        assert (found[name].shape, found[name].dtype) == ((40, 100), np.float32)
        assert float(found[name].std()) == pytest.approx(spread, rel=0.05)
        assert abs(float(found[name].mean())) < 0.1 * spread


def test_record_of_a_task_adds_the_same_task(room: Room) -> None:
    task = room.bundled["food"]
    prompt = room.classifier.bundle.read_prompt(task)
    room.classifier.add_task("copy", record_of(task), prompt)
    first, second = room.classifier.classify([TEXT, TEXT], ["food", "copy"])
    assert list(first.probabilities) == list(second.probabilities)
    assert second.score == pytest.approx(first.score, abs=1e-6)


def test_the_bundle_on_disk_is_never_changed(room: Room) -> None:
    folder = room.classifier.bundle.folder
    before = (folder / "bundle.json").read_bytes()
    teach(room, "ada", "side")
    compare.compare(room, "ada", TEXT)
    assert (folder / "bundle.json").read_bytes() == before
    assert set(bundle.list_tasks(folder)) == {"film", "food"}


# ---- words on the page -----------------------------------------------------------------------


def test_what_a_visitor_typed_is_shown_as_it_is() -> None:
    typed = "a_b & <b>*x*</b> `c` [d](e) #1 | ~f~ $g$ &lt; {h} \\"
    shown = plain(typed)
    assert html.unescape(shown) == typed
    assert not set("<>*_`[]|~$") & set(shown)


def test_a_cut_text_is_told_by_what_its_task_reads(room: Room) -> None:
    record = toy.record(["left", "right"], ["dull", "nice"]) | {"max_tokens": 9}
    room.add("ada", "short", record, {"prompt_embeddings": toy.prompt_of(5)})
    task = room.task("ada", "short")
    left = 9 - len(task.prefix_ids) - len(task.suffix_ids)
    assert f"the first {left} tokens" in cut_note(room, "ada", "short")
    text = "good " * 9
    *_, (_, table) = classify_all(room, "ada", [text, "good", "good" + " " * MAX_TEXT], "short")
    assert table is not None and table["cut"].tolist() == [True, False, True]
    assert table.columns.tolist() == [
        "row", "text", "label", "confidence", "p(left)", "p(right)", "cut",
    ]  # fmt: skip
    assert compare.compare(room, "ada", text).answers["short"]["tuned"].truncated


def test_the_batches_that_are_told_are_those_that_ran(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []
    run = room.classifier.run
    monkeypatch.setattr(room.classifier, "run", lambda rows: ran.append(len(rows)) or run(rows))
    found = compare.compare(room, "ada", TEXT)
    assert found.batches == len(ran)
    most = room.classifier.limits.rows
    many = room.classify("ada", ["good"] * (2 * most + 1), "film")
    assert many.batches == len(ran) - found.batches >= 3
    with pytest.raises(UserError, match="text 0 holds half of a surrogate pair"):
        why.explain(room, "ada", "good \ud800", "film")
