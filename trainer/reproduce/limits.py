"""What the files hold, and what cannot be drawn of it: told before the first run, not in each."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from serve.errors import UserError
from trainer.reproduce.config import ReproduceConfig

log = logging.getLogger(__name__)

SAMPLES = tuple(10 * 2**i for i in range(9))  # figure 2: 10 ... 2,560


@dataclass(frozen=True)
class TaskFacts:
    """A downstream set.

    Attributes:
        digest: of its rows; pool: rows that samples are drawn from; test: rows to test on.
    """

    digest: str
    pool: int
    test: int


@dataclass(frozen=True)
class Facts:
    """What the files say: hashes that go into the settings.

    Attributes:
        backbone: see `trainer.backbone.backbone_mark`; data: by task.
        sources: by name ("text", "yelp"): digest, rows, and whether it is clustered already.
        encoder: what the sentence encoder is known by.
    """

    backbone: str
    data: dict[str, TaskFacts]
    sources: dict[str, dict[str, Any]]
    encoder: str


def source_rows(config: ReproduceConfig, facts: Facts) -> int:
    """The rows of the source that may be used, at most."""
    have = facts.sources["text"]["rows"]
    return min(have, config.source_rows or have)


def drawn(config: ReproduceConfig, method: str, samples: int) -> int:
    """The rows that a run draws from a task's pool: SetFit takes none to choose by, and the
    template alone none at all."""
    if method == "words":
        return 0
    return samples if method == "setfit" else samples + config.validation


def check_clusters(config: ReproduceConfig, facts: Facts, source: dict[str, Any]) -> None:
    """Raises: UserError where a source has fewer rows than clusters are to be made of it."""
    if source["grouping"] not in ("kmeans", "lda", "random"):
        return
    rows = source["rows"] or next(
        known["rows"] for known in facts.sources.values() if known["sha"] == source["sha"]
    )
    if source["sha"] and source["clusters"] > rows:
        flag = "--sizes" if config.what == "figure3b" else "--clusters"
        raise UserError(
            f"{flag} {source['clusters']}: so many clusters cannot be made of {rows} texts"
        )


def check_samples(config: ReproduceConfig, facts: Facts, methods: Sequence[str]) -> None:
    """Tell which points of figure 2 a task has too few rows for.

    Raises:
        UserError: a table whose samples cannot be drawn, or a figure without any point.
    """
    several = config.what == "figure2"
    sizes = (config.sizes or SAMPLES) if several else [config.train]
    for task, known in facts.data.items():
        out = [n for n in sizes if any(drawn(config, m, n) > known.pool for m in methods)]
        if not out:
            continue
        none = all(drawn(config, method, min(sizes)) > known.pool for method in methods)
        if none or not several:
            raise UserError(
                f"task '{task}' has {known.pool} rows to draw samples from, too few for "
                f"{'--sizes' if several else '--train'} {' '.join(map(str, out))} and --validation "
                f"{config.validation}: ask for fewer"
            )
        log.warning(
            "task '%s' has %d rows to draw samples from, %d of them to choose by: %s at %s",
            task, known.pool, config.validation,
            "no point but SetFit's" if "setfit" in methods else "no point",
            ", ".join(map(str, out)),
        )  # fmt: skip
