"""The few samples that a prompt is tuned on and chosen by, drawn by a seed (appendix A.4)."""

from __future__ import annotations

import logging
import math
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from serve.errors import UserError
from trainer.data import Examples

if TYPE_CHECKING:
    from trainer.configs import FinetuneConfig, TuneConfig
    from trainer.tasks import Task

log = logging.getLogger(__name__)

_USUAL = 40  # samples to learn from, and as many to choose by (A.4)
_TRIES = 100  # draws of 40 before a class is called missing


def sample_sizes(rows: int, train: int | None, validation: int | None) -> tuple[int, int]:
    """How many samples to draw from so many rows: what is asked for, else 40 and 40 (A.4), or all
    of fewer rows, three in five of them to learn from."""
    if train is None:
        left = rows - (validation or 0)
        train = min(_USUAL, max(1, left if validation else math.ceil(0.6 * left)))
    return train, validation or min(_USUAL, max(1, rows - train))


def draw(config: TuneConfig | FinetuneConfig, task: Task) -> tuple[Examples, Examples]:
    """The training and validation samples of the seed.

    Both come from the rows for training, but where a file marks rows for validation and others
    for testing: then the former are what validation samples are drawn from.

    Raises:
        UserError: the rows cannot be read, or are too few.
    """
    pool = config.load(task, "train")
    if config.data is not None:
        _warn_of_contradictions(pool)
    own = config.load_validation(task)
    if own is not None:
        train = config.train or min(_USUAL, len(pool))
        chosen = draw_few_shot(pool, config.seed, train, 0, task.classes, config.balanced)
        held = _held_out(config, own)
        log.info(
            "%s: %d of %d rows for training are learned from, %d of %d rows for validation choose "
            "the step", pool.source, train, len(pool), len(held), len(own),
        )  # fmt: skip
        return pool.take(chosen[0]), held
    train, validation = sample_sizes(len(pool), config.train, config.validation)
    if (train, validation) != (config.train or _USUAL, config.validation or _USUAL):
        log.info(
            "%s has %d rows to learn from: %d of them are learned from, %d choose the step "
            "(%d each where there are as many)",
            pool.source or task.name, len(pool), train, validation, _USUAL,
        )  # fmt: skip
    chosen = draw_few_shot(pool, config.seed, train, validation, task.classes, config.balanced)
    return pool.take(chosen[0]), pool.take(chosen[1])


def _warn_of_contradictions(pool: Examples) -> None:
    """Say so where a text is in a file under several labels: a model can learn one of them."""
    seen: dict[str, set[int]] = {}
    for text, label in zip(pool.texts, pool.labels.tolist(), strict=True):
        seen.setdefault(" ".join(text.split()), set()).add(label)
    torn = ((text, labels) for text, labels in seen.items() if len(labels) > 1)
    first = next(torn, None)
    if first is not None:
        text, labels = first
        log.warning(
            "%s has texts under more than one label, such as %r (%s): correct them, or, where the "
            "labels are of different things, name these in the text with --text-column",
            pool.source, text[:60], ", ".join(pool.names[i] for i in sorted(labels)),
        )  # fmt: skip


def _held_out(config: TuneConfig | FinetuneConfig, own: Examples) -> Examples:
    """The validation samples from the rows that a file marks for it.

    Raises:
        UserError: with --balanced, a class that has too few.
    """
    if not config.balanced:
        return own.sample(config.validation or _USUAL, config.seed)
    # As many of each class as the rarest has, or as are asked for.
    count = config.validation or min(_USUAL, len(own.names) * int(own.counts.min()))
    if not count:
        rare = own.names[int(own.counts.argmin())]
        raise UserError(
            f"{own.source} marks no row of class '{rare}' for validation: mark some, or drop "
            "--balanced"
        )
    generator = np.random.Generator(np.random.PCG64(config.seed))
    drawn = _draw_balanced(own.labels, generator, count, 0, own.names, own.source)
    return own.take(drawn[0])


