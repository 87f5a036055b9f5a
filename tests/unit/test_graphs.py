"""MetaPT's outer step as CUDA graphs need it; and where there is a GPU, replayed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trainer import graphs
from trainer.backbone import Backbone, load_backbone
from trainer.configs import MetaConfig
from trainer.graphs import MULTIPLE, OuterGraphs, bucket, padded
from trainer.loop import RunOptions
from trainer.meta import Outcome, outer_gradient, outer_losses
from trainer.modes import Params, deepen
from trainer.readout import Batch
from trainer.rows import Rows, Scorer
from trainer.source import SourceData, meta_train
from trainer.t5 import Packing, unpacked
from trainer.variants import InnerRates

RATE = 0.3
TASKS, SAMPLES = 3, 2
WORDS = ["bad", "okay", "good"]
MODES = ["full", "prefix", "deep"]

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module")
def backbone(tiny_t5: Path) -> Backbone:
    return load_backbone(str(tiny_t5), dtype=torch.float64)


@pytest.fixture(scope="module")
def gpu_backbone(tiny_t5: Path) -> Backbone:
    return load_backbone(str(tiny_t5), dtype=torch.float64, device="cuda")


def draw(backbone: Backbone, seed: int, longest: int = 9) -> tuple[Batch, Batch]:
    """Support and query, on the backbone's device."""
    generator = np.random.default_rng(seed)
    words = ["film", "food", "bad", "great", "not", "very", "the", "plot"]
    count = 2 * TASKS * SAMPLES
    lengths = generator.integers(1, longest, count)
    texts = [" ".join(generator.choice(words, length)) for length in lengths]
    labels = generator.integers(0, 3, count)
    rows = Rows(backbone, "{text} It was <extra_id_0>.", texts, labels, 64)
    return rows.batch(np.arange(count // 2)), rows.batch(np.arange(count // 2, count))


def start(backbone: Backbone, mode: str) -> Params:
    torch.manual_seed(1)
    prompt = torch.randn(3, 32, dtype=torch.float64).to(backbone.t5.model.shared.weight)
    params: Params = {"prompt_embeddings": prompt}
    if mode == "deep":
        params = deepen(backbone.t5, params)
    return {name: value.clone().requires_grad_() for name, value in params.items()}


def losses_of(backbone: Backbone, mode: str, params: Params, **options: Any) -> graphs.Losses:
    scorer = Scorer(backbone, WORDS, mode)
    options = {"inner_rate": RATE, "stages": scorer.stages(), **options}
    return lambda s, q: outer_losses(scorer, params, s, q, TASKS, **options)


def plain(backbone: Backbone, mode: str, params: Params, batches: tuple[Batch, Batch]) -> Outcome:
    """The step without graphs, which leaves its gradients in `.grad`."""
    scorer = Scorer(backbone, WORDS, mode)
    return outer_gradient(scorer, params, *batches, TASKS, inner_rate=RATE, stages=scorer.stages())


def copies(params: Params) -> Params:
    return {name: value.detach().clone().requires_grad_() for name, value in params.items()}


def assert_same_gradients(ours: Params, want: Params, **tolerances: float) -> None:
    for name, value in want.items():
        assert ours[name].grad is not None and value.grad is not None
        limits = tolerances or {"atol": 1e-10, "rtol": 1e-8}
        torch.testing.assert_close(ours[name].grad, value.grad, **limits)


@pytest.mark.parametrize("mode", MODES)
def test_padding_to_a_bucket_leaves_the_gradient(backbone: Backbone, mode: str) -> None:
    batches = draw(backbone, 0)
    length = bucket(*batches)
    assert length % MULTIPLE == 0 and length - MULTIPLE < batches[0].ids.shape[1] <= length
    want, ours = start(backbone, mode), start(backbone, mode)
    before = plain(backbone, mode, want, batches)
    with unpacked():
        after = plain(backbone, mode, ours, tuple(padded(part, length) for part in batches))  # type: ignore[arg-type]
    assert_same_gradients(ours, want)
    assert after.loss == pytest.approx(before.loss) and after.accuracy == before.accuracy
    assert after.support_loss == pytest.approx(before.support_loss)


def test_both_sides_take_the_longer_ones_bucket() -> None:
    def of(length: int) -> Batch:
        return Batch(torch.zeros(2, length, dtype=torch.long), torch.ones(2, length).bool())

    assert bucket(of(16), of(3)) == 16
    assert bucket(of(3), of(17)) == 32


def test_nothing_is_packed_within_unpacked() -> None:
    mask = torch.tensor([[True] * 8, [True] + [False] * 7])
    assert Packing.of(mask) is not None
    with unpacked():
        assert Packing.of(mask) is None
    assert Packing.of(mask) is not None


COUNTING = ("nonzero", "_local_scalar_dense", "masked_select", "_unique2", "bincount", "equal")


class Waits(TorchDispatchMode):
    """Collects what would make a CPU wait for a GPU. Tensors on `meta` stand for those there."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.calls = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = torch.utils._pytree.tree_leaves((args, kwargs, result))
        kinds = {value.device.type for value in tensors if isinstance(value, torch.Tensor)}
        name = func.overloadpacket.__name__
        # A number without dimensions may come along to a kernel, but `where` copies it first.
        if name in COUNTING or (name in ("_to_copy", "copy_", "where") and len(kinds) > 1):
            self.found.append(str(func))
        self.calls += 1
        return result


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("learned", [False, True])
def test_a_step_waits_for_nothing(tiny_t5: Path, mode: str, learned: bool) -> None:
    """What is recorded must not: checked without a GPU, on tensors that have a shape only."""
    backbone = load_backbone(str(tiny_t5))
    batches = draw(backbone, 0)
    scorer = Scorer(backbone, WORDS, mode)
    params = start(backbone, mode)
    backbone.t5.to("meta")
    scorer.words, scorer.decoder_ids = scorer.words.to("meta"), scorer.decoder_ids.to("meta")
    params = {name: value.detach().to("meta").requires_grad_() for name, value in params.items()}
    rates = InnerRates(params, RATE, learned=learned)
    length = bucket(*batches)
    support, query = (padded(part, length).to("meta") for part in batches)
    trained = {**params, **rates.trained}
    with Waits() as waits, unpacked():
        total, _ = outer_losses(
            scorer, params, support, query, TASKS, inner_rate=rates.now(), stages=scorer.stages()
        )
        gradients = torch.autograd.grad(total, list(trained.values()))
    assert waits.found == [] and waits.calls > 1000
    for gradient, value in zip(gradients, trained.values(), strict=True):
        assert gradient.shape == value.shape


@pytest.mark.parametrize("mode", MODES)
def test_on_a_cpu_the_step_is_the_plain_one(backbone: Backbone, mode: str) -> None:
    batches = draw(backbone, 0)
    want, ours = start(backbone, mode), start(backbone, mode)
    before = plain(backbone, mode, want, batches)
    taken = OuterGraphs(ours)
    assert taken.reason is not None
    for _ in range(2):  # a step sets the gradient, it does not add to it
        figures = taken.step(losses_of(backbone, mode, ours), *batches)
    assert Outcome.of(figures) == before
    assert_same_gradients(ours, want, atol=0, rtol=0)


class Played:
    """Stands for a CUDA graph: takes the same path, and computes in each replay."""

    made = 0

    def __init__(self, work: Callable[[], None], stream: Any, pool: Any):
        work()  # as the warm-up does
        self.replay = work
        Played.made += 1


def recording(trained: Params) -> OuterGraphs:
    """Graphs of tensors on a CPU."""
    taken = OuterGraphs(trained)
    taken.reason = None
    taken._prepare()
    return taken


@pytest.mark.parametrize("mode", MODES)
def test_rows_go_through_the_recordings_own_tensors(
    backbone: Backbone, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "_Recording", Played)
    monkeypatch.setattr(Played, "made", 0)
    ours = start(backbone, mode)
    taken = recording(ours)
    for seed, longest in [(0, 9), (1, 40), (2, 9), (3, 40)]:
        batches, want = draw(backbone, seed, longest), copies(ours)
        before = plain(backbone, mode, want, batches)
        after = Outcome.of(taken.step(losses_of(backbone, mode, ours), *batches))
        assert_same_gradients(ours, want)
        assert after.loss == pytest.approx(before.loss) and after.accuracy == before.accuracy
        move(ours)
    assert Played.made == 2


def move(params: Params) -> None:
    """As an optimizer does: in place."""
    with torch.no_grad():
        for value in params.values():
            assert value.grad is not None
            value -= 0.1 * value.grad
            value.grad = None


def test_a_recording_that_fails_gives_way_to_plain_steps(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Fails:
        def __init__(self, *_: Any):
            raise RuntimeError("operation not permitted when stream is capturing\nmore of it")

    monkeypatch.setattr(graphs, "_Recording", Fails)
    batches = draw(backbone, 0)
    want, ours = start(backbone, "prefix"), start(backbone, "prefix")
    before = plain(backbone, "prefix", want, batches)
    taken = recording(ours)
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            figures = taken.step(losses_of(backbone, "prefix", ours), *batches)
    assert Outcome.of(figures) == before
    assert_same_gradients(ours, want, atol=0, rtol=0)
    assert taken.reason == "operation not permitted when stream is capturing"
    assert len([line for line in caplog.messages if taken.reason in line]) == 1


@pytest.mark.parametrize("factor", [0.0, 1.5, float("nan")])
def test_a_first_replay_that_is_not_the_plain_step_gives_way_to_it(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    factor: float,
) -> None:  # fmt: skip
    class Misses:
        def __init__(self, work: Callable[[], None], stream: Any, pool: Any):
            work()
            self.kept = [gradient.clone() for gradient in taken._gradients.values()]

        def replay(self) -> None:
            for gradient, kept in zip(taken._gradients.values(), self.kept, strict=True):
                gradient.copy_(factor * kept)

    monkeypatch.setattr(graphs, "_Recording", Misses)
    batches = draw(backbone, 0)
    want, ours = start(backbone, "full"), start(backbone, "full")
    plain(backbone, "full", want, batches)
    taken = recording(ours)
    for _ in range(2):
        taken.step(losses_of(backbone, "full", ours), *batches)
        assert_same_gradients(ours, want, atol=0, rtol=0)
    assert taken.reason is not None and "differs" in taken.reason
    assert len([line for line in caplog.messages if "differs" in line]) == 1


# -- with a GPU ----------------------------------------------------------------------------------


@on_gpu
@pytest.mark.parametrize("mode", MODES)
def test_replayed_steps_equal_plain_ones(gpu_backbone: Backbone, mode: str) -> None:
    ours = start(gpu_backbone, mode)
    taken = OuterGraphs(ours)
    for seed, longest in [(0, 9), (1, 9), (2, 40), (3, 9), (4, 40), (5, 40)]:
        batches, want = draw(gpu_backbone, seed, longest), copies(ours)
        before = plain(gpu_backbone, mode, want, batches)
        figures = taken.step(
            losses_of(gpu_backbone, mode, ours), *(part.to("cpu") for part in batches)
        )
        assert taken.reason is None
        assert_same_gradients(ours, want)
        after = Outcome.of(figures)
        assert after.loss == pytest.approx(before.loss, rel=1e-8)
        assert after.support_loss == pytest.approx(before.support_loss, rel=1e-8)
        assert after.accuracy == before.accuracy
        move(ours)
    assert len(taken._known) == 2


@on_gpu
def test_figures_stay_when_the_next_step_is_taken(gpu_backbone: Backbone) -> None:
    ours = start(gpu_backbone, "prefix")
    taken, losses = OuterGraphs(ours), losses_of(gpu_backbone, "prefix", ours)
    first, second = (draw(gpu_backbone, seed) for seed in (0, 1))
    kept = [taken.step(losses, *batches) for batches in (first, second, first)]
    assert kept[0].tolist() == pytest.approx(kept[2].tolist())
    assert kept[0].tolist() != kept[1].tolist()


@on_gpu
@pytest.mark.parametrize("mode", ["full", "prefix"])
@pytest.mark.parametrize(("steps", "second"), [(2, True), (1, False)])
def test_options_are_recorded_too(
    gpu_backbone: Backbone, mode: str, steps: int, second: bool
) -> None:
    """Learned rates, several inner steps, first order."""
    ours, scorer = start(gpu_backbone, mode), Scorer(gpu_backbone, WORDS, mode)
    rates = InnerRates(ours, RATE, learned=True)
    trained = {**ours, **rates.trained}
    options: dict[str, Any] = {"inner_steps": steps, "second_order": second}
    taken = OuterGraphs(trained)
    for seed in (0, 1):
        batches, want = draw(gpu_backbone, seed), copies(ours)
        others = InnerRates(want, RATE, learned=True)
        for name, value in others.trained.items():
            value.data.copy_(rates.trained[name].data)
        outer_gradient(
            scorer, want, *batches, TASKS, inner_rate=others.now(), stages=scorer.stages(),
            **options,
        )  # fmt: skip
        taken.step(
            lambda s, q: outer_losses(
                scorer, ours, s, q, TASKS, inner_rate=rates.now(), stages=scorer.stages(), **options
            ),
            *batches, kind=second,
        )  # fmt: skip
        assert taken.reason is None
        assert_same_gradients(trained, {**want, **others.trained})
        move(trained)


@on_gpu
@pytest.mark.parametrize("mode", MODES)
def test_autocast_is_recorded_and_near_fp32(tiny_t5: Path, mode: str) -> None:
    backbone = load_backbone(str(tiny_t5), device="cuda")
    whole = start(backbone, mode)
    half, eager = copies(whole), copies(whole)
    batches = draw(backbone, 0)
    plain(backbone, mode, whole, batches)
    taken = OuterGraphs(half)
    with torch.autocast("cuda", torch.bfloat16):
        plain(backbone, mode, eager, batches)
        for seed in (1, 0):
            taken.step(losses_of(backbone, mode, half), *draw(backbone, seed))
    assert taken.reason is None
    for name, value in whole.items():
        wanted, recorded, launched = value.grad, half[name].grad, eager[name].grad
        assert wanted is not None and recorded is not None and launched is not None
        assert recorded.dtype == torch.float32
        assert (recorded - wanted).norm() < 0.2 * wanted.norm()
        assert (launched - wanted).norm() < 0.2 * wanted.norm()


def meta_metrics(backbone: Backbone, mode: str) -> list[dict[str, Any]]:
    generator = np.random.default_rng(5)
    words = ["film", "food", "bad", "great", "not", "very", "the", "plot"]
    texts = [" ".join(generator.choice(words, generator.integers(1, 25))) for _ in range(180)]
    data = SourceData(texts, np.arange(180) % 3, np.arange(180) // 60, 3)
    config = MetaConfig(
        data="", out="", mode=mode, prompt_tokens=3, samples=2, steps=8, evaluate_every=2,
        max_tokens=32, init="random", inner_rate=RATE, first_order_steps=3,
    )  # fmt: skip
    return meta_train(backbone, data, config, RunOptions(quiet=True)).state.metrics


@on_gpu
@pytest.mark.parametrize("mode", MODES)
def test_a_run_on_a_gpu_goes_as_on_a_cpu(
    backbone: Backbone, gpu_backbone: Backbone, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        ours = meta_metrics(gpu_backbone, mode)
    assert not [line for line in caplog.messages if "no CUDA graphs" in line]
    for mine, want in zip(ours, meta_metrics(backbone, mode), strict=True):
        assert mine == pytest.approx(want, rel=1e-4)


# Last: a recording that fails may leave the device's context in disorder.
@on_gpu
def test_a_step_that_waits_is_taken_plainly(gpu_backbone: Backbone) -> None:
    batches = draw(gpu_backbone, 0)
    want, ours = start(gpu_backbone, "prefix"), start(gpu_backbone, "prefix")
    plain(gpu_backbone, "prefix", want, batches)
    taken, losses = OuterGraphs(ours), losses_of(gpu_backbone, "prefix", ours)

    def waits(support: Batch, query: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        total, figures = losses(support, query)
        return total * float(total > 0), figures

    for _ in range(2):
        taken.step(waits, *batches)
    assert taken.reason is not None
    assert_same_gradients(ours, want)
