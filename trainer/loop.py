"""The loop that all training shares: steps, evaluation, patience, checkpoints, resume.

Every random draw of a method is a function of (seed, step), never of a generator's past, so a run
that is killed and resumed takes the same steps as one that is not, and ends with the same bits.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from serve.errors import Failure, UserError
from serve.files import atomic_folder, read_json
from trainer.modes import Params
from trainer.parallel import workers
from trainer.runs import METRICS_FILE
from trainer.tensors import digest, read_tensors, write_tensors

log = logging.getLogger(__name__)

CHECKPOINT_SECONDS = 60.0  # a kill costs at most this much work
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # AdamW's state of each tensor


@dataclass
class Score:
    """An evaluation; `more` is measured beside it and goes into the metrics as it is."""

    accuracy: float
    loss: float
    more: dict[str, float] = field(default_factory=dict)

    def better_than(self, other: Score | None, by: str = "accuracy") -> bool:
        """Whether this is the new best; between equals the other figure decides. What has no
        finite loss is none: one answer to everything, which may be right by chance."""
        if not math.isfinite(self.loss):
            return False
        if other is None:
            return True
        if by == "loss":
            return (self.loss, -self.accuracy) < (other.loss, -other.accuracy)
        return (self.accuracy, -self.loss) > (other.accuracy, -other.loss)


@dataclass
class Schedule:
    """Steps, rates and patience of a run.

    Attributes:
        steps: optimizer steps at most.
        rate: AdamW's learning rate; weight_decay: its decoupled weight decay.
        warmup: steps of linear warm-up; decay: whether the rate then falls linearly to zero.
        evaluate_every: steps between evaluations.
        patience: evaluations without a better accuracy or loss after which the run stops.
        clip: largest norm of the gradient, None for no clipping.
        best_by: accuracy or loss, the figure that says which tensors are kept.
    """

    steps: int
    rate: float
    weight_decay: float = 0.0
    warmup: int = 0
    decay: bool = False
    evaluate_every: int = 500
    patience: int = 6
    clip: float | None = None
    best_by: str = "accuracy"

    def factor(self, step: int) -> float:
        """The share of `rate` that step `step` (from 0) uses."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if not self.decay:
            return 1.0
        return max(0.0, (self.steps - step) / max(1, self.steps - self.warmup))


@dataclass
class State:
    """Where a run stands."""

    step: int = 0
    best: Score | None = None
    best_step: int = 0
    lowest_loss: float = math.inf
    highest_accuracy: float = 0.0
    stale: int = 0  # evaluations since accuracy or loss last improved
    finished: bool = False
    seconds: float = 0.0
    metrics: list[dict[str, Any]] = field(default_factory=list)
    due: dict[str, float] | None = None  # measured by a step whose evaluation is not done yet


def check_rate(rate: float, steps: int, params: Params, flag: str = "--rate") -> None:
    """Refuse a learning rate that cannot move a prompt (google-research/prompt-tuning#151).

    AdamW moves a number by about its rate a step, so `rate * steps` bounds how far a run can go.

    Raises:
        UserError: that is under one per cent of the prompt's own size.
    """
    size = math.sqrt(sum(float(value.detach().double().pow(2).sum()) for value in params.values()))
    size /= math.sqrt(sum(value.numel() for value in params.values()))
    if rate * steps < 0.01 * size:
        usual = 3e-3  # appendix A.4's
        advice = f"{usual:g}" if usual * steps >= 0.01 * size else "more steps, or a higher rate"
        raise UserError(
            f"{flag} {rate:g} over {steps} steps moves a prompt's numbers by at most "
            f"{rate * steps:.1g}, but they are {size:.2g} in size: it would stay where it starts. "
            f"Try {advice}"
        )


@dataclass(frozen=True)
class RunOptions:
    """What a caller may want of a run, whatever is trained.

    checkpoint: folder for checkpoints; None for none.
    fingerprint: what must be equal for a checkpoint to be continued (the configuration).
    watch: called after each evaluation with (step, metrics); may raise to stop the run.
    quiet: no progress bar.
    rate_flag: what the learning rate is called where the caller got it, for errors.
    """

    checkpoint: Path | None = None
    fingerprint: dict[str, Any] | None = None
    watch: Callable[[int, dict[str, float]], None] | None = None
    quiet: bool = False
    rate_flag: str = "--rate"


DEFAULT_OPTIONS = RunOptions()


