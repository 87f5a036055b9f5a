"""Source data: its classes, what they are called, and the label words that they get."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest

from serve.errors import Failure, UserError
from trainer.cluster import ClusterConfig, run_cluster
from trainer.labels import (
    Classes,
    Match,
    class_metadata,
    class_names,
    class_order,
    match_classes,
    scale_order,
)
from trainer.source import (
    MetaConfig,
    PretrainConfig,
    SourceData,
    hold_out,
    in_order,
    read_source,
    run_meta,
    run_pretrain,
    source_words,
)


def source(tmp_path: Path, labels: list[str], header: str = "text,label") -> Path:
    path = tmp_path / "source.csv"
    rows = "".join(f"text {i},{label}\n" for i, label in enumerate(labels))
    path.write_text(header + "\n" + rows, "utf-8")
    return path


def clustered(tmp_path: Path, rows: list[tuple[object, int]]) -> Path:
    """A source of texts with the given labels and clusters."""
    path = tmp_path / "s.csv"
    lines = [f"text {i},{label},{cluster}" for i, (label, cluster) in enumerate(rows)]
    path.write_text("text,label,cluster\n" + "\n".join(lines) + "\n", "utf-8")
    return path


def words_of(data: SourceData, *words: str) -> list[str]:
    return source_words(words, data)


@pytest.mark.parametrize(
    ("labels", "codes", "names"),
    [
        (["positive", "negative", "Positive"], [1, 0, 1], ("negative", "positive")),
        (["1.0", "0.0", "1.0"], [1, 0, 1], ("0", "1")),
        (["1", "5", "3", "2", "4"], [0, 4, 2, 1, 3], ("1", "2", "3", "4", "5")),
        (["2", "0", "2"], [2, 0, 2], ("0", "1", "2")),
    ],
)
def test_labels_of_a_source_are_read_as_those_of_a_task(
    tmp_path: Path, labels: list[str], codes: list[int], names: tuple[str, ...]
) -> None:
    data = read_source(str(source(tmp_path, labels)), clustered=False)
    assert (data.labels.tolist(), data.names, data.classes) == (codes, names, len(names))
    assert data.clusters.tolist() == [0] * len(labels)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["good", "good"], "holds texts of class 'good' only: label it with at least two classes"),
        (["1", "1"], "holds texts of class '1' only"),
        (["0", "-1"], r"line 3: label '-1' is no class index: .*; label the texts again$"),
        (
            ["good", ""],
            "line 3: the label is empty: fill it in, or remove the row",
        ),
    ],
)
def test_a_source_that_cannot_be_trained_on_is_refused(
    tmp_path: Path, labels: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        read_source(str(source(tmp_path, labels)), clustered=False)


@pytest.mark.parametrize("text", [None, 5, " "])
def test_a_source_row_without_a_text_is_named(tmp_path: Path, text: object) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"text": "fine", "label": "good"}, {"text": text, "label": "bad"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    with pytest.raises(UserError, match=rf"line 2: 'text' is {text!r}, no text: correct or"):
        read_source(str(path), clustered=False)


def test_a_source_that_is_not_clustered_says_what_to_run(tmp_path: Path) -> None:
    path = source(tmp_path, ["0", "1"])
    message = (
        "no column 'cluster': it has text, label; run `python -m trainer cluster --data "
        rf"{path}` first, and pass what it writes$"
    )
    with pytest.raises(UserError, match=message):
        read_source(str(path), clustered=True)
    path = source(tmp_path, ["0,2", "1,first"], "text,label,cluster")
    with pytest.raises(UserError, match="line 3: the cluster is no whole number: run `python"):
        read_source(str(path), clustered=True)


def cluster(tmp_path: Path, path: Path) -> Path:
    out = tmp_path / "out" / "clusters.parquet"
    run_cluster(ClusterConfig(data=str(path), out=str(out), method="random", k=2))
    return out


def test_the_names_of_classes_go_along_with_the_clusters(tmp_path: Path) -> None:
    out = cluster(tmp_path, source(tmp_path, ["satisfied", "unsatisfied"] * 20))
    out.with_suffix(".run.json").unlink()  # the file is enough
    data = read_source(str(out), clustered=True)
    assert data.names == ("satisfied", "unsatisfied")
    assert data.labels.tolist() == [0, 1] * 20
    assert sorted(set(data.clusters.tolist())) == [0, 1]
    message = (
        "called satisfied, unsatisfied, which is no scale that the label words bad, good fit: "
        r".*, in that order, with --words"
    )
    with pytest.raises(UserError, match=message):
        words_of(data)
    for run, config in ((run_meta, MetaConfig), (run_pretrain, PretrainConfig)):
        with pytest.raises(UserError, match=message):
            run(config(data=str(out), out=str(tmp_path / "prompt"), backbone="none"))
    assert words_of(data, "good", "bad") == ["good", "bad"]


def test_what_label_wrote_is_named_by_its_record(tmp_path: Path) -> None:
    path = tmp_path / "labelled.parquet"
    texts = [f"text {i}" for i in range(40)]
    parquet.write_table(arrow.table({"text": texts, "label": [0, 1] * 20}), path)
    record = {"command": "label", "labels": ["calm", "angry"]}
    path.with_suffix(".run.json").write_text(json.dumps(record), "utf-8")
    data = read_source(str(cluster(tmp_path, path)), clustered=True)
    assert (data.names, data.labels.tolist()) == (("calm", "angry"), [0, 1] * 20)
    record["command"] = "export"
    path.with_suffix(".run.json").write_text(json.dumps(record), "utf-8")
    assert class_names(path) is None


def test_indices_of_a_file_that_names_its_classes_stay_indices(tmp_path: Path) -> None:
    path = tmp_path / "labelled.parquet"
    table = arrow.table({"text": [f"text {i}" for i in range(40)], "label": [0, 1] * 20})
    parquet.write_table(table.replace_schema_metadata(class_metadata(["true", "false"])), path)
    data = read_source(str(cluster(tmp_path, path)), clustered=True)
    assert (data.names, data.labels.tolist()) == (("true", "false"), [0, 1] * 20)


def test_a_folder_of_shards_is_named_by_its_record(tmp_path: Path) -> None:
    table = arrow.table({"text": ["a", "b"], "label": [1, 0], "cluster": [0, 1]})
    parquet.write_table(table, tmp_path / "part-00000.parquet")
    assert read_source(str(tmp_path), clustered=True).names == ("0", "1")
    record = {"command": "cluster", "labels": ["no", "yes"]}
    (tmp_path / "_run.json").write_text(json.dumps(record), "utf-8")
    assert read_source(str(tmp_path), clustered=True).names == ("no", "yes")


def test_a_folder_without_a_record_is_named_by_its_files_if_they_agree(tmp_path: Path) -> None:
    table = arrow.table({"text": ["a", "b"], "label": [1, 0], "cluster": [0, 1]})
    (tmp_path / "within").mkdir()
    for name, classes in (("b", ["no", "yes"]), ("a", ["no", "yes"]), ("within/c", ["x", "y"])):
        named = table.replace_schema_metadata(class_metadata(classes))
        parquet.write_table(named, tmp_path / f"{name}.parquet")
    (tmp_path / "_run.json").write_text(json.dumps({"command": "export", "labels": ["x", "y"]}))
    assert class_names(tmp_path) == ["no", "yes"]
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1")  # said by who reads its rows
    assert class_names(tmp_path) == ["no", "yes"]
    (tmp_path / "damaged.parquet").unlink()
    for other, said in ((class_metadata(["yes", "no"]), "yes, no"), (None, "nothing")):
        parquet.write_table(table.replace_schema_metadata(other), tmp_path / "b.parquet")
        with pytest.raises(UserError, match=rf"b.parquet calls its classes {said}, but .* no, yes"):
            read_source(str(tmp_path), clustered=True)
    (tmp_path / "_run.json").write_text("{")
    with pytest.raises(Failure, match=r"_run.json is not valid JSON .* damaged"):
        class_names(tmp_path)


@pytest.mark.parametrize("indices", [[0, 1, 2], [1, 2, 1], [2, 0, 2]])
def test_an_index_is_no_name_where_the_names_are_numbers(
    tmp_path: Path, indices: list[int]
) -> None:
    # Taken for names, the ratings "1" and "2" would take the index 1 for themselves.
    path = tmp_path / "rated.parquet"
    table = arrow.table({"text": ["a", "b", "c"], "label": indices})
    parquet.write_table(table.replace_schema_metadata(class_metadata(["1", "2", "3"])), path)
    data = read_source(str(path), clustered=False)
    assert (data.labels.tolist(), data.names) == (indices, ("1", "2", "3"))
    assert words_of(data) == ["bad", "okay", "good"]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("negative", "positive"), ["bad", "good"]),
        (("Negative", "Neutral", "Positive"), ["bad", "okay", "good"]),
        (("1 star", "2 stars", "3 stars", "4 stars", "5 stars"),
         ["terrible", "bad", "okay", "good", "great"]),
        (("1", "2", "3"), ["bad", "okay", "good"]),
        (("0", "1"), ["bad", "good"]),
        ((), ["bad", "good"]),
        (("positive", "negative"), None),  # the lowest class first, or "positive" would be bad
        (("no", "yes"), None),
    ],
)  # fmt: skip
def test_default_words_need_a_scale(names: tuple[str, ...], words: list[str] | None) -> None:
    labels = np.arange(len(names) or 2)
    data = SourceData([], labels, labels, len(labels), names)
    if words is None:
        with pytest.raises(UserError, match="--words"):
            words_of(data)
    else:
        assert words_of(data) == words


def test_classes_are_matched_by_names_or_by_their_scales() -> None:
    """Three classes in a cycle: the wrong direction would be another order."""
    names = match_classes(Classes(["b", " C", "a"]), Classes(["a", "B", "c"]))
    assert names == Match([1, 2, 0], by_name=True)
    stars = Classes(["neutral", "positive", "negative"])
    own = Classes(["x", "y", "z"], ["bad", "okay", "good"])
    assert match_classes(stars, own) == Match([1, 2, 0], by_name=False)
    assert match_classes(own, stars) == Match([2, 0, 1], by_name=False)
    for other in (["0", "1"], ["tea", "milk"]):
        assert match_classes(Classes(other), Classes(["ham", "spam"])) is None
        assert match_classes(Classes(["ham", "spam"]), Classes(other, ["bad", "good"])) is None
    assert match_classes(Classes(["bad", "good"]), Classes(["bad", "okay", "good"])) is None


def test_a_scale_orders_its_names() -> None:
    assert scale_order(["Good", "bad"]) == [1, 0]
    assert scale_order(["positive", "negative", "neutral"]) == [2, 0, 1]
    assert scale_order(["1", "2"]) == scale_order(["0", "1"]) == [0, 1]
    assert scale_order(["1", "0"]) is None
    assert scale_order(["satisfied", "unsatisfied"]) is None


@pytest.mark.parametrize(
    ("labels", "words", "order"),
    [
        (["positive", "negative"], ["yes", "no"], [1, 0]),
        (["satisfied", "unsatisfied"], ["good", "bad"], [1, 0]),
        (["0", "1"], ["good", "bad"], [1, 0]),
        (["0", "1"], ["ham", "spam"], [0, 1]),
        (["ham", "spam"], ["ham", "spam"], None),
    ],
)
def test_classes_are_ordered_by_names_then_words_then_numbers(
    labels: list[str], words: list[str], order: list[int] | None
) -> None:
    assert class_order(labels, words) == order


@pytest.mark.parametrize("share", [0.05, 0.2])
def test_every_cluster_gives_its_share_to_validation_and_no_row_twice(share: float) -> None:
    clusters = np.repeat([3, 0, 7], [60, 25, 2])
    np.random.default_rng(0).shuffle(clusters)
    data = SourceData([""] * 87, np.zeros(87, np.int64), clusters, 2)
    train, held = hold_out(data, share, seed=4)
    assert sorted([*train.tolist(), *held.tolist()]) == list(range(87))
    for cluster, size in ((3, 60), (0, 25), (7, 2)):
        assert (clusters[held] == cluster).sum() == max(1, round(share * size))
    again, other = hold_out(data, share, seed=4), hold_out(data, share, seed=5)
    assert np.array_equal(held, again[1]) and not np.array_equal(np.sort(held), np.sort(other[1]))


def test_a_source_too_small_for_validation_says_what_to_change(
    tiny_t5: Path, tmp_path: Path
) -> None:
    path = clustered(tmp_path, [(i % 2, i % 3) for i in range(30)])
    flags = {"data": str(path), "out": str(tmp_path / "o"), "backbone": str(tiny_t5), "steps": 1,
             "prompt_tokens": 2, "words": ["bad", "good"]}  # fmt: skip
    with pytest.raises(UserError, match=r"no cluster keeps 8 rows for validation: .* larger --val"):
        run_meta(MetaConfig(**flags, validation_share=0.1))
    with pytest.raises(UserError, match=r"has fewer than the 8 rows that a task draws: lower --s"):
        run_meta(MetaConfig(**flags, validation_share=0.8))


def test_a_start_is_not_trained_with_a_template_that_names_a_column(
    tiny_t5: Path, tmp_path: Path
) -> None:
    path = clustered(tmp_path, [(i % 2, i % 2) for i in range(200)])
    flags = {"data": str(path), "out": str(tmp_path / "o"), "backbone": str(tiny_t5), "steps": 1,
             "prompt_tokens": 2, "words": ["bad", "good"],
             "template": "{aspect}: {text} <extra_id_0>"}  # fmt: skip
    for run in (
        lambda: run_meta(MetaConfig(**flags)),
        lambda: run_pretrain(PretrainConfig(**flags)),
    ):
        with pytest.raises(UserError, match=r"no place for \{aspect\}"):
            run()
    assert not (tmp_path / "o").exists()


def test_words_go_to_the_classes_that_are_named(
    tiny_t5: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As for `tune`: `--labels` says whose each word is; without it the file's order is told."""
    caplog.set_level("INFO")
    names = ("refund", "delivery", "other")
    path = clustered(tmp_path, [(names[i % 3], i % 2) for i in range(300)])
    data = read_source(str(path), clustered=True)
    assert data.names == ("delivery", "other", "refund")
    ordered = in_order(data, ["Refund", "delivery", "other"])
    assert ordered.labels.tolist() == [i % 3 for i in range(300)]
    assert ordered.texts == data.texts and ordered.names == ("Refund", "delivery", "other")

    flags = {"data": str(path), "backbone": str(tiny_t5), "steps": 1, "prompt_tokens": 2,
             "words": ["bad", "film", "good"], "batch": 4}  # fmt: skip
    told = "label words: bad for 'delivery', film for 'other', good for 'refund'"
    run_pretrain(PretrainConfig(**flags, out=str(tmp_path / "found")))
    assert told in caplog.text
    caplog.clear()
    run_pretrain(PretrainConfig(**flags, out=str(tmp_path / "named"), labels=list(names)))
    assert "label words" not in caplog.text
    figures = [
        json.loads((tmp_path / out / "task.json").read_text())["figures"]["validation_loss"]
        for out in ("found", "named")
    ]
    assert figures[0] != figures[1]  # the words stand for other classes
    for wrong in (["refund", "delivery"], ["refund", "delivery", "late"], ["refund"] * 3):
        with pytest.raises(UserError, match=r"the classes of --data are called delivery, other, r"):
            run_pretrain(PretrainConfig(**flags, out=str(tmp_path / "no"), labels=wrong))
