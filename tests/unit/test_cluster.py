"""`cluster`: the methods, the repair of small clusters, and the command."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest

from serve.cli import Command, run
from serve.errors import UserError
from trainer import cluster
from trainer.cluster import ClusterConfig, assign, nearest, repair, run_cluster
from trainer.data import Examples


def examples_of(texts: list[str], classes: int = 2) -> Examples:
    labels = np.arange(len(texts)) % classes
    return Examples(texts, labels, tuple(f"c{i}" for i in range(classes)), "t.csv")


def groups(clusters: np.ndarray) -> set[frozenset[int]]:
    """The partition itself, whatever the clusters are called."""
    return {frozenset(np.flatnonzero(clusters == c).tolist()) for c in np.unique(clusters)}


def blobs(count: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors around k axes, and the axis of each."""
    generator = np.random.default_rng(0)
    truth = np.arange(count) % k
    vectors = np.eye(k + 3)[truth] + generator.normal(0, 0.05, (count, k + 3))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32), truth


def test_kmeans_finds_groups_that_are_there() -> None:
    vectors, truth = blobs(120, 4)
    found = assign(examples_of(["x"] * 120), "kmeans", 4, 0, vectors)
    assert groups(found) == groups(truth)


def test_the_nearest_centre_is_the_one_at_the_least_distance() -> None:
    """Centres are means, so that some lie much nearer to zero than others."""
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(60, 5)).astype(np.float32)
    centres = generator.normal(size=(7, 5)) * np.linspace(0.1, 2.0, 7)[:, None]
    want = [min(range(7), key=lambda k: np.linalg.norm(v - centres[k])) for v in vectors]
    assert len(set(want)) > 4
    assert nearest(vectors, centres).tolist() == want


def test_large_sets_are_clustered_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_MINIBATCH_ABOVE", 100)
    vectors, truth = blobs(400, 4)
    assert groups(assign(examples_of(["x"] * 400), "kmeans", 4, 0, vectors)) == groups(truth)


def test_lda_finds_topics_by_their_words() -> None:
    generator = np.random.default_rng(0)
    topics = [["soup", "pizza", "waiter", "menu"], ["laptop", "screen", "battery", "keyboard"]]
    truth = np.arange(200) % 2
    texts = [" ".join(generator.choice(topics[t], 6)) for t in truth]
    found = assign(examples_of(texts), "lda", 2, 0)
    assert max((found == truth).mean(), (found != truth).mean()) > 0.95