class Loop:
    """Trains a dictionary of tensors with AdamW.

    Args:
        params: leaf tensors that require gradients; they are changed in place.
        gradient: called with the step's number; fills `.grad` of the tensors and returns what the
            step measured (loss, accuracy), for the progress bar and the metrics file.
        evaluate: gives the score of the tensors as they are.
        schedule: see `Schedule`.
        options: see `RunOptions`.
        label: shown by the progress bar.
    """

    def __init__(
        self,
        params: Params,
        gradient: Callable[[int], dict[str, float]],
        evaluate: Callable[[], Score],
        schedule: Schedule,
        options: RunOptions = DEFAULT_OPTIONS,
        label: str = "train",
    ):
        self.params, self.gradient, self.evaluate = params, gradient, evaluate
        self.schedule, self.checkpoint = schedule, options.checkpoint
        self.fingerprint = json.loads(json.dumps(options.fingerprint or {}))
        if self.checkpoint is not None:  # not to be continued from another start
            self.fingerprint["start"] = digest(*(value.detach() for value in params.values()))
        if workers().precision != "no":  # nor half in bf16
            self.fingerprint["precision"] = workers().precision
        self.label, self.watch = label, options.watch
        self.quiet = options.quiet or not workers().main
        self.state = State()
        self._whole = True  # false while tensors and state do not belong to the same step
        self.best: Params = {name: value.detach().clone() for name, value in params.items()}
        self.optimizer = torch.optim.AdamW(
            list(params.values()), lr=schedule.rate, weight_decay=schedule.weight_decay
        )

    def run(self) -> Params:
        """Train to the end and return the best tensors seen. Resumes where a checkpoint stands."""
        if self._start():
            log.info("resuming %s at step %d", self.label, self.state.step)
        schedule, state = self.schedule, self.state
        started, saved = time.monotonic() - state.seconds, time.monotonic()
        bar = tqdm(
            total=schedule.steps, initial=state.step, desc=self.label, unit="step",
            disable=self.quiet or None, leave=False,
        )  # fmt: skip
        try:
            if state.step == 0 and state.best is None:
                self._evaluate({}, bar)  # the start counts too: training may never beat it
            elif state.due is not None:  # it was stopped in an evaluation
                self._evaluate(state.due, bar)
            while state.step < schedule.steps and not state.finished:
                for group in self.optimizer.param_groups:
                    group["lr"] = schedule.rate * schedule.factor(state.step)
                self.optimizer.zero_grad(set_to_none=True)
                with workers().autocast():
                    measured = self.gradient(state.step)
                if not math.isfinite(measured["loss"]):
                    # Going on would end here again, and a lower rate is a run of its own.
                    self.clean_up()
                    self._whole = False
                    raise Failure(
                        f"the loss is {measured['loss']} at step {state.step}: lower the learning "
                        "rate and start again"
                    )
                if schedule.clip is not None:
                    torch.nn.utils.clip_grad_norm_(list(self.params.values()), schedule.clip)
                self._whole = False
                self.optimizer.step()
                state.step += 1
                if state.step % schedule.evaluate_every == 0 or state.step == schedule.steps:
                    state.due = measured
                self._whole = True
                bar.update()
                bar.set_postfix(self._shown(measured), refresh=False)
                if state.due is not None:
                    self._evaluate(measured, bar)
                state.seconds = time.monotonic() - started
                if time.monotonic() - saved > CHECKPOINT_SECONDS:
                    self.save()
                    saved = time.monotonic()
        except BaseException:
            if state.step and self._whole:  # otherwise the last checkpoint stands
                with workers().undisturbed():
                    self.save()
            raise
        finally:
            bar.close()
        return self.best

    def clean_up(self) -> None:
        """Remove the checkpoint, once the result is written."""
        if self.checkpoint is not None:
            shutil.rmtree(self.checkpoint, ignore_errors=True)

    def metrics_text(self) -> str:
        """The metrics as JSON lines: step, loss, accuracy, validation figures, rate."""
        return "".join(json.dumps(line) + "\n" for line in self.state.metrics)

    def _shown(self, measured: dict[str, float]) -> dict[str, str]:
        shown = {name: f"{value:.3f}" for name, value in measured.items()}
        if self.state.metrics:
            shown["held_out_loss"] = f"{self.state.metrics[-1]['validation_loss']:.3f}"
        if self.state.best is not None:
            shown["best"] = f"{self.state.best.accuracy:.3f}"
        return shown

    def _evaluate(self, measured: dict[str, float], bar: tqdm[Any]) -> None:
        state = self.state
        with workers().autocast():
            measured_here = self.evaluate()
        score = workers().of_main(lambda: measured_here)
        self._whole = False
        # A loss that creeps down by less than a thousandth is no reason to go on.
        improved = score.loss < 0.999 * state.lowest_loss or (
            state.best is None or score.accuracy > state.highest_accuracy
        )
        state.lowest_loss = min(state.lowest_loss, score.loss)
        state.highest_accuracy = max(state.highest_accuracy, score.accuracy)
        if score.better_than(state.best, self.schedule.best_by):
            state.best, state.best_step = score, state.step
            for name, value in self.params.items():
                self.best[name].copy_(value.detach())
        # A warm-up hardly moves the prompt; counting it would end a run before it begins.
        if improved or state.step <= self.schedule.warmup:
            state.stale = 0
        else:
            state.stale += 1
        state.finished = state.stale >= self.schedule.patience
        line = {
            "step": state.step,
            **measured,
            "validation_accuracy": score.accuracy,
            "validation_loss": score.loss,
            **score.more,
            "rate": self.schedule.rate * self.schedule.factor(max(0, state.step - 1)),
        }
        state.metrics.append(line)
        state.due = None
        self._whole = True
        bar.set_postfix(self._shown(measured), refresh=False)
        if self.watch is not None:
            self.watch(state.step, line)

    # -- checkpoints -----------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint of where it stands; a run that has ended is not run again from it."""
        if self.checkpoint is None or not workers().main:
            return
        tensors: dict[str, Tensor] = {}
        for name, value in self.params.items():
            tensors[f"params/{name}"] = value.detach()
            tensors[f"best/{name}"] = self.best[name]
            for moment, tensor in self.optimizer.state.get(value, {}).items():
                tensors[f"{moment}/{name}"] = tensor
        state = self.state
        record = {
            "fingerprint": self.fingerprint,
            **{key: value for key, value in vars(state).items() if key != "best"},
            "best": None if state.best is None else vars(state.best),
            "lowest_loss": None if math.isinf(state.lowest_loss) else state.lowest_loss,
        }
        with atomic_folder(self.checkpoint) as folder:
            write_tensors(tensors, folder / "state.safetensors")
            (folder / "state.json").write_text(json.dumps(record))
            (folder / METRICS_FILE).write_text(self.metrics_text())

    def _start(self) -> bool:
        """Begin in all processes as the main one does; whether that is at a checkpoint."""
        team = workers()
        # The start is sent, so it may differ by rounding, as versions may at the user's risk.
        same = {k: v for k, v in self.fingerprint.items() if k not in ("start", "versions")}
        team.check_equal({**same, **same.pop("config", {})})
        tensors: dict[str, Tensor] = {}
        record = team.of_main(lambda: self._read(tensors))
        for name, value in self.params.items():
            if f"params/{name}" in tensors:
                with torch.no_grad():
                    value.copy_(tensors[f"params/{name}"])
                    self.best[name].copy_(tensors[f"best/{name}"])
            team.copy_main(value)
            team.copy_main(self.best[name])
        if record is None:
            return False
        best, lowest = record.pop("best"), record.pop("lowest_loss")
        moved = record.pop("moved")
        self.state = State(**record)
        self.state.best = None if best is None else Score(**best)
        self.state.lowest_loss = math.inf if lowest is None else lowest
        for name, value in self.params.items():
            if name not in moved:
                continue
            # AdamW keeps its step count on the CPU; the moments follow the weights.
            empty = {"step": torch.zeros(()), **{m: torch.zeros_like(value) for m in _MOMENTS[1:]}}
            self.optimizer.state[value] = empty
            for moment, tensor in empty.items():
                if f"{moment}/{name}" in tensors:
                    tensor.copy_(tensors[f"{moment}/{name}"])
                team.copy_main(tensor)
        return True

    def _read(self, tensors: dict[str, Tensor]) -> dict[str, Any] | None:
        """The checkpoint's record, with the names of what AdamW has `moved`; its tensors go into
        `tensors`. None if there is none."""
        if self.checkpoint is None or not (self.checkpoint / "state.json").is_file():
            return None
        record = read_json(self.checkpoint / "state.json")
        tensors |= read_tensors(self.checkpoint / "state.safetensors", "remove it to start anew")
        then = record.pop("fingerprint")
        # Settings that came to be since, and are off, change nothing.
        known = then.get("config")
        if isinstance(known, dict):
            now = self.fingerprint.get("config", {})
            known |= {name: now[name] for name in now if name not in known and not now[name]}
        if then != self.fingerprint:
            raise UserError(
                f"checkpoint {self.checkpoint} is of a run with other settings: repeat those, pass "
                "another --out, or remove the folder to start anew"
            )
        return {**record, "moved": [name for name in self.params if f"step/{name}" in tensors]}
