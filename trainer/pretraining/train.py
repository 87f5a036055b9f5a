"""The training loop: resumable to the step, scheduled by steps or by time."""

import json
import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from serve.errors import Failure
from trainer.cpu import half_precision
from trainer.parallel import workers as launched
from trainer.pretraining.config import KINDS
from trainer.pretraining.loading import Source, source, usual_loaders
from trainer.pretraining.losses import Auxiliary, batch_loss
from trainer.pretraining.mixture import Batch, Mixture, SoftTask
from trainer.pretraining.parallel import make_team
from trainer.pretraining.state import Progress, load_state, save_state
from trainer.pretraining.teacher import Teacher
from trainer.t5 import FrozenT5

logger = logging.getLogger(__name__)

# Shares of the kinds of batches: while the student still has to come close to its teacher, after.
FIRST = {"distil": 0.5, "words": 0.2, "prefix": 0.2, "full": 0.03, "span": 0.07}
LATER = {"distil": 0.08, "words": 0.30, "prefix": 0.53, "full": 0.04, "span": 0.05}


@dataclass(frozen=True)
class Schedule:
    """rate: peak rate of encoder and embeddings; fresh: factor for the decoder and the heads;
    prompt: rate of the soft prompts; warmup, fresh_warmup: steps (a converted encoder waits until
    the fresh decoder has found its scale); first: share of the run with mixture FIRST;
    steps, minutes: one of them ends the run; without: kinds of batches that are left out."""

    rate: float = 2e-4
    fresh: float = 5.0
    prompt: float = 1e-2
    warmup: int = 150
    fresh_warmup: int = 20
    first: float = 0.2
    steps: int | None = None
    minutes: float | None = None
    clip: float = 1.0
    aux_weight: float = 0.5
    distil_weight: float = 3.0
    without: tuple[str, ...] = ()

    def shares(self, done: float) -> dict[str, float]:
        """Kind of batch -> its weight in the draw, when `done` of the run is over."""
        shares = FIRST if done < self.first else LATER
        return {kind: share for kind, share in shares.items() if kind not in self.without}

    def done(self, progress: Progress) -> float:
        """Share of the run that is done, 0 to 1."""
        parts = [0.0]
        if self.steps:
            parts.append(progress.step / self.steps)
        if self.minutes:
            parts.append(progress.seconds / (60 * self.minutes))
        return min(max(parts), 1.0)

    def factor(self, progress: Progress, warmup: int) -> float:
        """Warm-up (squared; a seventh of a short run), then half a cosine to zero."""
        if self.steps:
            warmup = max(1, min(warmup, self.steps // 7))
        warm = min(1.0, (progress.step + 1) / warmup) ** 2
        return warm * 0.5 * (1 + math.cos(math.pi * self.done(progress)))


def initial_prompts(tasks: list[SoftTask], encode: Callable[[str], tuple[int, ...]],
                    embeddings: Tensor, length: int, seed: int) -> Tensor:  # fmt: skip
    """[T, length, D]: a question's label words and a wording of it, then frequent pieces.

    A soft prompt so begins as an instruction in words, and is free to move from there.
    """
    generator = torch.Generator().manual_seed(seed)
    found = []
    for task in tasks:
        question = task.question
        same = [w for w, names in question.fixed if names == task.names]
        words = same[0] if same else question.fixed[0][0]
        text = f"{question.name} {' '.join(task.names)} {words.replace('{text}', '')}"
        ids = [i for i in encode(text) if i >= 103][:length]
        top = min(103 + 4000, len(embeddings))
        rest = torch.randint(103, top, (length - len(ids),), generator=generator).tolist()
        found.append(embeddings[torch.tensor([*ids, *rest])])
    return torch.stack(found).detach().clone()


def make_optimizer(t5: FrozenT5, auxiliary: Auxiliary, schedule: Schedule) -> torch.optim.AdamW:
    """AdamW with a rate per part; every group keeps its peak rate in `peak`."""
    model = t5.model
    encoder = [p for n, p in model.encoder.named_parameters() if "embed_tokens" not in n]
    decoder = [p for n, p in model.decoder.named_parameters() if "embed_tokens" not in n]
    fresh = schedule.rate * schedule.fresh
    slow, soon = schedule.warmup, schedule.fresh_warmup
    heads = list(auxiliary.heads.parameters())
    groups = [
        # eps: rows that a batch hardly touches must not take whole steps.
        {"params": [model.shared.weight], "peak": schedule.rate, "weight_decay": 0.0,
         "eps": 1e-6, "warmup": slow},
        {"params": encoder, "peak": schedule.rate, "weight_decay": 0.01, "warmup": slow},
        {"params": decoder, "peak": fresh, "weight_decay": 0.01, "warmup": soon},
        {"params": heads, "peak": fresh, "weight_decay": 0.0, "warmup": soon},
        {"params": [auxiliary.prompts], "peak": schedule.prompt, "weight_decay": 0.0,
         "warmup": slow},
    ]  # fmt: skip
    return torch.optim.AdamW(groups, lr=schedule.rate, betas=(0.9, 0.98), fused=True)


def train(t5: FrozenT5, auxiliary: Auxiliary, mixture: Mixture, teacher: Teacher | None,
          schedule: Schedule, folder: Path, *, resume: bool = False,
          checkpoint_seconds: float = 120.0, report: Callable[[Progress, dict], None] | None = None,
          track: Callable[[Progress], None] | None = None, track_seconds: float = 600.0,
          workers: int = 1, stop_after: int | None = None, half: bool | None = None,
          loaders: int | None = None, settings: dict[str, Any] | None = None
          ) -> Progress:  # fmt: skip
    """Train until the schedule ends (or, for tests, `stop_after` steps); returns the progress.

    half: products in bf16; None: where the device multiplies it.
    loaders: processes that make batches ahead, for each process of training; None: what the device
    needs (`usual_loaders`).
    settings: of the run; a checkpoint of others is refused. The number of processes is added.

    Writes `state.safetensors` every `checkpoint_seconds` and `log.jsonl` to `folder`.
    """
    if teacher is None:
        schedule = replace(schedule, without=(*schedule.without, "distil"))
    device = t5.model.device
    count = launched().count if launched().count > 1 else workers
    if half is None:
        half = half_precision(device) or launched().precision == "bf16"
    modules: dict[str, nn.Module] = {"model": t5.model, "auxiliary": auxiliary}

    if loaders is None:
        loaders = usual_loaders(device)
    if workers > 1:  # they share the cores already, and cannot have processes of their own
        loaders = 0
    steps = None if schedule.minutes else schedule.steps
    exact = (lambda step: min(step / steps, 1.0)) if steps else None
    sources: dict[int, Source] = {}  # of this process: a forked worker makes its own

    def compute(rank: int, step: int, done: float) -> list[float]:
        if rank not in sources:
            sources[rank] = source(mixture, schedule.shares, first=step, rank=rank, count=count,
                                   loaders=loaders, done=exact)  # fmt: skip
        batch = to_device(sources[rank](step, done), device)
        distil_weight = schedule.distil_weight * (1.0 if done < schedule.first else 0.5)
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            result = batch_loss(t5, auxiliary, batch, teacher, schedule.aux_weight, distil_weight)
        result.loss.backward()
        distance = result.distance if batch.kind == "distil" else float("nan")
        return [KINDS.index(batch.kind), result.answer, result.right, distance,
                int(batch.mask.sum())]  # fmt: skip

    optimizer = make_optimizer(t5, auxiliary, schedule)
    path = folder / "state.safetensors"
    known = {**(settings or {}), "processes": count}
    progress = load_state(path, modules, optimizer, known) if resume else Progress()
    team = make_team(list(modules.values()), compute, workers)
    last_save = last_track = time.monotonic()
    averages: dict[str, float] = {}
    with Path(folder / "log.jsonl" if team.main else os.devnull).open("a", encoding="utf-8") as log:
        while schedule.done(progress) < 1 and progress.step != stop_after:
            start = time.monotonic()
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * schedule.factor(progress, group["warmup"])
            metrics = team.step(progress.step, schedule.done(progress))
            norms = [
                torch.nn.utils.clip_grad_norm_(group["params"], schedule.clip)
                for group in optimizer.param_groups
            ]
            if not all(bool(norm.isfinite()) for norm in norms):  # before a checkpoint is spoilt
                raise Failure(
                    f"the gradient is not finite at step {progress.step}: lower --rate and start "
                    "anew, or go on from the last checkpoint with --resume"
                )
            optimizer.step()
            progress.step += 1
            progress.seconds += team.agree(time.monotonic() - start)
            progress.tokens += int(metrics[:, -1].sum())
            _average(averages, metrics)
            if not team.main:
                continue
            if report is not None:
                report(progress, averages)
            if progress.step % 20 == 0:
                line = {
                    "step": progress.step,
                    "seconds": round(progress.seconds, 1),
                    "tokens": progress.tokens,
                    **{k: round(v, 4) for k, v in averages.items()},
                }
                log.write(json.dumps(line) + "\n")
                log.flush()
            now = time.monotonic()
            if now - last_save > checkpoint_seconds:
                save_state(path, modules, optimizer, progress, known)
                last_save = time.monotonic()
            if track is not None and now - last_track > track_seconds:
                track(progress)
                last_track = time.monotonic()
    if team.main:
        save_state(path, modules, optimizer, progress, known)
    team.close()
    return progress


def _average(averages: dict[str, float], metrics: Tensor) -> None:
    """Running means by kind of batch, in place. metrics: [workers, 5], see `compute`."""
    for kind, *values, _ in metrics.tolist():
        for name, value in zip(("answer", "right", "distance"), values, strict=True):
            if not math.isnan(value):
                key = f"{KINDS[int(kind)]}.{name}"
                averages[key] = 0.95 * averages.get(key, value) + 0.05 * value


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move the batch's tensors."""
    for name, value in vars(batch).items():
        if isinstance(value, torch.Tensor):
            setattr(batch, name, value.to(device))
    return batch
