"""`label`: sentences of an open corpus with pseudo-labels, for meta-training (paper, section 4.1).

A small classifier is trained on a labelled set (Yelp-5 in the paper), annotates the corpus sentence
by sentence, and the sentences that it is sure of are kept, as many of each class. The corpus is
streamed: what is in memory is one chunk, at most `per_class` sentences of each class, and a
histogram of confidences.
"""

from __future__ import annotations

import itertools
import logging
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from serve.cli import as_json, option
from serve.errors import UserError
from serve.files import atomic_write, sha256
from trainer.classifier import KINDS, BundleLabeller, Measured, train_labeller
from trainer.corpus import BadFiles, Sentence, find_files, sentences, split_sentences
from trainer.data import Examples, load_examples, load_task
from trainer.labels import Classes, class_metadata, match_classes
from trainer.onnx_encoder import ENGINES
from trainer.options import MOST_SEED, output_file
from trainer.remote import Source, size_of
from trainer.reservoir import Reservoir
from trainer.runs import data_digest, write_record
from trainer.spelling import fingerprint
from trainer.tables import iterate_rows
from trainer.tasks import get_task

logger = logging.getLogger(__name__)

SHOWN = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # thresholds in the report
_CHECKPOINT_SECONDS = 60.0  # a kill costs at most this much work
_DEFAULT_TASK = "yelp5"


@dataclass(kw_only=True)
class LabelConfig:
    """Annotate open text with pseudo-labels and keep the sentences that are sure (section 4.1).

    The classifier learns from the labelled set's training rows; its accuracy is measured on the
    set's test rows. As many sentences of each class are kept. With --labelled no corpus is
    annotated: the labelled set itself is written, with its own labels (the paper's MetaPT(Y)).
    A run that was killed goes on where it stood when the same command is given again.
    """

    out: str = option(help="the Parquet file to write: text, label, confidence, source")
    corpus: list[str] = option(
        [],
        help="text, CSV, JSONL or Parquet files, folders, globs or addresses (s3://bucket/*.jsonl, "
        "https://...); .gz, .bz2 and .xz as well",
    )
    task: str | None = option(
        None, help=f"the labelled set to learn from (default: {_DEFAULT_TASK}, as in 4.1)"
    )
    data: str | None = option(None, help="a local labelled file to learn from", metavar="FILE")
    data_dir: str | None = option(
        None, help="a folder of files named after the tasks, used in place of the hub",
        metavar="FOLDER",
    )  # fmt: skip
    text_column: str | None = option(None, help="column of the labelled texts")
    label_column: str = option("label", help="column of the labels")
    labels: list[str] = option([], help="names of the classes of --data, in their order")
    labelled: bool = option(False, help="write the labelled set itself; no corpus is read")
    corpus_column: str = option("text", help="text column of CSV, JSONL and Parquet corpora")
    units: str = option(
        "line", choices=("line", "paragraph"),
        help="a line of plain text stands alone, or belongs to a paragraph up to an empty line",
    )  # fmt: skip
    classifier: str = option(
        "tfidf", choices=KINDS,
        help="logistic regression on words and pairs (thousands of sentences a second on a core) "
        "or on sentence embeddings (a hundred or two); or an exported task, see --bundle",
    )  # fmt: skip
    bundle: str | None = option(
        None, metavar="FOLDER",
        help="the bundle whose task annotates, for --classifier bundle: ONNX, no torch; --task or "
        "--data then only measure it",
    )  # fmt: skip
    bundle_task: str | None = option(None, help="which of the bundle's tasks", metavar="NAME")
    encoder: str | None = option(None, help="sentence-transformers id or folder for embedding")
    engine: str = option("auto", choices=ENGINES, help="what runs it: see `cluster`; auto: onnx")
    threshold: float = option(
        0.5, minimum=0, maximum=1,
        help="least probability of the likeliest class; the report shows what others would keep",
    )  # fmt: skip
    per_class: int = option(10_000, help="sentences kept of each class at most", minimum=1)
    balance: bool = option(True, help="keep as many sentences of each class (4.1)")
    min_words: int | None = option(
        None, minimum=1,
        help="shorter sentences, as headings, are left out (default: 4; with --labelled none)",
    )  # fmt: skip
    max_words: int | None = option(
        None, minimum=1,
        help="longer sentences, as lists, are left out (default: 60; with --labelled none)",
    )  # fmt: skip
    exclude: list[str] = option(
        [],
        help="files whose texts and sentences must not get in, as the downstream sets "
        "(compared by letters and digits)",
    )
    exclude_column: str = option("text", help="text column of the --exclude files")
    labelled_rows: int = option(
        20_000, help="labelled rows to learn from at most; 0 for all", minimum=0
    )
    chunk: int = option(4096, help="sentences annotated at a time", minimum=1)
    limit: int = option(0, help="stop after this many sentences; 0 reads all", minimum=0)
    bad_files: float = option(
        0.01, minimum=0, maximum=1,
        help="share of the corpus files that may be unreadable: each is reported and counted, and "
        "the run stops once they are more (with under 100 files, at the first)",
    )  # fmt: skip
    ray: str | None = option(
        None, metavar="ADDRESS",
        help="annotate on a Ray cluster: its address, `auto`, or `local` for this machine's cores",
    )  # fmt: skip
    seed: int = option(
        1, help="chooses which of the sure sentences are kept", minimum=0, maximum=MOST_SEED
    )

    examples = [
        "--corpus 'wiki/*.txt.gz' --data-dir data --exclude data/sst2.parquet --out sure.parquet",
        "--corpus dump.jsonl --corpus-column body --data stars.csv --threshold 0.6 --out s.parquet",
        "--corpus 's3://crawl/part-*.parquet' --ray auto --data-dir data --out sure.parquet",
        "--labelled --task yelp5 --data-dir data --per-class 2000 --out reviews.parquet",
    ]


