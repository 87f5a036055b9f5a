"""Statistics against scipy and numpy called plainly, and which rows the tables compare."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from trainer.reproduce.plan import Run
from trainer.reproduce.report import Done, Grid, comparisons, make_grid, markdown
from trainer.reproduce.statistics import bootstrap_interval, compare, summarise


def test_summary_is_the_mean_and_the_sample_deviation() -> None:
    summary = summarise([50.0, 52.0, 57.0])
    assert summary.mean == pytest.approx(53.0)
    assert summary.deviation == pytest.approx(np.sqrt((9 + 1 + 16) / 2))
    assert str(summary) == "53.00 ± 3.61"
    assert str(summarise([41.236])) == "41.24"
    with pytest.raises(ValueError):
        summarise([])


def test_comparison_is_paired_over_what_both_rows_have() -> None:
    generator = np.random.default_rng(3)
    keys = [(task, 0, seed) for task in ("a", "b", "c") for seed in (1, 2, 3, 4)]
    first = {key: float(60 + 5 * generator.random()) for key in keys}
    second = {key: float(58 + 5 * generator.random()) for key in keys}
    second["c", 0, 99] = 0.0  # has no partner, so it must not count
    found = compare("A", "B", first, second)
    assert found is not None
    x, y = [first[key] for key in keys], [second[key] for key in keys]
    assert found.pairs == 12
    assert found.difference == pytest.approx(np.mean(x) - np.mean(y))
    assert found.t_p == pytest.approx(stats.ttest_rel(x, y).pvalue)
    assert found.wilcoxon_p == pytest.approx(stats.wilcoxon(x, y).pvalue)
    means = [
        [np.mean([row[t, 0, s] for s in (1, 2, 3, 4)]) for t in "abc"] for row in (first, second)
    ]
    assert found.task_p == pytest.approx(stats.ttest_rel(*means).pvalue)


def test_tasks_of_equal_differences_are_no_evidence_of_any_precision() -> None:
    """Means that are equal but for their last binary digits would give a p of next to nothing."""
    first = {("a", 0, 1): 0.1, ("a", 0, 2): 0.2, ("b", 0, 1): 0.05, ("b", 0, 2): 0.25}
    assert np.mean([0.1, 0.2]) != np.mean([0.05, 0.25])
    found = compare("A", "B", first, dict.fromkeys(first, 0.0))
    assert found is not None and found.task_p is None and found.t_p is not None


def test_bootstrap_interval_agrees_with_scipys() -> None:
    values = np.random.default_rng(5).normal(2.0, 3.0, 40)
    low, high = bootstrap_interval(values)
    plain = stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=10_000, random_state=1
    ).confidence_interval
    # Two draws of 10,000 resamples: their ends differ by some hundredths of the mean's error.
    error = values.std(ddof=1) / np.sqrt(len(values))
    assert low == pytest.approx(plain.low, abs=0.1 * error)
    assert high == pytest.approx(plain.high, abs=0.1 * error)


def test_tests_that_say_nothing_are_none() -> None:
    same = {("a", 0, 1): 50.0, ("a", 0, 2): 60.0}
    found = compare("A", "B", same, dict(same))
    assert found is not None and found.difference == 0
    assert found.t_p is None and found.wilcoxon_p is None
    assert compare("A", "B", same, {("b", 0, 1): 1.0}) is None


def test_equal_differences_are_ties_whatever_the_quotients() -> None:
    """100 * hits / 1101 is exact to fourteen digits; the tests' judge is scipy on the counts."""
    from scipy import stats

    rows = 1101
    first = [410, 415, 420, 433, 441, 398, 402, 417, 409, 428]
    second = [407, 418, 417, 430, 444, 395, 405, 414, 403, 422]
    keys = [("a", 0, seed) for seed in range(10)]
    values = [
        {key: 100 * hits / rows for key, hits in zip(keys, part, strict=True)}
        for part in (first, second)
    ]
    found = compare("A", "B", *values)
    counts = np.subtract(first, second)
    assert found is not None
    assert found.wilcoxon_p == pytest.approx(stats.wilcoxon(counts).pvalue)
    constant = [
        {key: 100 * (hits + more) / rows for key, hits in zip(keys[:3], first, strict=False)}
        for more in (3, 0)
    ]
    found = compare("A", "B", *constant)
    assert found is not None and found.t_p is None