def draw_few_shot(
    examples: Examples,
    seed: int,
    train: int = 40,
    validation: int = 40,
    classes: int | None = None,
    balanced: bool = False,
    *,
    flags: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw the few-shot training and validation samples of a seed (appendix A.4: 40 and 40).

    The paper draws at random; a draw that leaves a class out of the training samples is repeated
    from the same stream of random numbers, so a seed always stands for the same samples.

    Args:
        examples: the pool, N texts.
        seed: the seed of the draw.
        train, validation: the numbers of samples.
        classes: C; None takes the pool's.
        balanced: whether every class gets an equal share (one more or less) instead.
        flags: whether errors may advise the flags --labels and --balanced.

    Returns:
        The indices of the training [train] and the validation [validation] samples, disjoint.

    Raises:
        UserError: a class without a sample, or a pool that is too small; the message names it.
    """
    classes = classes or len(examples.names)
    names = [*examples.names, *(str(i) for i in range(len(examples.names), classes))]
    where = examples.source or "the data"
    need = train + validation
    if validation and len(examples) <= classes:
        raise UserError(
            f"{where} has {len(examples)} rows to learn from, but {classes} classes need one each "
            "and one more to choose by: add rows"
        )
    if len(examples) < need:
        raise UserError(
            f"{where} has {len(examples)} rows to learn from (a fifth of a file without a column "
            f"`split` is kept for testing), but {train} + {validation} are to be drawn: pass "
            f"--train and --validation that add up to {len(examples)} at most"
        )
    counts = np.bincount(examples.labels, minlength=classes)
    if empty := [f"'{names[index]}'" for index in np.flatnonzero(counts == 0)]:
        held = [names[index] for index in np.flatnonzero(counts)]
        tell = flags and len(held) > 1
        drop = f", or leave it out: --labels {shlex.join(held)}" if tell else ""
        raise UserError(
            f"{where} has no sample of class {', '.join(empty)} (of {classes} classes): add "
            f"some{drop}"
        )
    if train < classes:
        raise UserError(f"{train} training samples cannot hold {classes} classes: draw more")
    generator = np.random.Generator(np.random.PCG64(seed))
    if balanced:
        return _draw_balanced(examples.labels, generator, train, validation, names, where)
    for _ in range(_TRIES):
        order = np.argsort(generator.random(len(examples)), kind="stable")
        seen = np.bincount(examples.labels[order[:train]], minlength=classes)
        if (seen > 0).all():
            return order[:train], order[train:need]
    rare = names[int(np.argmin(counts))]
    raise UserError(
        f"none of {_TRIES} draws of {train} samples from {where} held class '{rare}' "
        f"({counts.min()} of {len(examples)} rows): {'pass --balanced, or ' if flags else ''}draw "
        "more samples"
    )


def _draw_balanced(
    labels: np.ndarray,
    generator: np.random.Generator,
    train: int,
    validation: int,
    names: Sequence[str],
    where: str,
) -> tuple[np.ndarray, np.ndarray]:
    classes = len(names)
    order = np.argsort(generator.random(len(labels)), kind="stable")
    parts: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for index in range(classes):
        # The first classes take what does not divide evenly.
        shares = [size // classes + (index < size % classes) for size in (train, validation)]
        members = order[labels[order] == index]
        if len(members) < sum(shares):
            raise UserError(
                f"{where} has {len(members)} samples of class '{names[index]}', but a balanced "
                f"draw needs {sum(shares)}: drop --balanced, or draw fewer"
            )
        parts[0].append(members[: shares[0]])
        parts[1].append(members[shares[0] : sum(shares)])
    mixed = [np.concatenate(part) for part in parts]
    # By class they would come in blocks, and a batch of a block holds one class only.
    first, second = (part[np.argsort(generator.random(len(part)), kind="stable")] for part in mixed)
    return first, second