def run_label(config: LabelConfig) -> None:
    """`python -m trainer label`."""
    _check(config)
    files = find_files(config.corpus) if config.corpus else []
    banned = read_banned(config.exclude, config.exclude_column)
    figures: dict[str, Any] = {}
    if config.labelled:
        rows = _labelled(config, None)
        names = rows.names
        reservoir = Reservoir(config.per_class, 0.0, config.seed, len(names))
        least, most = word_bounds(config)
        kept = [least <= len(text.split()) <= most for text in rows.texts]
        whole = [Sentence(t, rows.source) for t, keep in zip(rows.texts, kept, strict=True) if keep]
        if not whole:
            raise UserError(
                f"{rows.source} has no text of {least} to {most} words: raise --max-words"
            )
        reservoir.add(whole, np.eye(len(names))[rows.labels[kept]], banned)
    else:
        labeller, names, figures, learned = _labeller(config)
        if config.ray is None:
            data = data_digest(learned, names, np.array(sorted(banned), np.uint64))
            reservoir = _annotate(config, files, labeller, banned, data)
        else:
            from trainer.distributed.label import annotate

            reservoir = annotate(config, files, labeller, banned)
        sys.stdout.write(report(reservoir, names))
    _warn_of_rare(reservoir, names, config)
    columns = reservoir.choose(config.balance)
    _write(columns, names, Path(config.out))
    counts = np.bincount(columns["label"], minlength=len(names)).tolist()
    write_record(
        Path(config.out).with_suffix(".run.json"), "label", config, labels=list(names),
        classifier=figures, sentences=reservoir.seen, excluded=reservoir.excluded,
        repeated=reservoir.repeated, confident=reservoir.confident.tolist(), written=counts,
    )  # fmt: skip
    shutil.rmtree(_checkpoint(config), ignore_errors=True)
    shown = ", ".join(f"{name} {count}" for name, count in zip(names, counts, strict=True))
    sys.stdout.write(f"{config.out}: {sum(counts)} sentences ({shown})\n")