def grid_of(
    what: str, cells: dict[tuple[str, str, str, int, int], float], modes: list[str]
) -> Grid:
    """The grid of finished runs: (row, mode, task, x, seed) -> accuracy."""
    plan = [Run(row, mode, task, seed, x, {}) for row, mode, task, x, seed in cells]
    done = [Done(run, value, {}) for run, value in zip(plan, cells.values(), strict=True)]
    return make_grid(what, plan, done, modes)


def test_a_mean_over_tasks_has_the_runs_that_all_of_them_have() -> None:
    values = {
        ("PT", "full", "sst2", 0, 1): 50.0, ("PT", "full", "sst2", 0, 2): 54.0,
        ("PT", "full", "sst2", 0, 3): 52.0, ("PT", "full", "sst5", 0, 1): 30.0,
        ("PT", "full", "sst5", 0, 2): 34.0, ("FT", "full", "sst2", 0, 1): 70.0,
    }  # fmt: skip
    grid = grid_of("table1", values, ["full"])
    found = grid.mean("PT")
    assert found is not None and found.count == 2
    assert found.mean == pytest.approx((52 + 32) / 2)
    assert found.deviation == pytest.approx((2 + np.sqrt(8)) / 2)
    assert grid.mean("FT") is None  # a task is missing


def figure2(tasks: list[str], sizes: list[int]) -> dict[tuple[str, str, str, int, int], float]:
    """MetaPT about a point above PPT, with noise, for two seeds."""
    noise = np.random.default_rng(0)
    return {
        (row, "full", task, size, seed): 40 + gain + float(noise.normal())
        for row, gain in (("MetaPT", 1.0), ("PPT", 0.0))
        for task in tasks for size in sizes for seed in (1, 2)
    }  # fmt: skip


def test_the_sizes_of_a_figure_are_no_tasks() -> None:
    sizes = [10 * 2**i for i in range(9)]
    (one,) = comparisons(grid_of("figure2", figure2(["sst5"], sizes), ["full"]))
    assert one.pairs == 18 and one.t_p is not None and one.task_p is None
    values = figure2(["sst5", "sst2", "amazon2"], sizes)
    grid = grid_of("figure2", values, ["full"])
    assert grid.columns[:2] == ["sst5 10", "sst5 20"] and grid.cells["PPT", "sst2 10"].count == 2
    (three,) = comparisons(grid)
    means = [
        [np.mean([v for k, v in values.items() if k[0] == row and k[2] == task])
         for task in ("sst5", "sst2", "amazon2")]
        for row in ("MetaPT", "PPT")
    ]  # fmt: skip
    assert three.pairs == 54
    assert three.task_p == pytest.approx(stats.ttest_rel(*means).pvalue)


def test_prefix_is_held_against_full_in_every_row() -> None:
    modes = ["full", "prefix"]
    rows = [("FT", ""), *((row, mode) for row in ("PPT", "MetaPT") for mode in modes)]
    grid = grid_of(
        "table1",
        {
            (row, mode, "sst2", 0, seed): 50.0 + seed + 3 * (mode == "prefix")
            for row, mode in rows for seed in (1, 2)
        },
        modes,
    )  # fmt: skip
    found = comparisons(grid)
    assert [(c.first, c.second) for c in found] == [
        ("MetaPT [full]", "FT"), ("MetaPT [full]", "PPT [full]"),
        ("MetaPT [full]", "PPT [prefix]"),
        ("MetaPT [prefix]", "FT"), ("MetaPT [prefix]", "PPT [full]"),
        ("MetaPT [prefix]", "PPT [prefix]"),
        ("PPT [prefix]", "PPT [full]"), ("MetaPT [prefix]", "MetaPT [full]"),
    ]  # fmt: skip
    assert [c.difference for c in found[-2:]] == [3.0, 3.0]


def test_the_note_says_what_the_deviation_of_a_mean_is() -> None:
    """Tasks that go opposite ways: over the seeds the mean does not change at all."""
    values = {
        ("PT", "full", "sst2", 0, 1): 50.0, ("PT", "full", "sst2", 0, 2): 54.0,
        ("PT", "full", "sst5", 0, 1): 34.0, ("PT", "full", "sst5", 0, 2): 30.0,
    }  # fmt: skip
    text = markdown(grid_of("table1", values, ["full"]), "T", [])
    assert "| PT | 52.00 ± 2.83 | 32.00 ± 2.83 | 42.00 ± 2.83 |" in text
    assert "under `mean` the mean of the row's means ± the mean of its deviations" in text
