"""Means, deviations and paired comparisons of runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

Key = tuple[str, int, int]  # task, x (a figure's abscissa, 0 in a table), seed

RESAMPLES = 10_000  # of the bootstrap: its interval is then stable to about 0.01 of a deviation


@dataclass(frozen=True)
class Summary:
    """Accuracy over seeds: mean and sample deviation (None for a single run), in per cent."""

    mean: float
    deviation: float | None
    count: int

    def __str__(self) -> str:
        if self.deviation is None:
            return f"{self.mean:.2f}"
        return f"{self.mean:.2f} ± {self.deviation:.2f}"


def summarise(values: Sequence[float]) -> Summary:
    """Mean and deviation (ddof 1) of N values.

    Raises:
        ValueError: there are none.
    """
    if not len(values):
        raise ValueError("nothing to summarise")
    array = np.asarray(values, dtype=float)
    deviation = float(array.std(ddof=1)) if len(array) > 1 else None
    return Summary(float(array.mean()), deviation, len(array))


@dataclass(frozen=True)
class Comparison:
    """Row A against row B, paired over (task, x, seed).

    Attributes:
        pairs: N; difference: mean of A - B; low, high: its 95 % bootstrap interval.
        t_p, wilcoxon_p: two-sided p of the paired t-test and of Wilcoxon's signed ranks; None
            where a test says nothing (fewer than two pairs, or no differences; the t-test also
            where all differences are equal).
        task_p: two-sided p of the paired t-test over the tasks' mean differences; seeds and sizes
            of one task share its data, so its pairs are not independent, and this test does not
            pretend. None with one task.
    """

    first: str
    second: str
    pairs: int
    difference: float
    low: float
    high: float
    t_p: float | None
    wilcoxon_p: float | None
    task_p: float | None

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def bootstrap_interval(
    differences: np.ndarray, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """The 95 % percentile interval of the mean of N differences (Efron and Tibshirani 1993)."""
    generator = np.random.default_rng(seed)
    chosen = generator.integers(0, len(differences), (resamples, len(differences)))
    low, high = np.percentile(differences[chosen].mean(1), [2.5, 97.5])
    return float(low), float(high)


def compare(
    first: str,
    second: str,
    values_first: dict[Key, float],
    values_second: dict[Key, float],
) -> Comparison | None:
    """Compare two rows on the (task, x, seed) that both have.

    Args:
        values_first, values_second: accuracy in per cent by (task, x, seed).

    Returns:
        None where they share no pair.
    """
    shared = sorted(set(values_first) & set(values_second))
    if not shared:
        return None
    # Accuracies are quotients: equal differences of them are equal to some fourteen digits only,
    # and would be no ties.
    differences = np.round([values_first[key] - values_second[key] for key in shared], 9)
    names = np.array([task for task, _, _ in shared])
    by_task = np.round([differences[names == task].mean() for task in np.unique(names)], 9)
    low, high = bootstrap_interval(differences)
    return Comparison(
        first, second, len(shared), float(differences.mean()), low, high,
        _t_test(differences), _wilcoxon(differences), _t_test(by_task),
    )  # fmt: skip


def _t_test(differences: np.ndarray) -> float | None:
    from scipy import stats

    if len(differences) < 2 or np.ptp(differences) == 0:
        return None
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def _wilcoxon(differences: np.ndarray) -> float | None:
    from scipy import stats

    if len(differences) < 2 or not differences.any():
        return None
    return float(stats.wilcoxon(differences).pvalue)