def _labeller(
    config: LabelConfig,
) -> tuple[Measured, tuple[str, ...], dict[str, Any], list[str]]:
    """The classifier, its classes, its figures on held-out rows, if there are some, and digests of
    what it was made of."""
    if config.bundle is not None:
        exported = BundleLabeller(config.bundle, config.bundle_task)
        manifest = Path(config.bundle) / "bundle.json"  # which holds the hashes of the other files
        made_of = [sha256(manifest)] if manifest.is_file() else []
        if config.data is None and config.task is None:
            return exported, exported.names, {}, made_of
        test = _in_classes_of(exported, _labelled(config, "test"), config)
        figures = exported.measure(test, config.threshold)
        sys.stdout.write(_describe(figures, config, test.source, exported.classes))
        return exported, exported.names, figures, made_of
    train, test = _labelled(config, "train"), _labelled(config, "test")
    labeller = train_labeller(
        train, config.classifier, encoder=config.encoder, engine=config.engine,
        rows=config.labelled_rows, seed=config.seed, words=word_bounds(config),
    )  # fmt: skip
    figures = labeller.measure(test, config.threshold)
    sys.stdout.write(_describe(figures, config, test.source, len(train.names)))
    return labeller, train.names, figures, [data_digest(train.texts, train.labels)]


def _in_classes_of(exported: BundleLabeller, test: Examples, config: LabelConfig) -> Examples:
    """The rows with the class indices of the bundle's task.

    Raises:
        UserError: they are other classes.
    """
    words = get_task(config.task).words if config.task else ()
    found = match_classes(Classes(test.names, words), Classes(exported.names, exported.words))
    if found is None:
        raise UserError(
            f"--bundle-task {exported.task} has the classes {', '.join(exported.names)}, but "
            f"{test.source} has {', '.join(test.names)}: measure it on its own classes, or say "
            "which these are with --labels, in the order of the file's"
        )
    if not found.by_name:
        logger.warning(
            "the classes of %s are matched with the bundle's by their order: %s",
            test.source, found.said(test.names, exported.names),
        )  # fmt: skip
    labels = np.array(found.order)[test.labels]
    return replace(test, labels=labels, names=exported.names)


def _check(config: LabelConfig) -> None:
    if (config.classifier == "bundle") != (config.bundle is not None):
        raise UserError("--classifier bundle and --bundle FOLDER go together: pass both or neither")
    if config.corpus and config.labelled:
        raise UserError("--labelled reads no --corpus: pass one of the two")
    if not config.corpus and not config.labelled:
        raise UserError("--corpus is missing: pass files to annotate, or --labelled")
    if config.labels and (config.data is None or config.task is not None):
        raise UserError("--labels names the classes of --data: pass --data, and no --task")
    if config.ray is not None and (config.limit or config.labelled):
        flag = "--limit" if config.limit else "--labelled"
        raise UserError(
            f"{flag} reads from the start, in order, as a cluster does not: leave --ray out"
        )
    least, most = word_bounds(config)
    if least > most:
        raise UserError(f"--min-words {least} is above --max-words {most}")
    output_file(config.out, ".parquet")


def word_bounds(config: LabelConfig) -> tuple[int, int]:
    """Words that a sentence of the corpus, or a labelled text, has at least and at most."""
    least, most = (1, sys.maxsize) if config.labelled else (4, 60)
    return config.min_words or least, config.max_words or most


def _labelled(config: LabelConfig, split: str | None) -> Examples:
    """The labelled set's rows; a file without --task brings its own classes."""
    if config.data is not None and config.task is None:
        column = config.text_column or "text"
        return load_examples(config.data, column, config.label_column, config.labels or None, split)
    return load_task(
        config.task or _DEFAULT_TASK, split, data=config.data, data_dir=config.data_dir,
        text_column=config.text_column, label_column=config.label_column,
    )  # fmt: skip


def read_banned(files: Sequence[str], column: str) -> set[int]:
    """Fingerprints of the texts of files, and of each text's sentences."""
    banned: set[int] = set()
    for path in files:
        for _, row in iterate_rows(path, [column], flag="--exclude"):
            if isinstance(row[column], str):
                banned.add(fingerprint(row[column]))
                banned.update(map(fingerprint, split_sentences(row[column])))
    return banned


def _checkpoint(config: LabelConfig) -> Path:
    return Path(config.out).with_suffix(".checkpoint")


