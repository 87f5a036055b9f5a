"""Which runs a table is made of, and what their hashes depend on."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from serve.errors import Failure, UserError
from trainer.backbone import backbone_mark
from trainer.reproduce.command import missing_jobs
from trainer.reproduce.config import ReproduceConfig
from trainer.reproduce.limits import Facts, TaskFacts
from trainer.reproduce.plan import UNBUILT, asked, make_plan, sources_needed
from trainer.reproduce.sources import balanced_rows, encoder_mark
from trainer.reproduce.store import Store, settings_hash
from trainer.tasks import PAPER_TASKS, get_task

FACTS = Facts(
    "b" * 64,
    {task: TaskFacts(task[::-1], 4000, 500) for task in PAPER_TASKS},
    {
        "text": {"sha": "t" * 16, "rows": 3000, "clustered": False},
        "yelp": {"sha": "y" * 16, "rows": 900, "clustered": False},
    },
    "an-encoder",
)


def hashes(config: ReproduceConfig) -> list[str]:
    return [settings_hash(run.settings) for run in make_plan(config, FACTS)]


def test_table1_has_every_row_task_and_seed_once() -> None:
    config = ReproduceConfig(what="table1", modes=["full", "prefix"])
    plan = make_plan(config, FACTS)
    # FT and SetFit have no prompt, so no mode; the four others run in both.
    assert len(plan) == (2 + 4 * 2) * 7 * 5
    assert len(set(hashes(config))) == len(plan)
    starts = {settings_hash(run.start) for run in plan if run.start}
    assert len(starts) == 3 * 2  # PPT, MetaPT and MetaPT(Y), in each mode
    ours = next(run for run in plan if run.row == "MetaPT" and run.mode == "full")
    assert ours.start is not None
    assert ours.start["inner_rate"] == 0.08 and ours.start["rate"] == 0.025
    assert ours.settings["rate"] == 3e-3 and ours.settings["prompt_tokens"] == 100
    assert ours.start["source"] == {
        "sha": "t" * 16, "rows": 0, "grouping": "kmeans", "clusters": 10, "encoder": "an-encoder",
    }  # fmt: skip


def test_full_tuning_has_a_rate_of_its_own() -> None:
    config = ReproduceConfig(
        what="table1", methods=["ft", "pt", "ppt"], tasks=["sst2"], seeds=[1], rate=0.02,
        ft_rate=0.0004,
    )  # fmt: skip
    rates = {run.row: run.settings["rate"] for run in make_plan(config, FACTS)}
    assert rates == {"FT": 0.0004, "PT (random start)": 0.02, "PPT": 0.02}


def test_table2_and_figures_share_the_runs_of_table1() -> None:
    first = set(hashes(ReproduceConfig(what="table1")))
    second = ReproduceConfig(what="table2")
    plan = make_plan(second, FACTS)
    assert [run.row for run in plan[::5]] == [
        "MetaPT, K-means", "MetaPT, LDA", "MetaPT, random", "MetaPT, label", "PPT",
    ]  # fmt: skip
    shared = [run.row for run in plan if settings_hash(run.settings) in first]
    assert shared == ["MetaPT, K-means"] * 5 + ["PPT"] * 5
    k = make_plan(ReproduceConfig(what="figure3b"), FACTS)
    assert {run.x for run in k} == {3, 6, 10, 15, 20, 25, 30}
    assert {settings_hash(run.settings) for run in k if run.x == 10} <= first
    sizes = make_plan(ReproduceConfig(what="figure3a", methods=["metapt"]), FACTS)
    assert [run.x for run in sizes[::5]] == [1000, 2000, 3000]
    assert {settings_hash(run.settings) for run in sizes if run.x == 3000} <= first
    samples = make_plan(ReproduceConfig(what="figure2", methods=["ft"]), FACTS)
    assert [run.settings["train"] for run in samples[::5]] == [10 * 2**i for i in range(9)]


def test_hash_depends_on_what_changes_a_result_and_on_nothing_else() -> None:
    base = ReproduceConfig(what="table1", methods=["metapt"], tasks=["sst2"], seeds=[1])
    (name,) = hashes(base)
    for same in (
        replace(base, out="elsewhere"), replace(base, jobs=4), replace(base, threads=2),
        replace(base, device="cpu"), replace(base, data_dir="moved"), replace(base, start_seed=1),
    ):  # fmt: skip
        assert hashes(same) == [name]
    for other in (
        replace(base, seeds=[2]), replace(base, modes=["prefix"]), replace(base, rate=1e-3),
        replace(base, inner_rate=0.1), replace(base, clusters=5), replace(base, train=20),
        replace(base, learn_rates=True), replace(base, each_step=5),
        replace(base, outer_decay=True), replace(base, outer_clip=0.5), replace(base, limit_eval=9),
        replace(base, start="random"), replace(base, samples=8), replace(base, start_seed=2),
    ):  # fmt: skip
        assert hashes(other) != [name]
    moved = replace(FACTS, backbone="c" * 64)
    assert settings_hash(make_plan(base, moved)[0].settings) != name


def test_the_encoder_is_part_of_what_it_groups_and_of_nothing_else() -> None:
    config = ReproduceConfig(what="table2", seeds=[1])
    other = replace(FACTS, encoder="another")
    changed = [
        run.row
        for run, moved in zip(make_plan(config, FACTS), make_plan(config, other), strict=True)
        if run.start != moved.start
    ]
    assert changed == ["MetaPT, K-means"]
    given = {"text": {**FACTS.sources["text"], "clustered": True}}
    config = ReproduceConfig(what="table1", methods=["metapt", "ft", "setfit"], tasks=["sst2"])
    first, second = (
        {run.row: run.settings for run in make_plan(config, replace(facts, sources=given))}
        for facts in (FACTS, other)
    )
    assert [row for row in first if first[row] != second[row]] == ["SetFit (all-MiniLM-L6-v2)"]


def test_a_source_has_no_more_rows_than_it_has() -> None:
    config = ReproduceConfig(what="figure3a", methods=["metapt"], sizes=[1000, 10**9])
    with pytest.raises(UserError, match=r"--sizes 1000000000: the source has \d+ rows"):
        make_plan(config, FACTS)
    unbuilt = replace(FACTS, sources={**FACTS.sources, "text": UNBUILT})  # it may have as many
    assert {run.x for run in make_plan(config, unbuilt)} == {1000, 10**9}


def test_a_limit_of_all_there_is_is_no_other_run() -> None:
    """A start of T5-base takes hours: it is not trained again for a limit that limits nothing."""
    base = ReproduceConfig(what="table1", methods=["ppt", "metapt"], tasks=["sst2"], seeds=[1])
    for same in (
        replace(base, source_rows=3000), replace(base, source_rows=9999),
        replace(base, limit_eval=500), replace(base, limit_eval=501),
    ):  # fmt: skip
        assert hashes(same) == hashes(base)
    for other in (replace(base, source_rows=2999), replace(base, limit_eval=499)):
        assert not set(hashes(other)) & set(hashes(base))
    curve = ReproduceConfig(what="figure3a", methods=["ppt"], seeds=[1], source_rows=1500)
    points = {run.x: run.settings["start"]["source"]["rows"] for run in make_plan(curve, FACTS)}
    assert points == {1000: 1000, 1500: 1500}
    with pytest.raises(UserError, match="--sizes 2000: the source has 1500 rows that may be used"):
        make_plan(replace(curve, sizes=[2000]), FACTS)


def test_more_than_there_is_is_refused_before_any_run(caplog: pytest.LogCaptureFixture) -> None:
    few = replace(FACTS, data={**FACTS.data, "sst2": TaskFacts("s", 100, 9)})
    base = ReproduceConfig(what="table1", methods=["pt"], tasks=["sst5", "sst2"], seeds=[1])
    assert len(make_plan(replace(base, train=60), few)) == 2
    with pytest.raises(UserError, match=r"'sst2' has 100 rows .* --train 61 and --validation 40"):
        make_plan(replace(base, train=61), few)
    make_plan(replace(base, methods=["words"], train=61), few)  # which draws none
    curve = replace(base, what="figure2")
    points = sorted((run.task, run.x) for run in make_plan(curve, few))
    assert points == [("sst2", x) for x in (10, 20, 40)] + [("sst5", 10 * 2**i) for i in range(9)]
    assert "no point at 80, 160, 320" in caplog.text
    # SetFit takes no rows to choose by: it learns from as many as there are.
    setfit = replace(curve, methods=["setfit", "pt"], tasks=["sst2"], sizes=[60, 80, 160])
    points = [(run.row.split()[0], run.x) for run in make_plan(setfit, few)]
    assert points == [("SetFit", 60), ("SetFit", 80), ("PT", 60)]
    assert "no point but SetFit's at 80, 160" in caplog.text
    make_plan(replace(base, methods=["setfit"], train=100), few)
    with pytest.raises(UserError, match=r"too few for --sizes 70 80 and --validation 40"):
        make_plan(replace(curve, sizes=[70, 80]), few)
    for config, flag in (
        (ReproduceConfig(what="table1", clusters=3001), "--clusters 3001"),
        (ReproduceConfig(what="table2", methods=["lda"], clusters=3001), "--clusters 3001"),
        (ReproduceConfig(what="figure3a", sizes=[8, 3000]), "--clusters 10"),
        (ReproduceConfig(what="figure3a", clusters=1500), "--clusters 1500"),
        (ReproduceConfig(what="figure3b", sizes=[3, 3001]), "--sizes 3001"),
    ):
        with pytest.raises(UserError, match=f"{flag}: so many clusters cannot be made of"):
            make_plan(config, FACTS)
    given = {"text": {**FACTS.sources["text"], "rows": 8, "clustered": True}}
    for what in ("table1", "figure2"):  # where the file's own clusters are taken
        make_plan(replace(base, what=what, methods=["metapt"]), replace(FACTS, sources=given))
    make_plan(ReproduceConfig(what="table1", methods=["ppt"], clusters=3001), FACTS)
    curve = ReproduceConfig(what="figure3b", clusters=3001)
    assert {run.x for run in make_plan(replace(curve, source_rows=20), FACTS)} == {3, 6, 10, 15, 20}


def test_a_backbone_is_known_by_all_that_its_answers_follow_from(
    tiny_t5: Path, tmp_path: Path
) -> None:
    mark = backbone_mark(tiny_t5)
    for file, change, same in (
        ("config.json", {"transformers_version": "0", "dtype": "float16"}, True),
        ("config.json", {"decoder_start_token_id": 1}, False),
        ("config.json", {"dense_act_fn": "gelu"}, False),
        ("tokenizer_config.json", {"eos_token": "<x>"}, False),
        ("tokenizer.json", {"normalizer": None, "version": "2"}, False),
    ):
        copy = tmp_path / f"{file}{len(list(tmp_path.iterdir()))}"
        shutil.copytree(tiny_t5, copy)
        values = json.loads((copy / file).read_text())
        (copy / file).write_text(json.dumps({**values, **change}))
        assert (backbone_mark(copy) == mark) == same, change


def test_an_encoder_is_known_by_its_files(tmp_path: Path) -> None:
    assert encoder_mark(None) == encoder_mark("sentence-transformers/all-MiniLM-L6-v2")
    assert encoder_mark("someone/e5-small") == "someone/e5-small"
    marks = []
    for name, weights in (("a", b"1"), ("moved", b"1"), ("b", b"2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(weights)
        marks.append(encoder_mark(str(tmp_path / name)))
    assert marks[0] == marks[1] != marks[2] and len(marks[0]) == 16
    with pytest.raises(UserError, match="is not a folder"):
        encoder_mark("./nowhere")


def test_the_template_alone_runs_once_for_all_seeds() -> None:
    plan = make_plan(ReproduceConfig(what="table1", methods=["words"], tasks=["sst2"]), FACTS)
    assert len(plan) == 5 and len({settings_hash(run.settings) for run in plan}) == 1


def test_words_of_the_vocabulary_need_no_source_and_no_start() -> None:
    config = ReproduceConfig(what="table1", methods=["pt-vocab", "pt"], tasks=["sst2"], seeds=[1])
    assert sources_needed(config) == []
    words, random = make_plan(config, FACTS)
    assert words.start is None and random.start is None
    assert words.settings["start"] == {"method": "vocab"}
    assert {**words.settings, "start": 0} == {**random.settings, "start": 0}


def test_metapt_may_go_on_from_ppts_prompt(tmp_path: Path) -> None:
    config = ReproduceConfig(what="table1", methods=["metapt-ppt", "ppt"], tasks=["sst2"])
    plan, store = make_plan(config, FACTS), Store(tmp_path)
    first = next(run.start for run in plan if run.row == "PPT")
    second = plan[0].start
    assert first is not None and second is not None
    assert second["method"] == "metapt" and second["init"] == first
    jobs = missing_jobs(plan, store)
    names = [settings_hash(job.settings) for job in jobs]
    assert names[:2] == [settings_hash(first), settings_hash(second)] and len(names) == 12
    assert [job.after for job in jobs[:3]] == [None, names[0], names[1]]
    # PPT's prompt is there: the second start alone is left, and waits for nothing.
    done = store.start_path(first)
    done.mkdir(parents=True)
    (done / "task.json").write_text("{}")
    left = [job for job in missing_jobs(plan, store) if job.settings["kind"] == "start"]
    assert [job.settings for job in left] == [second]


def test_hash_is_the_sha256_of_sorted_json() -> None:
    import hashlib

    plain = hashlib.sha256(b'{"a":[1,2],"b":{"c":0.5,"d":null}}').hexdigest()[:16]
    assert settings_hash({"b": {"d": None, "c": 0.5}, "a": [1, 2]}) == plain


def test_wrong_names_are_refused() -> None:
    with pytest.raises(UserError, match="--methods kmeans"):
        make_plan(ReproduceConfig(what="table1", methods=["kmeans"]), FACTS)
    with pytest.raises(UserError, match="no such task"):
        make_plan(ReproduceConfig(what="table1", tasks=["imdb"]), FACTS)
    with pytest.raises(UserError, match="mode 'wide'"):
        make_plan(ReproduceConfig(what="table1", modes=["wide"]), FACTS)


def test_store_gives_back_what_it_was_given_and_refuses_another_run(tmp_path: Path) -> None:
    store, settings = Store(tmp_path), {"kind": "cell", "seed": 1, "rate": 3e-3}
    assert store.load(settings) is None
    store.save(settings, {"accuracy": 0.5}, {"python": "3"})
    found = store.load(settings)
    assert found is not None and found["result"] == {"accuracy": 0.5}
    path = store.run_path(settings)
    path.write_text(json.dumps({"settings": {"seed": 2}, "result": {}}))
    with pytest.raises(Failure, match="remove it"):
        store.load(settings)
    path.write_text(path.read_text()[:10])
    with pytest.raises(Failure, match="not valid JSON"):
        store.load(settings)


def test_balanced_rows_hold_the_classes_evenly() -> None:
    labels = np.array([0] * 50 + [1] * 10 + [2] * 3)
    rows = balanced_rows(labels, 15)
    assert list(np.bincount(labels[rows])) == [6, 6, 3]
    assert (np.diff(rows) > 0).all()
    assert list(balanced_rows(labels, 0)) == list(range(63))


def test_what_is_named_twice_counts_once() -> None:
    once = {"tasks": ["sst2"], "methods": ["pt", "ft"], "seeds": [2, 1], "modes": ["full"]}
    plan, again = (
        make_plan(ReproduceConfig(what="table1", **names), FACTS)  # type: ignore[arg-type]
        for names in (once, {name: [*values, values[0]] for name, values in once.items()})
    )
    assert plan == again and len(plan) == 4


def test_another_question_changes_what_reads_it_and_nothing_else() -> None:
    base = ReproduceConfig(
        what="table1", tasks=["sst2"], seeds=[1], methods=["setfit", "ft", "ppt"]
    )
    words = ["avoid", "skip", "maybe", "try", "recommend"]
    for change in ({"template": "<extra_id_0>: {text}"}, {"words": words}):
        plan = make_plan(replace(base, **change), FACTS)
        setfit, *others = zip(hashes(base), plan, strict=True)
        assert setfit[0] == settings_hash(setfit[1].settings)
        assert all(name != settings_hash(run.settings) for name, run in others)
        assert plan[2].start is not None and plan[2].start["question"] == change
    sst2 = asked(get_task("sst2"), {"words": words, "template": "<extra_id_0>: {text}"})
    assert (sst2.words, sst2.template) == (("avoid", "recommend"), "<extra_id_0>: {text}")
    assert asked(get_task("semeval-laptop"), {"words": words}).words == (*words[::2],)
    assert asked(get_task("sst5"), {"words": words}).words == (*words,)
    assert asked(get_task("sst5"), {}) == get_task("sst5")
    for change, message in (
        ({"words": words[:3]}, "five words from the worst to the best"),
        ({"template": "{aspect}: {text} <extra_id_0>"}, "own columns are read by themselves"),
        ({"template": "{text}"}, "<extra_id_0>"),
    ):
        with pytest.raises(UserError, match=message):
            make_plan(replace(base, **change), FACTS)