def test_lda_passes_over_the_words_of_more_than_half_of_the_texts() -> None:
    generator = np.random.default_rng(0)
    topics = [["soup", "pizza", "waiter", "menu"], ["laptop", "screen", "battery", "keyboard"]]
    truth = np.arange(200) % 2
    # Three texts in five, of either topic, say what would otherwise be the clearest topic.
    often = (np.arange(200) // 2 % 5 < 3) * 8
    texts = [
        " ".join([*generator.choice(topics[t], 6), *["service"] * count])
        for t, count in zip(truth, often, strict=True)
    ]
    found = assign(examples_of(texts), "lda", 2, 0)
    assert max((found == truth).mean(), (found != truth).mean()) > 0.95


def test_lda_without_words_says_so() -> None:
    with pytest.raises(UserError, match="--method lda: the texts have no words"):
        assign(examples_of(["the", "of", "and"]), "lda", 2, 0)


def test_random_clusters_are_of_one_size_and_follow_the_seed() -> None:
    examples = examples_of(["x"] * 103)
    found = assign(examples, "random", 10, 5)
    assert sorted(np.bincount(found).tolist()) == [10] * 7 + [11] * 3
    np.testing.assert_array_equal(found, assign(examples, "random", 10, 5))
    assert (found != assign(examples, "random", 10, 6)).any()


def test_label_clusters_are_the_classes() -> None:
    examples = examples_of(["x"] * 9, classes=3)
    np.testing.assert_array_equal(assign(examples, "label", 10, 0), examples.labels)


@pytest.mark.parametrize("method", ["kmeans", "lda", "random"])
def test_more_clusters_than_texts_are_refused(method: str) -> None:
    with pytest.raises(UserError, match="--k 10 clusters cannot be made of 4 texts"):
        assign(examples_of(["a"] * 4), method, 10, 0, np.eye(4, dtype=np.float32))


def test_more_clusters_than_different_texts_are_refused() -> None:
    vectors = np.eye(3, dtype=np.float32)[np.arange(30) % 3]
    with pytest.raises(UserError, match="cannot be made of 3 different texts"):
        assign(examples_of(["a"] * 30), "kmeans", 4, 0, vectors)


def test_a_small_cluster_joins_the_nearest_one() -> None:
    clusters = np.array([0] * 8 + [1] * 9 + [2] * 3)
    vectors = np.array([[0.0, 1.0]] * 8 + [[1.0, 0.0]] * 9 + [[0.1, 0.9]] * 3, np.float32)
    found, notes = repair(clusters, 8, "merge", vectors)
    assert found.tolist() == [0] * 8 + [1] * 9 + [0] * 3
    assert notes == ["cluster 2 has 3 texts, but a task needs 8: joined to cluster 0"]


def test_without_vectors_it_joins_the_largest() -> None:
    found, _ = repair(np.array([0] * 2 + [1] * 9 + [2] * 8), 8, "merge")
    assert found.tolist() == [0] * 2 + [0] * 9 + [1] * 8  # renumbered without a gap


def test_small_clusters_can_be_dropped() -> None:
    found, notes = repair(np.array([0] * 8 + [1] * 3 + [5] * 8), 8, "drop")
    assert found.tolist() == [0] * 8 + [-1] * 3 + [1] * 8
    assert notes == ["cluster 1 has 3 texts, but a task needs 8: left out"]


def test_large_enough_clusters_are_left_alone() -> None:
    clusters = np.arange(32) % 4
    found, notes = repair(clusters, 8, "merge")
    np.testing.assert_array_equal(found, clusters)
    assert notes == []


def test_one_cluster_is_not_enough() -> None:
    with pytest.raises(UserError, match="1 of 2 clusters have the 8 texts"):
        repair(np.array([0] * 9 + [1] * 7), 8, "merge")


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A labelled file of 120 texts, whose stand-in embeddings form four groups."""
    vectors, truth = blobs(120, 4)
    by_text = {f"text {i} about {truth[i]}": vectors[i] for i in range(120)}
    monkeypatch.setattr(
        cluster, "embed", lambda texts, encoder, **_: np.stack([by_text[t] for t in texts])
    )
    path = tmp_path / "in.csv"
    rows = [f"{text},{('neg', 'pos')[i // 4 % 2]}" for i, text in enumerate(by_text)]
    path.write_text("text,label\n" + "\n".join(rows) + "\n", "utf-8")
    return path


def test_the_command_writes_texts_with_their_clusters(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "out.parquet"
    run_cluster(ClusterConfig(data=str(data), out=str(out), k=4))
    table = parquet.read_table(out).to_pydict()
    assert list(table) == ["text", "label", "cluster"]
    assert len(table["text"]) == 120
    topics: dict[int, set[str]] = {}
    for text, number in zip(table["text"], table["cluster"], strict=True):
        topics.setdefault(number, set()).add(text[-1])
    assert sorted(map(sorted, topics.values())) == [["0"], ["1"], ["2"], ["3"]]
    assert table["label"] == [i // 4 % 2 for i in range(120)]
    printed = capsys.readouterr().out
    assert "4 clusters by kmeans" in printed
    assert re.search(r"^ +0 +30 +1[0-9] +1[0-9]$", printed, re.MULTILINE)
    record = json.loads((tmp_path / "new" / "out.run.json").read_text("utf-8"))
    assert (record["sizes"], record["labels"]) == ([30] * 4, ["neg", "pos"])
    assert record["config"]["k"] == 4


def test_a_limit_draws_by_seed(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.parquet"
    config = ClusterConfig(data=str(data), out=str(out), method="random", k=2, limit=40)
    run_cluster(config)
    first = parquet.read_table(out).to_pydict()
    run_cluster(config)
    assert parquet.read_table(out).to_pydict() == first
    assert len(set(first["text"])) == 40


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--k", "1"], "--k must be at least 2"),
        (["--k", "500"], "--k 500 clusters cannot be made of 120 texts"),
        (["--k", "100"], "[01] of 100 clusters have the 9 texts"),
        (["--method", "dbscan"], "--method takes one of kmeans, lda, random, label"),
        (["--out", "x.csv"], "must end in .parquet"),
        (["--text-column", "body"], "has no column 'body': it has text, label"),
        (["--data", "none.parquet"], "none.parquet does not exist"),
    ],
)
def test_bad_flags_end_in_one_line_and_code_2(
    data: Path, tmp_path: Path, change: list[str], message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "o.parquet"
    flags = ["cluster", "--data", str(data), "--out", str(out), *change]
    code = run("trainer", "", {"cluster": Command(ClusterConfig, run_cluster)}, flags)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert (code, len(lines)) == (2, 1)
    assert re.search(message, lines[0])
    assert not out.exists()