def _annotate(
    config: LabelConfig,
    files: Sequence[Source],
    labeller: Measured,
    banned: set[int],
    data: str = "",
) -> Reservoir:
    """Stream the corpus through the classifier into the reservoir, with checkpoints.

    `data` is a digest of what the classifier learned from and of what is banned: sentences that
    another one annotated are no part of this run.
    """
    reservoir = Reservoir(config.per_class, config.threshold, config.seed, labeller.classes)
    sizes = [size_of(path) for path in files]
    run = {"config": as_json(config), "sizes": sizes, "data": data}
    folder = _checkpoint(config)
    if reservoir.restore(folder, run):
        logger.info("going on after %d sentences (%s)", reservoir.seen, folder)
    bad = BadFiles(len(files), config.bad_files)
    with tqdm(total=sum(sizes), unit="B", unit_scale=True, desc="label", disable=None) as bar:
        stream = sentences(
            files, config.corpus_column, config.units, *word_bounds(config), bar.update, bad,
        )  # fmt: skip
        rest = itertools.islice(stream, reservoir.seen, config.limit or None)
        saved = time.monotonic()
        while chunk := list(itertools.islice(rest, config.chunk)):
            reservoir.add(chunk, labeller.probabilities([s.text for s in chunk]), banned)
            bar.set_postfix(sentences=reservoir.seen, sure=int(reservoir.offered.sum()))
            if time.monotonic() - saved > _CHECKPOINT_SECONDS:
                reservoir.save(folder, run)
                saved = time.monotonic()
    check_any(reservoir, config)
    return reservoir


def check_any(reservoir: Reservoir, config: LabelConfig) -> None:
    """UserError if the corpus had no sentence at all."""
    if reservoir.seen == 0:
        least, most = word_bounds(config)
        raise UserError(
            f"--corpus holds no sentence of {least} to {most} words: pass other files, "
            "--min-words or --max-words"
        )


def _describe(figures: dict[str, Any], config: LabelConfig, source: str, classes: int) -> str:
    near = f", within one class {figures['within_one']:.3f}" if classes > 3 else ""
    return (
        f"classifier ({config.classifier}): accuracy {figures['accuracy']:.3f}{near} on "
        f"{figures['rows']} held-out rows of {source}\n"
        f"  of these {figures['confident_share']:.1%} reach --threshold {config.threshold:g}, with "
        f"accuracy {figures['confident_accuracy']:.3f}\n"
    )


def report(reservoir: Reservoir, names: Sequence[str]) -> str:
    """A table: what each threshold would keep of the corpus, in all and by class."""
    width = max(10, *(len(name) for name in names)) + 2
    lines = [
        f"{reservoir.seen} sentences; {reservoir.excluded} excluded and {reservoir.repeated} "
        f"repeats of kept ones left out; sure by class: {reservoir.confident.tolist()}",
        f"{'threshold':>9} {'kept':>7}" + "".join(f"{name:>{width}}" for name in names),
    ]
    for threshold in SHOWN:
        counts = reservoir.above(threshold)
        share = counts.sum() / reservoir.seen
        lines.append(
            f"{threshold:>9.1f} {share:>7.2%}" + "".join(f"{count:>{width}}" for count in counts)
        )
    return "\n".join(lines) + "\n"


def _warn_of_rare(reservoir: Reservoir, names: Sequence[str], config: LabelConfig) -> None:
    sizes = [len(kept) for kept in reservoir.kept]
    rarest = int(np.argmin(sizes))
    advice = "lower --threshold, pass more text, or pass --no-balance"
    if not any(sizes) or (config.balance and not sizes[rarest]):
        raise UserError(
            f"no sentence of class '{names[rarest]}' reached --threshold {config.threshold:g}: "
            f"{advice}"
        )
    if config.balance and sizes[rarest] < min(config.per_class, max(sizes)):
        logger.warning(
            "class '%s' has %d sure sentences, so %d of each class are kept: to keep more, %s",
            names[rarest], sizes[rarest], sizes[rarest], advice,
        )  # fmt: skip


def _write(columns: dict[str, Any], names: Sequence[str], path: Path) -> None:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    table = arrow.table(columns).replace_schema_metadata(class_metadata(names))
    with atomic_write(path) as temporary:
        parquet.write_table(table, temporary, compression="zstd")
