"""MetaPT's gradient and validation against the per-task loop and against finite differences."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from trainer.backbone import Backbone, load_backbone
from trainer.configs import MetaConfig
from trainer.initial import initial_params
from trainer.loop import RunOptions
from trainer.meta import TaskSampler, outer_gradient
from trainer.modes import Params, add_group, deepen
from trainer.readout import Batch
from trainer.rows import Rows, Scorer
from trainer.source import SourceData, hold_out, meta_train

RATE = 0.3
TASKS, SAMPLES = 3, 2
WORDS = ["bad", "okay", "good"]


@pytest.fixture(scope="module")
def backbone(tiny_t5: Path) -> Backbone:
    return load_backbone(str(tiny_t5), dtype=torch.float64)


@pytest.fixture(scope="module")
def batches(backbone: Backbone) -> tuple[Batch, Batch]:
    generator = np.random.default_rng(0)
    words = ["film", "food", "bad", "great", "not", "very", "the", "plot"]
    count = TASKS * SAMPLES
    texts = [" ".join(generator.choice(words, generator.integers(1, 9))) for _ in range(2 * count)]
    labels = generator.integers(0, 3, 2 * count)
    rows = Rows(backbone, "{text} It was <extra_id_0>.", texts, labels, 32)
    return rows.batch(np.arange(count)), rows.batch(np.arange(count, 2 * count))


def start(backbone: Backbone, mode: str) -> Params:
    torch.manual_seed(1)
    params: Params = {"prompt_embeddings": torch.randn(3, 32, dtype=torch.float64)}
    if mode == "deep":
        params = deepen(backbone.t5, params)
    return {name: value.clone().requires_grad_() for name, value in params.items()}


def part(batch: Batch, task: int) -> Batch:
    rows = slice(task * SAMPLES, (task + 1) * SAMPLES)
    assert batch.labels is not None
    return Batch(batch.ids[rows], batch.mask[rows], batch.labels[rows])


def loss_of(scorer: Scorer, params: Params, batch: Batch) -> torch.Tensor:
    assert batch.labels is not None
    return torch.nn.functional.cross_entropy(scorer(add_group(params), batch), batch.labels)


def loop_gradient(
    scorer: Scorer, params: Params, support: Batch, query: Batch, steps: int, second: bool
) -> list[torch.Tensor]:
    """The oracle: one task after another, written as the paper's equations are."""
    total = torch.zeros((), dtype=torch.float64)
    for task in range(TASKS):
        own = dict(params)
        for _ in range(steps):
            loss = loss_of(scorer, own, part(support, task))
            gradients = torch.autograd.grad(loss, list(own.values()), create_graph=second)
            own = {
                name: value - RATE * gradient
                for (name, value), gradient in zip(own.items(), gradients, strict=True)
            }
        total = total + loss_of(scorer, own, part(query, task))
    return list(torch.autograd.grad(total, list(params.values())))


@pytest.mark.parametrize("mode", ["full", "prefix", "deep"])
@pytest.mark.parametrize(("steps", "second"), [(1, True), (2, True), (1, False)])
def test_batched_gradient_equals_the_loop(
    backbone: Backbone, batches: tuple[Batch, Batch], mode: str, steps: int, second: bool
) -> None:
    scorer, params = Scorer(backbone, WORDS, mode), start(backbone, mode)
    want = loop_gradient(scorer, params, *batches, steps, second)
    outer_gradient(
        scorer, params, *batches, TASKS, inner_rate=RATE, inner_steps=steps, second_order=second
    )
    for value, gradient in zip(params.values(), want, strict=True):
        assert value.grad is not None
        torch.testing.assert_close(value.grad, gradient, atol=1e-11, rtol=1e-9)


def test_first_and_second_order_differ(backbone: Backbone, batches: tuple[Batch, Batch]) -> None:
    scorer, params = Scorer(backbone, WORDS, "prefix"), start(backbone, "prefix")
    first = loop_gradient(scorer, params, *batches, 1, False)[0]
    second = loop_gradient(scorer, params, *batches, 1, True)[0]
    assert (first - second).abs().max() > 1e-4


def outer_loss(scorer: Scorer, params: Params, support: Batch, query: Batch) -> float:
    """The summed query loss after one inner step, as plain numbers."""
    total = 0.0
    for task in range(TASKS):
        own = {name: value.detach().clone().requires_grad_() for name, value in params.items()}
        gradients = torch.autograd.grad(
            loss_of(scorer, own, part(support, task)), list(own.values())
        )
        moved = {
            name: value.detach() - RATE * gradient
            for (name, value), gradient in zip(own.items(), gradients, strict=True)
        }
        with torch.no_grad():
            total += float(loss_of(scorer, moved, part(query, task)))
    return total


@pytest.mark.parametrize("mode", ["full", "prefix"])
def test_gradient_equals_finite_differences(
    backbone: Backbone, batches: tuple[Batch, Batch], mode: str
) -> None:
    scorer, params = Scorer(backbone, WORDS, mode), start(backbone, mode)
    outer_gradient(scorer, params, *batches, TASKS, inner_rate=RATE)
    prompt = params["prompt_embeddings"]
    assert prompt.grad is not None
    generator = np.random.default_rng(2)
    for _ in range(6):
        row, column = int(generator.integers(3)), int(generator.integers(32))
        step = 1e-5
        values = []
        for sign in (1, -1):
            moved = prompt.detach().clone()
            moved[row, column] += sign * step
            values.append(outer_loss(scorer, {"prompt_embeddings": moved}, *batches))
        slope = (values[0] - values[1]) / (2 * step)
        assert float(prompt.grad[row, column]) == pytest.approx(slope, rel=1e-5, abs=1e-8)


