"""`cluster --ray`: K-means centres from a sample, then every text to the nearest of them.

The texts are read twice: once to count them, collect the class names and draw the sample, and once
to embed and assign them, shard by shard. What the driver holds is the sample.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

import numpy as np
import pyarrow as arrow
from tqdm.auto import tqdm

from serve.errors import Failure, UserError
from trainer.cluster import (
    LABEL_ADVICE,
    ClusterConfig,
    check_k,
    cluster_means,
    fit_centres,
    least_size,
    nearest,
    plan,
    report,
    text_mark,
)
from trainer.corpus import BadFiles, find_files
from trainer.distributed.engine import ACTOR_CPUS, cpus, data_settings, root_message, session
from trainer.distributed.reading import LabelledTexts, read_files
from trainer.distributed.shards import RECORD, Shards, new_address, staged, write_run
from trainer.embed import encoder_source, load_encoder
from trainer.labels import class_codes, class_names, find_labels, names_inside
from trainer.onnx_encoder import choose_encoder
from trainer.options import result_folder
from trainer.remote import Source, is_url
from trainer.reservoir import rank
from trainer.tables import TABLES, kind_of, shards_of

logger = logging.getLogger(__name__)

_BATCH = 1024  # texts embedded at a time, sorted by length within
_PICKED = arrow.schema(
    [("rank", arrow.uint64()), ("place", arrow.int64()), ("text", arrow.string()),
     ("counts", arrow.string())]
)  # fmt: skip


class Pick:
    """An actor: labelled texts in; those that may be in the sample, and counts, out.

    Like `trainer.distributed.label.Annotate` it sends less and less; different texts are counted
    for that, so a block that is worked on twice changes nothing.
    """

    def __init__(self, fit: int, seed: int):
        self.fit, self.seed = fit, seed
        self.lowest = np.empty(0, np.uint64)

    def __call__(self, batch: arrow.Table) -> arrow.Table:
        bad = [message for message in batch["bad"].to_pylist() if message]
        rows = batch.filter(arrow.compute.equal(batch["bad"], ""))
        met: dict[str, int] = {}
        for label, place in zip(rows["label"].to_pylist(), rows["place"].to_pylist(), strict=True):
            met[label] = min(place, met.get(label, place))
        counts = {"rows": len(rows), "labels": met, "bad": bad}
        ranks = np.array(
            [rank(text_mark(text), self.seed) for text in rows["text"].to_pylist()], np.uint64
        )
        keep = np.ones(len(rows), bool)
        if len(self.lowest) == self.fit:
            keep = ranks <= self.lowest[-1]
        self.lowest = np.union1d(self.lowest, ranks[keep])[: self.fit]
        chosen = rows.filter(arrow.array(keep))
        return arrow.table(
            {
                "rank": [*ranks[keep].tolist(), None],
                "place": [*chosen["place"].to_pylist(), None],
                "text": [*chosen["text"].to_pylist(), None],
                "counts": [None] * len(chosen) + [json.dumps(counts)],
            },
            schema=_PICKED,
        )


class Embed:
    """An actor: texts in, their unit vectors [B, D] beside them out.

    Args:
        shared: a list of one reference to what `choose_encoder` chose.
    """

    def __init__(self, shared: Any):
        import ray

        self.model = ray.get(shared[0])
        if isinstance(self.model, str):
            import torch

            torch.set_num_threads(1)  # an actor has one core; the machine has others
            self.model = load_encoder(self.model)

    def vectors(self, texts: list[str]) -> np.ndarray:
        """[B, D] float32."""
        return self.model.encode(
            texts, batch_size=64, normalize_embeddings=True, show_progress_bar=False
        )

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"place": batch["place"], "vector": self.vectors(batch["text"].tolist())}


class Assign(Embed):
    """An actor: labelled texts in; text, label and cluster out."""

    def __init__(self, shared: Any, centres: np.ndarray, names: list[str], indices: bool):
        super().__init__(shared)
        self.centres, self.names, self.indices = centres, names, indices

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:  # type: ignore[override]
        whole = batch["bad"] == ""  # what is not was reported when the texts were counted
        texts, labels = batch["text"][whole], batch["label"][whole].tolist()
        places = ["a row"] * len(labels)
        codes = class_codes(
            labels, places, self.names, (), indices=self.indices, advice=LABEL_ADVICE
        )
        found = np.empty(0, np.int64)
        if len(texts):
            found = nearest(self.vectors(texts.tolist()), self.centres)
        return {"text": texts, "label": codes.astype(np.int32), "cluster": found.astype(np.int32)}


def run_on_ray(config: ClusterConfig) -> None:
    """`python -m trainer cluster --ray ADDRESS`."""
    assert config.ray is not None
    _check(config)
    files = shards_of(config.data) or [
        name for name in find_files([config.data], "--data") if kind_of(name) in TABLES
    ]
    if not files:
        raise UserError(f"--data {config.data} holds no CSV, TSV, JSONL or Parquet file")
    started = time.monotonic()
    with session(config.ray) as ray, data_settings():
        try:
            table, names = _run(ray, config, files)
        except ray.exceptions.RayError as error:
            raise Failure(f"--ray {config.ray}: a worker failed: {root_message(error)}") from error
    sys.stdout.write(report(table, names, config.method, time.monotonic() - started))
    sys.stdout.write(f"{config.out}: {table.sum()} texts\n")


def _check(config: ClusterConfig) -> None:
    if config.method != "kmeans":
        raise UserError(f"--method {config.method} runs on one machine: leave --ray out")
    if config.limit:
        raise UserError("--limit is for one machine: leave it out, or leave --ray out")
    if config.out.endswith(".parquet"):
        raise UserError(f"--out {config.out}: --ray writes a folder of shards: leave .parquet out")
    if is_url(config.out):
        new_address(config.out)
    else:
        result_folder(config.out, RECORD)


def _run(ray: Any, config: ClusterConfig, files: list[Source]) -> tuple[np.ndarray, list[str]]:
    """Everything between connecting and reporting: counts [K, C] and class names."""
    from ray.data import ActorPoolStrategy

    reader = LabelledTexts(config.text_column, config.label_column)
    pool = ActorPoolStrategy(min_size=1, max_size=cpus(ray))
    actors = {"compute": pool, "num_cpus": ACTOR_CPUS}
    bad = BadFiles(len(files), config.bad_files)
    picked = read_files(ray, files, reader).map_batches(
        Pick, fn_constructor_args=(config.fit, config.seed), batch_format="pyarrow",
        batch_size=8192, **actors,
    )  # fmt: skip
    sample, rows, values = _collect(picked, config.fit, bad)
    if not rows:
        raise UserError(f"--data {config.data} has no rows: pass files with rows")
    check_k(rows, config.k)
    # What `label` calls its classes, or else what the values are.
    called = None
    if config.label_column == "label":
        called = class_names(config.data) or names_inside(files) or None
    names = called or find_labels(
        values, [f"{config.data}, a row"] * len(values), config.label_column, LABEL_ADVICE
    )
    logger.info("%d texts of %d classes in %d files", rows, len(names), len(files))

    encoder = choose_encoder(encoder_source(config.encoder), config.engine, otherwise="onnx")
    # In a list, or Ray would send the whole encoder along with every actor's arguments.
    shared = [ray.put(encoder)]
    vectors = _embed(ray, sample, shared, actors)
    centres = fit_centres(vectors, config.k, config.seed).astype(np.float32)
    means = cluster_means(nearest(vectors, centres), vectors, len(centres))

    with staged(config.out) as place:
        raw = Shards.under(place, "raw")
        assigned = read_files(ray, files, reader).map_batches(
            Assign, fn_constructor_args=(shared, centres, names, called is not None),
            batch_size=_BATCH, **actors,
        )  # fmt: skip
        raw.write(assigned)
        table = raw.count(len(centres), len(names))
        if table.sum() != rows:
            raise Failure(
                f"{rows} texts were counted, but {table.sum()} came when they were to be assigned: "
                "the files changed or could not be read again, or --out is a folder that not all "
                "machines of the cluster share"
            )
        targets, notes = plan(table.sum(1), least_size(config), config.small, means)
        for note in notes:
            logger.warning("%s", note)
        raw.move_to(place, targets, ray)
        final = np.zeros((targets.max() + 1, len(names)), np.int64)
        np.add.at(final, targets[targets >= 0], table[targets >= 0])
        write_run(
            place, config, labels=names, sizes=final.sum(1).tolist(), notes=notes,
            files=len(files), bad_files=bad.found,
        )  # fmt: skip
    return final, names


def _collect(picked: Any, fit: int, bad: BadFiles) -> tuple[arrow.Table, int, list[str]]:
    """The sample in the order of the rows, the number of all rows, and the labels' values."""
    rows, first = 0, dict[str, int]()  # the place where each label's value is met first
    sample = _PICKED.empty_table()
    with tqdm(unit=" texts", unit_scale=True, desc="count", disable=None) as bar:
        for block in picked.iter_batches(batch_size=None, batch_format="pyarrow"):
            for counts in map(json.loads, block["counts"].drop_null().to_pylist()):
                for message in counts["bad"]:
                    bad.add(message)
                rows += counts["rows"]
                for value, place in counts["labels"].items():
                    first[value] = min(place, first.get(value, place))
            sample = arrow.concat_tables([sample, block.filter(block["counts"].is_null())])
            if len(sample) > 2 * fit:
                sample = _lowest(sample, fit)
            bar.update(rows - bar.n)
    return _lowest(sample, fit).sort_by("place"), rows, sorted(first, key=first.__getitem__)


def _lowest(sample: arrow.Table, fit: int) -> arrow.Table:
    return sample.sort_by([("rank", "ascending"), ("place", "ascending")]).slice(0, fit)


def _embed(ray: Any, sample: arrow.Table, shared: Any, actors: dict[str, Any]) -> np.ndarray:
    """[N, D] float32, the vectors of the sample in its order."""
    parts = [sample.slice(start, _BATCH) for start in range(0, len(sample), _BATCH)]
    texts = ray.data.from_arrow([part.select(["place", "text"]) for part in parts])
    found = texts.map_batches(Embed, fn_constructor_args=(shared,), batch_size=_BATCH, **actors)
    places, vectors = [], []
    with tqdm(total=len(sample), unit="text", desc="embed the sample", disable=None) as bar:
        for block in found.iter_batches(batch_size=None, batch_format="numpy"):
            places.append(block["place"])
            vectors.append(block["vector"])
            bar.update(len(block["place"]))
    return np.concatenate(vectors)[np.argsort(np.concatenate(places))].astype(np.float32)
