"""The training loop: resume to the bit, patience, schedule, refusals."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from serve.errors import Failure, UserError
from trainer.loop import Loop, RunOptions, Schedule, Score, check_rate
from trainer.tune import epoch_stream


class Killed(Exception):
    pass


def make_loop(
    folder: Path | None,
    *,
    kill_at: int | None = None,
    kill_in: int | None = None,
    steps: int = 30,
    scale: float = 1.0,
    config: dict[str, Any] | None = None,
) -> Loop:
    """Least squares on data that depend on the step only."""
    torch.manual_seed(0)
    start = (scale * torch.randn(4, 3), torch.randn(2))
    params = {"p": start[0].requires_grad_(), "q": start[1].requires_grad_()}

    def loss() -> torch.Tensor:
        return (params["p"] ** 2).sum() + ((params["q"] - 1) ** 2).sum()

    def gradient(step: int) -> dict[str, float]:
        if step == kill_at:
            raise Killed
        noise = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        value = loss() + (noise * params["p"]).sum()
        value.backward()
        return {"loss": float(value.detach())}

    def evaluate() -> Score:
        if loop.state.step == kill_in:
            raise KeyboardInterrupt
        return Score(0.5, float(loss().detach()))

    schedule = Schedule(
        steps, 0.05, weight_decay=0.01, warmup=5, decay=True, evaluate_every=4, patience=50
    )
    options = RunOptions(
        checkpoint=folder, fingerprint={"a": 1, "config": config or {}}, quiet=True
    )
    loop = Loop(params, gradient, evaluate, schedule, options)
    return loop


@pytest.mark.parametrize("kill_at", [1, 13, 29])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, kill_at: int) -> None:
    whole = make_loop(None)
    want = whole.run()
    killed = make_loop(tmp_path / "c", kill_at=kill_at)
    with pytest.raises(Killed):
        killed.run()
    resumed = make_loop(tmp_path / "c")
    got = resumed.run()
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert all(torch.equal(resumed.params[n], whole.params[n]) for n in want)
    assert resumed.metrics_text() == whole.metrics_text()
    resumed.clean_up()
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("kill_in", [4, 12, 30])
def test_an_evaluation_that_was_interrupted_is_made_up_for(tmp_path: Path, kill_in: int) -> None:
    whole = make_loop(None)
    want = whole.run()
    with pytest.raises(KeyboardInterrupt):
        make_loop(tmp_path / "c", kill_in=kill_in).run()
    resumed = make_loop(tmp_path / "c")
    got = resumed.run()
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert resumed.metrics_text() == whole.metrics_text()
    assert resumed.state.best_step == whole.state.best_step


def test_an_interrupt_within_a_step_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    """Tensors that a step has changed half-way are not saved as if it had not begun."""
    want = make_loop(None).run()
    with pytest.raises(Killed):
        make_loop(tmp_path / "c", kill_at=9).run()
    torn = make_loop(tmp_path / "c")
    step = torn.optimizer.step

    def interrupted() -> None:
        step()
        if torn.state.step == 17:
            raise KeyboardInterrupt

    torn.optimizer.step = interrupted  # type: ignore[method-assign, assignment]
    with pytest.raises(KeyboardInterrupt):
        torn.run()
    resumed = make_loop(tmp_path / "c")
    assert all(torch.equal(value, want[name]) for name, value in resumed.run().items())


def test_settings_that_came_to_be_since_and_are_off_change_nothing(tmp_path: Path) -> None:
    want = make_loop(None).run()
    with pytest.raises(Killed):
        make_loop(tmp_path / "c", kill_at=9, config={"rate": 0.1}).run()
    for other in ({"rate": 0.1, "new": ["x"]}, {"rate": 0.2}, {"new": []}):
        with pytest.raises(UserError, match="other settings"):
            make_loop(tmp_path / "c", config=other).run()
    got = make_loop(tmp_path / "c", config={"rate": 0.1, "new": [], "more": False}).run()
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_the_bar_shows_the_loss_on_held_out_rows() -> None:
    loop = make_loop(None)
    assert "held_out_loss" not in loop._shown({})
    loop.run()
    last = loop.state.metrics[-1]["validation_loss"]
    assert loop._shown({"loss": 0.5}) == {
        "loss": "0.500", "held_out_loss": f"{last:.3f}", "best": "0.500"
    }  # fmt: skip


def test_a_checkpoint_of_another_start_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        make_loop(tmp_path / "c", kill_at=9).run()
    with pytest.raises(UserError, match="other settings"):
        make_loop(tmp_path / "c", scale=2.0).run()


def test_a_run_that_diverged_leaves_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        make_loop(tmp_path / "c", kill_at=9).run()
    loop = make_loop(tmp_path / "c")
    loop.gradient = lambda step: {"loss": float("inf")}
    with pytest.raises(Failure, match="lower the learning rate"):
        loop.run()
    assert not (tmp_path / "c").exists()


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        make_loop(tmp_path / "c", kill_at=9).run()
    other = make_loop(tmp_path / "c")
    other.fingerprint = {"a": 2}
    with pytest.raises(UserError, match="other settings"):
        other.run()


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        make_loop(tmp_path / "c", kill_at=9).run()
    (tmp_path / "c" / "state.safetensors").write_bytes(b"123")
    with pytest.raises(Failure, match="damaged"):
        make_loop(tmp_path / "c").run()


def scripted(
    scores: list[tuple[float, float]], patience: int, warmup: int = 0, best_by: str = "accuracy"
) -> Loop:
    """A loop whose evaluations are given; the parameter counts the steps."""
    params = {"p": torch.zeros(1, requires_grad=True)}

    def gradient(step: int) -> dict[str, float]:
        params["p"].grad = -torch.ones(1)
        return {"loss": 0.0}

    queue = iter(scores)
    schedule = Schedule(
        len(scores) - 1, 1.0, evaluate_every=1, patience=patience, warmup=warmup, best_by=best_by
    )
    return Loop(params, gradient, lambda: Score(*next(queue)), schedule, RunOptions(quiet=True))


def test_patience_counts_evaluations_without_better_accuracy_or_loss() -> None:
    scores = [(0.5, 1.0), (0.7, 0.9), (0.6, 0.8), (0.6, 0.85), (0.6, 0.9), (0.9, 0.1)]
    loop = scripted(scores, patience=2)
    loop.run()
    assert loop.state.step == 4  # the lower loss at step 2 counts as progress
    assert loop.state.best_step == 1 and loop.state.best == Score(0.7, 0.9)


@pytest.mark.parametrize(
    ("losses", "steps"),
    [
        ([1.0, 0.9995, 0.9990, 0.9985, 0.9980], 2),  # half a thousandth at a time
        ([1.0, 0.9980, 0.9960, 0.9940, 0.9920], 4),
        ([1.0, 0.9995, 0.9980, 0.9975, 0.9970], 4),  # the second ends the first's count
    ],
)
def test_a_loss_that_creeps_down_is_no_reason_to_go_on(losses: list[float], steps: int) -> None:
    loop = scripted([(0.5, loss) for loss in losses], patience=2)
    loop.run()
    assert loop.state.step == steps
    assert loop.state.best_step == steps  # the least better is still what is kept


def test_equal_accuracy_is_decided_by_loss() -> None:
    loop = scripted([(0.5, 1.0), (0.5, 0.8), (0.5, 0.9)], patience=9)
    loop.run()
    assert loop.state.best_step == 1


@pytest.mark.parametrize("best_by", ["accuracy", "loss"])
def test_what_has_no_finite_loss_is_not_kept(best_by: str) -> None:
    """Its answers are all the first class, which may be right more often than before."""
    loop = scripted([(0.5, 1.0), (0.4, 0.9), (0.9, math.nan)], patience=9, best_by=best_by)
    loop.run()
    assert loop.state.best_step == (0 if best_by == "accuracy" else 1)


def test_the_objective_can_decide_what_is_kept() -> None:
    """A lucky accuracy of the start must not win over a lower loss."""
    scores = [(0.9, 1.0), (0.6, 0.8), (0.5, 0.7), (0.7, 0.7), (0.9, 1.75)]
    loop = scripted(scores, patience=9, best_by="loss")
    kept = loop.run()
    assert loop.state.best_step == 3 and loop.state.best == Score(0.7, 0.7)
    assert float(kept["p"]) == pytest.approx(3.0, rel=1e-6)  # AdamW moves by its rate a step
    assert scripted(scores, patience=9).run()["p"] == 0.0


def test_patience_counts_from_the_highest_accuracy_whatever_is_kept() -> None:
    scores = [(0.9, 1.0), (0.6, 0.5), (0.7, 0.6), (0.8, 0.6), (0.9, 0.6)]
    loop = scripted(scores, patience=2, best_by="loss")
    loop.run()
    assert loop.state.step == 3  # 0.7 and 0.8 are better than the kept prompt's, not than 0.9


def test_patience_starts_after_the_warm_up() -> None:
    loop = scripted([(0.5, 1.0)] * 8, patience=2, warmup=4)
    loop.run()
    assert loop.state.step == 6


def test_schedule_is_linear_up_and_down() -> None:
    schedule = Schedule(steps=10, rate=1.0, warmup=4, decay=True)
    want = [0.25, 0.5, 0.75, 1.0, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
    assert [schedule.factor(step) for step in range(10)] == pytest.approx(want)


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    loop = scripted([(0.5, 1.0)] * 3, patience=9)
    loop.gradient = lambda step: {"loss": float("nan")}
    with pytest.raises(Failure, match="lower the learning rate"):
        loop.run()


def test_a_rate_that_cannot_move_a_prompt_is_refused() -> None:
    params = {"p": torch.full((2, 8), 0.25)}
    with pytest.raises(UserError, match=r"would stay where it starts. Try 0.003"):
        check_rate(1e-6, 250, params)
    check_rate(3e-3, 250, params)
    with pytest.raises(UserError, match="Try more steps, or a higher rate"):
        check_rate(1e-3, 1, {"p": torch.ones(2, 8)})


def test_epoch_stream_visits_every_row_once_an_epoch() -> None:
    steps = [epoch_stream(10, 4, 3, step) for step in range(5)]
    rows = [int(row) for step in steps for row in step]
    assert sorted(rows[:10]) == list(range(10)) and sorted(rows[10:]) == list(range(10))
    assert rows[:10] != rows[10:]
    assert len(epoch_stream(3, 8, 0, 5)) == 8