def test_validation_is_the_query_loss_and_accuracy_of_eight_episodes_of_held_out_rows(
    tiny_t5: Path,
) -> None:
    """What is measured at the start, against one task after another."""
    backbone = load_backbone(str(tiny_t5))
    generator = np.random.default_rng(0)
    words = ["film", "food", "bad", "great", "not", "very", "the", "plot"]
    texts = [" ".join(generator.choice(words, 5)) for _ in range(120)]
    data = SourceData(texts, generator.integers(0, 3, 120), np.arange(120) % TASKS, 3)
    config = MetaConfig(
        data="", out="", init="random", mode="full", prompt_tokens=3, steps=1, samples=SAMPLES,
        inner_rate=0.8, inner_steps=2, order="first", validation_share=0.2, seed=5,
    )  # fmt: skip
    found = meta_train(backbone, data, config, RunOptions(quiet=True)).state.metrics[0]

    scorer = Scorer(backbone, WORDS, "full")
    start = initial_params(backbone, "random", "full", 3, 5)
    rows = Rows(backbone, config.template, texts, data.labels, config.max_tokens)
    _, held = hold_out(data, 0.2, 5)
    sampler = TaskSampler(data.clusters[held], data.labels[held], SAMPLES)
    losses, hits = [], []
    for episode in range(8):
        support, query = (rows.batch(held[chosen]) for chosen in sampler.draw(5, episode))
        for task in range(TASKS):
            own, asked = start, part(query, task)
            for _ in range(2):
                loss = loss_of(scorer, own, part(support, task))
                gradients = torch.autograd.grad(loss, list(own.values()))
                own = {
                    name: value - 0.8 * gradient
                    for (name, value), gradient in zip(own.items(), gradients, strict=True)
                }
            with torch.no_grad():
                losses.append(float(loss_of(scorer, own, asked)))
                hits += (scorer(add_group(own), asked).argmax(-1) == asked.labels).tolist()
    assert len(hits) == 8 * TASKS * SAMPLES and 0 < sum(hits) < len(hits)
    assert found["validation_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert found["validation_accuracy"] == pytest.approx(np.mean(hits))


def test_frozen_weights_get_no_gradient(backbone: Backbone, batches: tuple[Batch, Batch]) -> None:
    scorer, params = Scorer(backbone, WORDS, "prefix"), start(backbone, "prefix")
    outer_gradient(scorer, params, *batches, TASKS, inner_rate=RATE)
    assert all(weight.grad is None for weight in backbone.t5.model.parameters())


def test_draws_are_disjoint_in_their_cluster_and_repeatable() -> None:
    clusters = np.repeat([0, 1, 5], 20)
    labels = np.arange(60) % 2
    sampler = TaskSampler(clusters, labels, 4)
    assert sampler.tasks == 3
    support, query = sampler.draw(7, 11)
    assert not set(support) & set(query)
    for index, name in enumerate((0, 1, 5)):
        rows = slice(4 * index, 4 * index + 4)
        assert (clusters[support[rows]] == name).all()
        assert (clusters[query[rows]] == name).all()
    again = sampler.draw(7, 11)
    assert np.array_equal(support, again[0]) and np.array_equal(query, again[1])
    assert not np.array_equal(support, sampler.draw(7, 12)[0])


def test_balanced_draws_hold_each_class_evenly() -> None:
    clusters = np.zeros(50, dtype=int)
    labels = np.array([0] * 40 + [1] * 10)
    sampler = TaskSampler(clusters, labels, 4, balanced=True)
    draws = [sampler.draw(0, step) for step in range(50)]
    for support, query in draws:
        assert labels[support].sum() == labels[query].sum() == 2
        assert len(set(support) | set(query)) == 8
    assert len({tuple(sorted(support)) for support, _ in draws}) > 40  # not the same rows again


@pytest.mark.parametrize("counts", [[3, 5], [1, 1, 6], [7, 1], [2, 2, 2, 2], [8], [3, 3, 3]])
def test_balanced_draws_fill_both_sides_from_the_fewest_rows(counts: list[int]) -> None:
    """With 2M rows or hardly more every one is needed, whichever classes they are of."""
    labels = np.repeat(np.arange(len(counts)), counts)
    sampler = TaskSampler(np.zeros(len(labels), dtype=int), labels, 4, balanced=True)
    for step in range(30):
        support, query = sampler.draw(1, step)
        assert len(support) == len(query) == 4 and len(set(support) | set(query)) == 8
        if counts == [3, 3, 3]:  # classes of 1, 1 and 2 rows on each side
            assert {*np.bincount(labels[support], minlength=3)} <= {1, 2}
            assert {*np.bincount(labels[query], minlength=3)} <= {1, 2}


def test_small_clusters_are_named() -> None:
    assert TaskSampler(np.array([0] * 8 + [3] * 7), np.zeros(15, dtype=int), 4).small == [3]
