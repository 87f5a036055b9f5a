"""Source texts of MetaPT and PPT: where they come from, and how a run groups them."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

import numpy as np

from serve.errors import UserError
from serve.files import sha256
from trainer.cluster import assign, repair
from trainer.data import Examples, load_task
from trainer.embed import embed
from trainer.label import LabelConfig, run_label
from trainer.reproduce.config import ReproduceConfig
from trainer.source import SourceData, read_source
from trainer.tables import iterate_rows
from trainer.tasks import PAPER_TASKS, get_task

log = logging.getLogger(__name__)

_SEED = 1  # of subsets and groupings: one source for all runs of a table
_LEAST = 90  # rows a cluster must have: a tenth is held out, and must hold 4 + 4 for an episode


def source_files(config: ReproduceConfig, names: list[str]) -> dict[str, Path]:
    """The source files by name, built in OUT/sources where they are not given.

    Raises:
        UserError: neither --source nor --text says where the texts are; or what `label` raises.
    """
    files: dict[str, Path] = {}
    given = {"text": config.source, "yelp": config.source_y}
    for name in names:
        if given[name] is not None:
            files[name] = Path(str(given[name]))
            continue
        path = Path(config.out) / "sources" / f"{name}.parquet"
        if not path.is_file():
            _build(config, name, path)
        files[name] = path
    return files


def _build(config: ReproduceConfig, name: str, path: Path) -> None:
    common: dict[str, Any] = {"data_dir": config.data_dir, "exclude": _downstream_files(config)}
    if name == "yelp":
        log.info("writing %s: Yelp-5 with its own labels, for MetaPT(Y)", path)
        run_label(LabelConfig(out=str(path), labelled=True, **common))
        return
    if not config.text:
        raise UserError(
            "--source is missing: pass a labelled source file (`label` writes one), or open text "
            "to annotate with --text"
        )
    log.info("writing %s: open text, annotated by a classifier of Yelp-5", path)
    run_label(LabelConfig(out=str(path), corpus=config.text, **common))


def _downstream_files(config: ReproduceConfig) -> list[str]:
    """Files of --data-dir whose texts must not be in a source: the paper's downstream sets."""
    if config.data_dir is None:
        return []
    stems = {stem for task in PAPER_TASKS for stem in get_task(task).files}
    kinds = (".parquet", ".jsonl", ".csv")
    files = sorted(Path(config.data_dir).iterdir())
    return [str(path) for path in files if path.stem in stems and path.suffix in kinds]


def describe_source(path: Path) -> dict[str, Any]:
    """Digest, number of rows, and whether a `cluster` column is there.

    Raises:
        UserError: see `read_source`.
    """
    clustered, rows = False, 0
    for _, row in iterate_rows(path, ["text", "label"], keep_all=True, flag="--source"):
        clustered = "cluster" in row
        rows += 1
    return {"sha": sha256(path)[:16], "rows": rows, "clustered": clustered}


def task_digest(task: str, data_dir: str | None) -> str:
    """Sixteen hex digits of a task's training and test rows."""
    digest = hashlib.sha256()
    for split in ("train", "test"):
        examples = load_task(task, split, data_dir=data_dir)
        digest.update("\0".join(examples.texts).encode("utf-8", "surrogatepass"))
        digest.update(np.ascontiguousarray(examples.labels, dtype="<i8").tobytes())
    return digest.hexdigest()[:16]


def balanced_rows(labels: np.ndarray, count: int, seed: int = _SEED) -> np.ndarray:
    """Row numbers of a subset with as many rows of each class as can be, in their old order.

    Args:
        labels: int [N]; count: rows wanted, 0 or at least N for all.
    """
    if count == 0 or count >= len(labels):
        return np.arange(len(labels))
    order = np.random.default_rng(seed).permutation(len(labels))
    turn = np.zeros(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        where = np.flatnonzero(labels[order] == label)
        turn[where] = np.arange(len(where))
    return np.sort(order[np.argsort(turn, kind="stable")[:count]])


def embeddings(path: str, encoder: str | None) -> np.ndarray:
    """[N, D] unit vectors of all rows of a source, from the cache where they are in it."""
    return embed(read_source(path, clustered=False).texts, encoder, quiet=True)


def load_source(path: str, settings: dict[str, Any], encoder: str | None) -> SourceData:
    """The rows that a start trains on, grouped as its settings say.

    Args:
        settings: rows (0 all), grouping (given, kmeans, lda, random, label, or none for PPT) and
            clusters.
    """
    grouping = settings["grouping"]
    data = read_source(path, clustered=grouping == "given")
    rows = balanced_rows(data.labels, settings["rows"])
    texts, labels = [data.texts[i] for i in rows], data.labels[rows]
    clusters = data.clusters[rows]
    if grouping not in ("given", "none"):
        # Embeddings are those of the whole file, so that subsets find them in the cache.
        vectors = embeddings(path, encoder)[rows] if grouping == "kmeans" else None
        names = tuple(str(i) for i in range(data.classes))
        examples = Examples(texts, labels, names, path)
        clusters = assign(examples, grouping, settings["clusters"], _SEED, vectors)
        # Few texts in many clusters: half of an even share must do, or all would be joined.
        least = min(_LEAST, len(texts) // (2 * len(np.unique(clusters))))
        clusters, notes = repair(clusters, max(8, least), "merge", vectors)
        for note in notes:
            log.info("%s", note)
    return SourceData(texts, labels, clusters, data.classes)
