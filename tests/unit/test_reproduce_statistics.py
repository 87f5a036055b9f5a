"""Statistics against scipy and numpy called plainly."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

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
    keys = [(task, seed) for task in ("a", "b", "c") for seed in (1, 2, 3, 4)]
    first = {key: float(60 + 5 * generator.random()) for key in keys}
    second = {key: float(58 + 5 * generator.random()) for key in keys}
    second["c", 99] = 0.0  # has no partner, so it must not count
    found = compare("A", "B", first, second)
    assert found is not None
    x, y = [first[key] for key in keys], [second[key] for key in keys]
    assert found.pairs == 12
    assert found.difference == pytest.approx(np.mean(x) - np.mean(y))
    assert found.t_p == pytest.approx(stats.ttest_rel(x, y).pvalue)
    assert found.wilcoxon_p == pytest.approx(stats.wilcoxon(x, y).pvalue)
    means = [[np.mean([row[t, s] for s in (1, 2, 3, 4)]) for t in "abc"] for row in (first, second)]
    assert found.task_p == pytest.approx(stats.ttest_rel(*means).pvalue)


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
    same = {("a", 1): 50.0, ("a", 2): 60.0}
    found = compare("A", "B", same, dict(same))
    assert found is not None and found.difference == 0
    assert found.t_p is None and found.wilcoxon_p is None
    assert compare("A", "B", same, {("b", 1): 1.0}) is None
