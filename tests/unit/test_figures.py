"""Figures against scikit-learn and against plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from sklearn.metrics import confusion_matrix, f1_score, precision_recall_fscore_support

from trainer.figures import (
    accuracy_interval,
    as_table,
    calibration_error,
    figures,
    fit_temperature,
)


def test_figures_equal_scikit_learn() -> None:
    torch.manual_seed(0)
    scores = torch.randn(200, 4)
    labels = np.random.default_rng(0).integers(0, 4, 200)
    got = figures(scores, labels, ["a", "b", "c", "d"], temperature=2.0)
    predicted = scores.argmax(-1).numpy()
    assert got["accuracy"] == pytest.approx((predicted == labels).mean())
    assert got["macro_f1"] == pytest.approx(f1_score(labels, predicted, average="macro"))
    assert got["confusion"] == confusion_matrix(labels, predicted).tolist()
    precision, recall, _, support = precision_recall_fscore_support(labels, predicted)
    for index, name in enumerate("abcd"):
        assert got["per_class"][name]["precision"] == pytest.approx(precision[index])
        assert got["per_class"][name]["recall"] == pytest.approx(recall[index])
        assert got["per_class"][name]["support"] == support[index]
    want = torch.nn.functional.cross_entropy(scores / 2, torch.from_numpy(labels))
    assert got["loss"] == pytest.approx(float(want), rel=1e-5)
    assert "macro-F1" in as_table(got)
    sure = figures(torch.tensor([[0.0, 40.0]]), np.array([0]), ["a", "b"])
    assert sure["loss"] == pytest.approx(40)


def test_calibration_error_equals_a_plain_loop() -> None:
    generator = np.random.default_rng(1)
    confidence = generator.uniform(0.01, 1.0, 500)
    correct = generator.random(500) < confidence**2
    want = 0.0
    for number in range(10):
        low, high = number / 10, (number + 1) / 10
        rows = [i for i in range(500) if low < confidence[i] <= high]
        if rows:
            gap = abs(np.mean([correct[i] for i in rows]) - np.mean([confidence[i] for i in rows]))
            want += len(rows) / 500 * gap
    assert calibration_error(confidence, correct) == pytest.approx(want)


def test_a_confidence_between_two_bins_is_in_the_lower_one() -> None:
    """As Guo et al. have it: (0.2, 0.3] holds 0.25 twice and 0.3; the gap is 2/3 - 0.8/3."""
    confidence = np.array([0.25, 0.25, 0.3])
    assert calibration_error(confidence, np.array([1, 1, 0])) == pytest.approx(0.4)


def test_a_temperature_has_bounds() -> None:
    right, wrong = torch.tensor([[0.5, 0.0], [0.0, 0.5]]), torch.tensor([0, 1])
    assert fit_temperature(right, wrong) == pytest.approx(0.1, rel=1e-3)
    assert fit_temperature(right, 1 - wrong) == pytest.approx(10.0, rel=1e-3)


def test_temperature_makes_the_labels_most_likely() -> None:
    torch.manual_seed(0)
    scores = torch.randn(300, 3) * 4
    labels = torch.distributions.Categorical(logits=scores / 2.5).sample()
    found = fit_temperature(scores, labels)
    grid = np.linspace(0.2, 8, 400)
    losses = [float(torch.nn.functional.cross_entropy(scores / t, labels)) for t in grid]
    assert found == pytest.approx(grid[int(np.argmin(losses))], abs=0.03)


def test_an_absent_class_does_not_count_in_macro_f1() -> None:
    scores = torch.tensor([[2.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
    assert figures(scores, np.array([0, 1]), ["a", "b", "c"])["macro_f1"] == 1.0


def test_the_interval_of_an_accuracy_is_wilsons() -> None:
    for hits, rows in ((12, 17), (0, 5), (5, 5), (799, 1000)):
        low, high = accuracy_interval(hits, rows)
        want = binomtest(hits, rows).proportion_ci(0.95, "wilson")
        assert (low, high) == (
            pytest.approx(want.low, abs=1e-6),
            pytest.approx(want.high, abs=1e-6),
        )
    assert accuracy_interval(0, 0) == (0.0, 1.0)
