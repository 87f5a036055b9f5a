"""Source texts of MetaPT and PPT: where they come from, and how a run groups them."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from serve.errors import Failure, UserError
from serve.files import atomic_write, read_json, sha256, write_json
from trainer.cluster import assign, repair
from trainer.data import Examples, load_task
from trainer.embed import DEFAULT_ID, embed, encoder_digest, encoder_source
from trainer.label import LabelConfig, run_label
from trainer.reproduce.config import ReproduceConfig
from trainer.reproduce.limits import TaskFacts
from trainer.reproduce.plan import tasks_of
from trainer.source import SourceData, read_source, source_words
from trainer.tables import iterate_rows
from trainer.tasks import PAPER_TASKS, format_columns, get_task

log = logging.getLogger(__name__)
SOURCE_FLAGS = {"text": "--source", "yelp": "--source-y"}

_CLASSES = (
    "a source has 2, 3 or 5 classes that are numbered from the lowest to the highest, or named as "
    "negative, neutral, positive are: label {path} so"
)
_SEED = 1  # of subsets and groupings: one source for all runs of a table
_LEAST = 90  # rows a cluster must have: a tenth is held out, and must hold 4 + 4 for an episode


def source_files(
    config: ReproduceConfig, names: list[str], *, build: bool = True
) -> dict[str, Path]:
    """The source files by name; those that are not given stand in OUT/sources.

    Args:
        build: make what is not there yet; without it that is left out.

    Raises:
        UserError: neither --source nor --text says where the texts are; a file in OUT/sources was
            made with other flags; or what `label` raises.
    """
    files: dict[str, Path] = {}
    given = {"text": config.source, "yelp": config.source_y}
    for name in names:
        if given[name] is not None:
            files[name] = Path(str(given[name]))
            continue
        if name == "text" and not config.text:
            raise UserError(
                "--source is missing: pass a labelled source file (`label` writes one), or open "
                "text to annotate with --text"
            )
        path = Path(config.out) / "sources" / f"{name}.parquet"
        if path.is_file():
            _check_made(config, name, path)
        elif build:
            _build(config, name, path)
        else:
            continue
        files[name] = path
    return files


def _request(config: ReproduceConfig, name: str) -> dict[str, Any]:
    """The flags that a built source depends on, and the tasks whose texts must not be in it."""
    return {
        "text": config.text if name == "text" else [],
        "data_dir": config.data_dir,
        "tasks": list(dict.fromkeys([*tasks_of(config), *PAPER_TASKS])),
    }


def _request_path(path: Path) -> Path:
    return path.with_suffix(".request.json")


def _check_made(config: ReproduceConfig, name: str, path: Path) -> None:
    """Raises: UserError when a built source is not of these flags: it is hours of work, and stays
    where it is."""
    asked, record = _request(config, name), _request_path(path)
    made = read_json(record) if record.is_file() else {}
    other = [key for key in ("text", "data_dir") if made.get(key) != asked[key]]
    if set(asked["tasks"]) - set(made.get("tasks", ())):
        other.append("tasks")
    if other:
        flags = ", ".join("--" + key.replace("_", "-") for key in other)
        raise UserError(
            f"{path} was made with {f'another {flags}' if made else 'flags that are not known'}: "
            f"pass another --out, remove that file to have it made again, or take it as it is with "
            f"{SOURCE_FLAGS[name]} {path}"
        )


def _build(config: ReproduceConfig, name: str, path: Path) -> None:
    # Before the source: one that is there then has its record, whenever the command is stopped.
    write_json(_request_path(path), _request(config, name))
    common: dict[str, Any] = {
        "data_dir": config.data_dir,
        "exclude": _downstream_files(config, name, path.with_name("excluded")),
    }
    if name == "yelp":
        log.info("writing %s: Yelp-5 with its own labels, for MetaPT(Y)", path)
        run_label(LabelConfig(out=str(path), labelled=True, **common))
        return
    log.info("writing %s: open text, annotated by a classifier of Yelp-5", path)
    run_label(LabelConfig(out=str(path), corpus=config.text, **common))


def _downstream_files(config: ReproduceConfig, name: str, folder: Path) -> list[str]:
    """A file for each set whose texts must not be in a source; what cannot be had is named."""
    files = []
    for task in _request(config, name)["tasks"]:
        # The source of MetaPT(Y) is Yelp-5 itself, so of that set only what is measured on is out.
        split = "test" if (name, task) == ("yelp", "yelp5") else None
        try:
            texts = downstream_texts(task, split, config.data_dir)
        except (UserError, Failure) as error:
            log.warning("the texts of %s are not excluded from the source: %s", task, error)
            continue
        path = folder / f"{task}-{split or 'all'}.jsonl"
        with atomic_write(path) as temporary, temporary.open("w") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
        files.append(str(path))
    return files


def downstream_texts(task: str, split: str | None, data_dir: str | None) -> list[str]:
    """The texts of a set, each once: as the model reads them, and without an aspect or a title.

    Args:
        split: as for `load_task`, None for all rows.

    Raises:
        UserError, Failure: the set cannot be had.
    """

    def bare(text_format: str) -> str:
        return "{" + format_columns(text_format)[-1] + "}"

    whole = get_task(task)
    hub = whole.hub and replace(whole.hub, text_format=bare(whole.hub.text_format))
    alone = replace(whole, text_format=bare(whole.text_format), hub=hub)
    texts: dict[str, None] = {}
    for form in [whole] if alone == whole else [whole, alone]:
        texts |= dict.fromkeys(load_task(form, split, data_dir=data_dir, advice="").texts)
    return list(texts)


def describe_source(path: Path, flag: str = "--source") -> dict[str, Any]:
    """Digest, number of rows, and whether a `cluster` column is there.

    Args:
        flag: the flag that named it, for errors.

    Raises:
        UserError: see `read_source`; classes that the label words do not fit, which would be found
            only when the first start is trained.
    """
    rows = iterate_rows(path, ["text", "label"], keep_all=True, flag=flag)
    clustered = any("cluster" in row for _, row in itertools.islice(rows, 1))
    data = read_source(str(path), clustered=False, flag=flag)
    source_words((), data, _CLASSES.format(path=path))
    return {"sha": sha256(path)[:16], "rows": len(data.texts), "clustered": clustered}


def describe_task(task: str, data_dir: str | None) -> TaskFacts:
    """Sixteen hex digits of a task's training and test rows, and how many these are."""
    digest = hashlib.sha256()
    rows = []
    for split in ("train", "test"):
        examples = load_task(task, split, data_dir=data_dir, advice="")
        rows.append(len(examples))
        digest.update("\0".join(examples.texts).encode("utf-8", "surrogatepass"))
        digest.update(np.ascontiguousarray(examples.labels, dtype="<i8").tobytes())
    return TaskFacts(digest.hexdigest()[:16], *rows)


def encoder_mark(encoder: str | None) -> str:
    """What a sentence encoder is known by: a hub id, or sixteen hex digits of a folder's files,
    whose path says nothing. The default is the same model wherever it comes from.

    Raises:
        UserError: see `encoder_source`.
    """
    if encoder is None:
        return DEFAULT_ID
    source = encoder_source(encoder)
    return encoder_digest(source)[:16] if Path(source).is_dir() else encoder


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
        examples = Examples(texts, labels, data.names, path)
        clusters = assign(examples, grouping, settings["clusters"], _SEED, vectors)
        # Few texts in many clusters: half of an even share must do, or all would be joined.
        least = min(_LEAST, len(texts) // (2 * len(np.unique(clusters))))
        clusters, notes = repair(clusters, max(8, least), "merge", vectors)
        for note in notes:
            log.info("%s", note)
    return replace(data, texts=texts, labels=labels, clusters=clusters)
