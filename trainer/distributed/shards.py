"""Parquet shards under a folder or an address: written whole, counted, renumbered."""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from serve.errors import UserError
from serve.files import atomic_folder
from trainer.remote import file_system, is_url, reached
from trainer.runs import record

logger = logging.getLogger(__name__)

RECORD = "_run.json"  # readers of a folder of Parquet files pass over a leading underscore
_SHARD_ROWS = 100_000  # of a file at least, where blocks are smaller


@dataclass(frozen=True)
class Place:
    """A folder: an fsspec file system and the path in it."""

    system: Any
    path: str

    @property
    def arrow(self) -> Any:
        """The file system as Arrow, and so Ray, takes it."""
        from pyarrow.fs import FSSpecHandler, PyFileSystem

        return PyFileSystem(FSSpecHandler(self.system))


@contextmanager
def staged(out: str) -> Iterator[Place]:
    """A place to fill, which becomes `out` when the block ends well and vanishes otherwise.

    A local folder is renamed. An object store cannot rename: its files are copied one by one,
    `_run.json` last, so a folder that has one is whole.

    Raises:
        UserError: `out` is a file, or an address where something is already.
    """
    if not is_url(out):
        with atomic_folder(Path(out).absolute()) as folder:
            yield Place(file_system(str(folder), "--out")[0], str(folder))
        return
    system, path = new_address(out)
    staging = Place(system, f"{path.rstrip('/')}.{secrets.token_hex(4)}.partial")
    system.makedirs(staging.path, exist_ok=True)
    try:
        yield staging
        names = sorted(files_under(staging), key=lambda name: name.endswith(RECORD))
        system.makedirs(path, exist_ok=True)
        try:
            for name in names:
                system.mv(name, f"{path}/{name.rsplit('/', 1)[-1]}")
        except BaseException:
            remove_all(Place(system, path))  # a part of the rows would be read as the whole
            raise
    finally:
        remove_all(staging)


def new_address(out: str) -> tuple[Any, str]:
    """The file system behind an address at which there is nothing yet, and the path within it.

    Raises:
        UserError: something is there, or the store cannot be asked.
    """
    system, path = file_system(out, "--out")
    with reached(out, "--out"):
        if system.exists(path):
            raise UserError(f"--out {out} exists already: remove it, or pass another --out")
    return system, path


def files_under(place: Place) -> list[str]:
    """The paths of a folder's files, sorted; other machines may have written them since the last
    listing, which the file system would repeat."""
    place.system.invalidate_cache()
    return sorted(place.system.find(place.path))


def remove_all(place: Place) -> None:
    """Remove a folder. An object store has none: the name is gone with the last file in it."""
    place.system.invalidate_cache()
    if place.system.exists(place.path):
        place.system.rm(place.path, recursive=True)


def write_run(place: Place, config: Any, **more: Any) -> None:
    """The record of a run, beside its shards."""
    text = json.dumps(record("cluster", config, **more), indent=2, ensure_ascii=False) + "\n"
    with place.system.open(f"{place.path}/{RECORD}", "wb") as file:
        file.write(text.encode())


@dataclass(frozen=True)
class Shards:
    """Parquet files of columns text, label and cluster."""

    place: Place

    @classmethod
    def under(cls, place: Place, name: str) -> Shards:
        """Those in a folder of a place."""
        return cls(Place(place.system, f"{place.path}/{name}"))

    def write(self, dataset: Any) -> None:
        """Write a Ray dataset; a task that is done again replaces what it wrote before."""
        dataset.write_parquet(
            self.place.path, filesystem=self.place.arrow, min_rows_per_file=_SHARD_ROWS,
            compression="zstd",
        )  # fmt: skip

    def count(self, clusters: int, classes: int) -> np.ndarray:
        """[K, C], the texts of each cluster and class."""
        import pyarrow.dataset as dataset

        table = np.zeros((clusters, classes), np.int64)
        if not files_under(self.place):
            return table
        shards = dataset.dataset(self.place.path, filesystem=self.place.arrow, format="parquet")
        for batch in shards.to_batches(columns=["label", "cluster"]):
            np.add.at(table, (batch["cluster"].to_numpy(), batch["label"].to_numpy()), 1)
        return table

    def move_to(self, target: Place, targets: np.ndarray, ray: Any) -> None:
        """Move the shards up to `target`, numbered by `targets` [K]; -1 leaves a cluster out."""
        shards = self
        if (targets != np.arange(len(targets))).any():
            renumbered = Shards.under(target, "renumbered")

            def renumber(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
                found = targets[batch["cluster"]]
                kept = {name: values[found >= 0] for name, values in batch.items()}
                return {**kept, "cluster": found[found >= 0].astype(np.int32)}

            written = ray.data.read_parquet(self.place.path, filesystem=self.place.arrow)
            renumbered.write(written.map_batches(renumber))
            remove_all(self.place)
            shards = renumbered
        for number, name in enumerate(files_under(shards.place)):
            target.system.mv(name, f"{target.path}/part-{number:05d}.parquet")
        remove_all(shards.place)
