"""The command on a tiny T5 and toy texts: methods, resume, outputs."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from reproduce_toy import write_source, write_task

from serve.errors import Failure, UserError
from trainer.backbone import load_backbone
from trainer.configs import MetaConfig, PretrainConfig
from trainer.reproduce import command, pool, work
from trainer.reproduce.config import ReproduceConfig
from trainer.reproduce.plan import scale
from trainer.reproduce.sources import load_source
from trainer.reproduce.store import Settings
from trainer.source import meta_train, pretrain


@pytest.fixture
def toy(tmp_path: Path, tiny_t5: Path) -> dict[str, Any]:
    (tmp_path / "data").mkdir()
    write_task(tmp_path / "data")
    return {
        "what": "table1", "backbone": str(tiny_t5), "tasks": ["sst2"], "seeds": [1, 2],
        "methods": ["pt", "ppt", "metapt"], "data_dir": str(tmp_path / "data"),
        "source": str(write_source(tmp_path / "source.csv")), "out": str(tmp_path / "out"),
        "train": 20, "validation": 20, "prompt_tokens": 4, "meta_steps": 6,
        "meta_evaluate_every": 3, "epochs": 4, "rate": 0.05, "modes": ["prefix"],
        "device": "cpu", "threads": 1,
    }  # fmt: skip


def read_csv(path: Path) -> list[dict[str, str]]:
    """Rows without the seconds, which differ from run to run."""
    with path.open() as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def test_a_run_that_is_stopped_goes_on_and_ends_with_the_same_table(
    toy: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command.run_reproduce(ReproduceConfig(**toy))
    whole = tmp_path / "out"
    assert len(list((whole / "runs").glob("*.json"))) == 6
    assert len(list((whole / "starts").iterdir())) == 2

    calls: list[str] = []

    def stops(settings: Settings, where: work.Surroundings) -> None:
        if len(calls) == 4:  # two starts and two cells are done by then
            raise KeyboardInterrupt
        calls.append(settings["kind"])
        work.execute(settings, where)

    again = {**toy, "out": str(tmp_path / "again")}
    monkeypatch.setattr(pool, "execute", stops)
    with pytest.raises(KeyboardInterrupt):
        command.run_reproduce(ReproduceConfig(**again))
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "again/runs").glob("*.json")}
    assert calls == ["start", "start", "cell", "cell"] and len(done) == 2

    monkeypatch.setattr(pool, "execute", work.execute)
    command.run_reproduce(ReproduceConfig(**again))
    assert all(path.stat().st_mtime_ns == then for path, then in done.items())
    assert read_csv(tmp_path / "again/table1.csv") == read_csv(whole / "table1.csv")
    assert (tmp_path / "again/table1.md").read_text() == (whole / "table1.md").read_text()


def test_table_holds_the_means_of_the_single_runs(toy: dict[str, Any], tmp_path: Path) -> None:
    command.run_reproduce(ReproduceConfig(**toy))
    out = tmp_path / "out"
    report = json.loads((out / "table1.json").read_text())
    assert len(report["runs"]) == 6
    accuracies = [
        100 * run["result"]["accuracy"] for run in report["runs"] if run["row"] == "MetaPT"
    ]
    mean = sum(accuracies) / 2
    deviation = abs(accuracies[0] - accuracies[1]) / 2**0.5
    text = (out / "table1.md").read_text()
    assert f"| MetaPT | {mean:.2f} ± {deviation:.2f} |" in text
    assert "89.61" in text  # the paper's T5-large figure for this task
    pairs = [(c["first"], c["second"]) for c in report["comparisons"]]
    assert pairs == [("MetaPT", "PT (random start)"), ("MetaPT", "PPT")]
    assert (out / "table1.png").read_bytes()[:4] == b"\x89PNG"
    assert b"<svg" in (out / "table1.svg").read_bytes()


def test_plan_shows_what_is_left_and_runs_nothing(
    toy: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command.run_reproduce(ReproduceConfig(**toy, plan=True))
    shown = capsys.readouterr().out
    assert "table1: 6 runs, 0 done, 6 left; 2 starts" in shown
    assert "left: MetaPT" in shown and "seeds 1, 2" in shown
    assert not (tmp_path / "out/runs").exists()
    assert "(0 of 2)" in (tmp_path / "out/table1.md").read_text()


def test_plan_builds_no_source_and_draws_no_figure(
    toy: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from trainer.reproduce import sources

    def never(*_: Any) -> None:
        raise AssertionError("--plan runs nothing")

    monkeypatch.setattr(sources, "run_label", never)
    monkeypatch.setattr(command, "_figure4", never)
    unbuilt = {**toy, "source": None, "text": ["open.txt"], "plan": True}
    command.run_reproduce(ReproduceConfig(**unbuilt))
    shown = capsys.readouterr().out
    assert "source text: not built yet" in shown
    assert "table1: 6 runs, 0 done, 6 left; 2 starts" in shown
    assert not (tmp_path / "out/sources").exists()
    sizes = {**unbuilt, "what": "figure3a", "methods": ["ppt"], "seeds": [1]}
    command.run_reproduce(ReproduceConfig(**sizes))
    assert "figure3a: 6 runs, 0 done, 6 left" in capsys.readouterr().out
    for source in (toy["source"], None):
        figure = {**unbuilt, "what": "figure4", "methods": [], "source": source}
        command.run_reproduce(ReproduceConfig(**figure))
        shown = capsys.readouterr().out
        assert "figure4: one t-SNE, k = 3, 6, 10; nothing is run" in shown
        assert ("not built yet" in shown) == (source is None)
    assert not (tmp_path / "out/figure4.md").exists()


def test_another_question_is_asked_of_starts_and_tasks(
    toy: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, tuple[str, ...]]] = []
    tune = work.tune

    def look_on(backbone: Any, task: Any, *given: Any, **named: Any) -> Any:
        seen.append((task.template, task.words))
        return tune(backbone, task, *given, **named)

    monkeypatch.setattr(work, "tune", look_on)
    question = {"template": "<extra_id_0>: {text}", "words": ["film", "bad", "the", "good", "food"]}
    command.run_reproduce(ReproduceConfig(**{**toy, **question, "seeds": [1], "start_seed": 5}))
    assert seen == [("<extra_id_0>: {text}", ("film", "food"))] * 3
    for folder in (tmp_path / "out" / "starts").iterdir():
        record = json.loads((folder / "task.json").read_text())
        assert record["template"] == "<extra_id_0>: {text}" and record["seed"] == 5
        assert record["words"] == list(scale(question["words"], len(record["labels"])))
    text = (tmp_path / "out" / "table1.md").read_text()
    assert "template: <extra_id_0>: {text}" in text and "'food'" in text
    assert "start seed: 5" in text and "PPT: 6 steps at most of 80 rows, rate 0.025" in text


def test_setfit_needs_no_more_rows_than_it_learns_from(
    toy: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """80 rows to draw from: 70 + 10 for the others, and the same 70 for SetFit."""
    from trainer.reproduce import setfit_row

    seen: dict[str, list[str]] = {}

    def setfit(train: Any, *_: Any) -> dict[str, Any]:
        seen["setfit"] = train.texts
        return {"accuracy": 0.5, "rows": 1, "steps": 1}

    def full(settings: Settings, where: Any, task: Any, train: Any, *_: Any) -> dict[str, Any]:
        seen["ft"] = train.texts
        return {"accuracy": 0.5}

    monkeypatch.setattr(setfit_row, "check_setfit", lambda: None)
    monkeypatch.setattr(setfit_row, "run_setfit", setfit)
    monkeypatch.setattr(work, "_run_full", full)
    settings = {
        **toy, "what": "figure2", "methods": ["setfit", "ft"], "seeds": [1], "sizes": [70],
        "validation": 10,
    }  # fmt: skip
    command.run_reproduce(ReproduceConfig(**settings))
    assert len(seen["setfit"]) == 70 and seen["setfit"] == seen["ft"]


def test_a_row_whose_package_is_missing_is_said_before_the_others_run(
    toy: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer.reproduce import setfit_row

    monkeypatch.setattr(setfit_row.importlib.util, "find_spec", lambda name: None)
    settings = {**toy, "what": "table1", "methods": ["ft", "setfit"]}
    message = r"SetFit needs its package: .*\[setfit\].*, or leave setfit out of --methods"
    with pytest.raises(UserError, match=message):
        command.run_reproduce(ReproduceConfig(**settings))
    assert not Path(settings["out"]).exists() or not list(Path(settings["out"]).rglob("*.json"))


@pytest.mark.parametrize(("method", "flag"), [("metapt", "outer"), ("ppt", "ppt")])
def test_a_rate_that_is_too_small_is_named_by_its_own_flag(
    toy: dict[str, Any], method: str, flag: str
) -> None:
    settings = {**toy, "methods": [method], "seeds": [1], f"{flag}_rate": 1e-9}
    with pytest.raises(Failure, match=rf"2 of 2 runs failed.*: --{flag}-rate 1e-09 over 6 steps"):
        command.run_reproduce(ReproduceConfig(**settings))


@pytest.mark.parametrize("names", [("satisfied", "unsatisfied"), ("a", "b", "c", "d")])
def test_a_source_whose_classes_are_no_scale_is_refused_before_the_runs(
    toy: dict[str, Any], tmp_path: Path, names: tuple[str, ...]
) -> None:
    rows = "".join(f"the film {i},{names[i % len(names)]},{i // 20}\n" for i in range(40))
    (tmp_path / "source.csv").write_text("text,label,cluster\n" + rows)
    with pytest.raises(
        UserError, match=r"a source has 2, 3 or 5 classes that .*: label .*source\.csv so$"
    ):
        command.run_reproduce(ReproduceConfig(**{**toy, "plan": True}))


@pytest.mark.parametrize(
    ("grouping", "train", "config"),
    [
        ("none", pretrain, PretrainConfig(data="", out="", steps=1)),
        ("given", meta_train, MetaConfig(data="", out="", steps=1)),
        ("random", meta_train, MetaConfig(data="", out="", steps=1)),
    ],
)
def test_a_start_does_not_take_other_classes_for_bad_and_good(
    tmp_path: Path, tiny_t5: Path, grouping: str, train: Any, config: Any
) -> None:
    path = tmp_path / "source.csv"
    rows = "".join(f"the film {i},{('pro', 'con')[i % 2]},{i // 60}\n" for i in range(120))
    path.write_text("text,label,cluster\n" + rows)
    data = load_source(str(path), {"rows": 100, "grouping": grouping, "clusters": 2}, None)
    with pytest.raises(UserError, match="called con, pro, which is no scale"):
        train(load_backbone(str(tiny_t5)), data, config)


def test_full_tuning_learns_what_one_word_tells(toy: dict[str, Any], tmp_path: Path) -> None:
    settings = {
        **toy, "methods": ["ft"], "seeds": [1], "train": 40, "validation": 40, "epochs": 30,
        "ft_rate": 3e-3, "patience": 30,
    }  # fmt: skip
    command.run_reproduce(ReproduceConfig(**settings))
    (run,) = json.loads((tmp_path / "out/table1.json").read_text())["runs"]
    assert run["result"]["rows"] == 40
    assert run["result"]["accuracy"] >= 0.9  # chance is 0.5


def test_deep_prompts_learn_what_one_word_tells(toy: dict[str, Any], tmp_path: Path) -> None:
    settings = {
        **toy, "methods": ["pt"], "seeds": [1], "train": 40, "validation": 40, "epochs": 60,
        "rate": 0.05, "patience": 60, "modes": ["deep"],
    }  # fmt: skip
    command.run_reproduce(ReproduceConfig(**settings))
    (run,) = json.loads((tmp_path / "out/table1.json").read_text())["runs"]
    result = run["result"]
    assert result["accuracy"] >= 0.7 and result["accuracy"] > result["start_accuracy"]


def test_a_failed_run_is_named_and_the_others_are_kept(toy: dict[str, Any], tmp_path: Path) -> None:
    # A rate that cannot move the prompt is refused by the tuner; full tuning is not concerned.
    settings = {**toy, "methods": ["ft", "pt"], "seeds": [1], "rate": 1e-9}
    with pytest.raises(Failure, match=r"1 of 2 runs failed.*Try more steps"):
        command.run_reproduce(ReproduceConfig(**settings))
    assert len(list((tmp_path / "out/runs").glob("*.json"))) == 1
    assert "(0 of 1)" in (tmp_path / "out/table1.md").read_text()


def test_figure2_has_a_point_for_each_number_of_samples(
    toy: dict[str, Any], tmp_path: Path
) -> None:
    settings = {**toy, "what": "figure2", "methods": ["pt"], "seeds": [1], "sizes": [10, 20]}
    command.run_reproduce(ReproduceConfig(**settings))
    rows = read_csv(tmp_path / "out/figure2.csv")
    assert [row["x"] for row in rows] == ["10", "20"]
    text = (tmp_path / "out/figure2.md").read_text()
    assert "| samples | 10 | 20 | mean |" in text and "- N + 20 samples, seeds 1, all t" in text
    assert (tmp_path / "out/figure2.svg").is_file()


def test_table2_groups_the_source_in_four_ways(
    toy: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import numpy as np

    from trainer.reproduce import sources

    def bag_of_letters(texts: list[str], *_: Any, **__: Any) -> np.ndarray:
        counts = np.array([[text.count(c) for c in "abcdefghilmnoprstuvwy"] for text in texts])
        return counts / np.linalg.norm(counts, axis=1, keepdims=True)

    monkeypatch.setattr(sources, "embed", bag_of_letters)  # no sentence encoder in a unit test
    settings = {**toy, "what": "table2", "methods": [], "seeds": [1], "clusters": 3}
    command.run_reproduce(ReproduceConfig(**settings))
    rows = read_csv(tmp_path / "out/table2.csv")
    assert [row["row"] for row in rows] == [
        "MetaPT, K-means", "MetaPT, LDA", "MetaPT, random", "MetaPT, label", "PPT",
    ]  # fmt: skip
    figure = {**toy, "what": "figure4", "methods": [], "sizes": [2, 3]}
    command.run_reproduce(ReproduceConfig(**figure))
    points = read_csv(tmp_path / "out/figure4.csv")
    assert len(points) == 400 and {row["k3"] for row in points} == {"0", "1", "2"}
    assert (tmp_path / "out/figure4.png").is_file()
