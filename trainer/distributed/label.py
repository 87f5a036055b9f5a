"""`label --ray`: sentences are cut, annotated and sampled by actors; the driver merges samples."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as arrow
from tqdm.auto import tqdm

from serve.errors import Failure
from trainer.classifier import Measured
from trainer.corpus import BadFiles, Sentence, split_sentences
from trainer.distributed.engine import ACTOR_CPUS, cpus, data_settings, root_message, session
from trainer.distributed.reading import Documents, file_of, read_files
from trainer.label import LabelConfig, check_any, word_bounds
from trainer.remote import Source, name_of
from trainer.reservoir import Reservoir

_COLUMNS = {
    "label": arrow.int32(), "rank": arrow.uint64(), "text": arrow.string(),
    "confidence": arrow.float64(), "source": arrow.string(), "place": arrow.int64(),
    "within": arrow.int32(), "times": arrow.int64(), "counts": arrow.string(),
}  # fmt: skip
_SCHEMA = arrow.schema(list(_COLUMNS.items()))
_BATCH = 2048  # documents; Ray cuts what a block holds into such batches


class Annotate:
    """An actor: documents in, their sample and its counts out.

    It remembers the ranks that a sentence must be below to be kept: after `per_class` sentences of
    a class it sends on only what could still be in the sample, so that what reaches the driver
    grows with the logarithm of the corpus. An actor that starts anew forgets the bounds and sends
    more, never less, so the result does not depend on it.
    """

    def __init__(self, shared: Any, config: LabelConfig, names: list[str]):
        import ray

        self.labeller: Measured
        self.labeller, self.banned = ray.get(shared[0])
        self.config, self.names = config, names
        self.lowest = [np.empty(0, np.uint64)] * self.labeller.classes

    def __call__(self, batch: arrow.Table) -> arrow.Table:
        config = self.config
        part = Reservoir(config.per_class, config.threshold, config.seed, self.labeller.classes)
        for label, ranks in enumerate(self.lowest):
            if len(ranks) == config.per_class:
                part.bounds[label] = int(ranks[-1])
        bad, chunk, places = [], [], []
        for text, place, error in zip(
            *(batch[name].to_pylist() for name in ("text", "place", "bad")), strict=True
        ):
            if error:
                bad.append(error)
                continue
            least, most = word_bounds(config)
            found = [
                sentence
                for sentence in split_sentences(text)
                if least <= sentence.count(" ") + 1 <= most
            ]
            source = self.names[file_of(place)]
            chunk += [Sentence(sentence, source) for sentence in found]
            places += [(place, within) for within in range(len(found))]
        for start in range(0, len(chunk), config.chunk):
            rows = slice(start, start + config.chunk)
            sure = self.labeller.probabilities([sentence.text for sentence in chunk[rows]])
            part.add(chunk[rows], sure, self.banned, places[rows])
        columns, counts = part.part()
        self._remember(columns)
        counts["bad"] = bad
        # Empty samples too: the counts ride in a row of their own.
        table = {name: [*columns[name], None] for name in columns}
        table["rank"] = [*columns["rank"].tolist(), None]
        table["counts"] = [None] * len(columns["label"]) + [json.dumps(counts)]
        return arrow.table(table, schema=_SCHEMA)

    def _remember(self, columns: dict[str, Any]) -> None:
        labels, ranks = np.array(columns["label"], np.int64), columns["rank"]
        for label, lowest in enumerate(self.lowest):
            together = np.union1d(lowest, ranks[labels == label])
            self.lowest[label] = together[: self.config.per_class]


def annotate(
    config: LabelConfig, files: Sequence[Source], labeller: Measured, banned: set[int]
) -> Reservoir:
    """The sample of the corpus, as one machine draws it, made by the cluster `config.ray`.

    Raises:
        UserError, Failure: see `trainer.distributed.engine.session`; no sentence; too many files
            that cannot be read.
    """
    assert config.ray is not None
    reservoir = Reservoir(config.per_class, config.threshold, config.seed, labeller.classes)
    bad = BadFiles(len(files), config.bad_files)
    with session(config.ray) as ray, data_settings():
        from ray.data import ActorPoolStrategy

        # In a list, or Ray would send the whole labeller along with every actor's arguments.
        shared = [ray.put((labeller, banned))]
        dataset = read_files(ray, files, Documents(config.corpus_column, config.units))
        dataset = dataset.map_batches(
            Annotate, fn_constructor_args=(shared, config, [name_of(name) for name in files]),
            batch_size=_BATCH, batch_format="pyarrow", num_cpus=ACTOR_CPUS,
            compute=ActorPoolStrategy(min_size=1, max_size=cpus(ray)),
        )  # fmt: skip
        bar = tqdm(
            unit=" sentences", unit_scale=True, desc=f"label on Ray ({cpus(ray)} CPUs)",
            disable=None,
        )  # fmt: skip
        try:
            with bar:
                for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
                    _take(table, reservoir, bad)
                    bar.update(reservoir.seen - bar.n)
                    bar.set_postfix(sure=int(reservoir.offered.sum()), bad_files=len(bad.found))
        except ray.exceptions.RayError as error:
            raise Failure(f"--ray {config.ray}: a worker failed: {root_message(error)}") from error
    check_any(reservoir, config)
    return reservoir


def _take(table: arrow.Table, reservoir: Reservoir, bad: BadFiles) -> None:
    """Merge a block of parts, each a run of rows that ends in its counts."""
    for counts in table["counts"].drop_null().to_pylist():
        found = json.loads(counts)
        for message in found.pop("bad"):
            bad.add(message)
        reservoir.merge({}, found)
    rows = table.filter(table["counts"].is_null())
    reservoir.merge(rows.drop_columns(["counts"]).to_pydict(), {})
