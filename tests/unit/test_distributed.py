"""What `--ray` refuses before any work, and where its output appears."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest

from serve.errors import Failure, UserError
from trainer.cluster import ClusterConfig, fit_sample, nearest, run_cluster
from trainer.distributed import cluster, engine
from trainer.distributed.reading import LabelledTexts
from trainer.distributed.shards import Shards, staged
from trainer.label import LabelConfig, run_label
from trainer.remote import size_of
from trainer.reservoir import rank
from trainer.tables import iterate_rows


def test_ray_that_is_not_installed_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with (
        pytest.raises(UserError, match=r'pip install "\.\[ray\]" in the checkout'),
        engine.session("local"),
    ):
        pass


@pytest.fixture
def ports() -> Iterator[tuple[int, int]]:
    """A port where nobody listens, and one where a web server does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # bound and not listening: nobody else can take it
        server = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
        Thread(target=server.serve_forever, daemon=True).start()
        yield free.getsockname()[1], server.server_port
        server.shutdown()


def test_an_address_without_a_cluster_fails_in_time(
    ports: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("grpc", reason="gRPC is not installed (the extra `ray`)")
    pytest.importorskip("ray", reason="Ray is not installed (the extra `ray`)")
    monkeypatch.setattr("serve.raylink._PATIENCE", 1.0)
    for port in ports:
        for form in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}"):
            with (
                pytest.raises(Failure, match="no Ray cluster answers at") as error,
                engine.session(form),
            ):
                pass
            assert form in str(error.value)
    for form in ("here", "host:", ":6379", "http://host:6379/x"):
        with (
            pytest.raises(UserError, match="pass local, auto, HOST:PORT"),
            engine.session(form),
        ):
            pass


def test_a_folder_of_other_files_is_not_replaced_by_shards(tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("mine")
    with pytest.raises(UserError, match=r"other files.*another --out"):
        run_cluster(ClusterConfig(data=str(tmp_path), out=str(tmp_path), ray="local"))
    assert (tmp_path / "texts.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "lda"}, "--method lda runs on one machine"),
        ({"limit": 5}, "--limit is for one machine"),
        ({"out": "x.parquet"}, "--ray writes a folder of shards"),
    ],
)
def test_what_a_cluster_does_not_do_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_cluster(ClusterConfig(**{"data": "d.csv", "out": "o", "ray": "local", **change}))


def test_a_limit_needs_the_order_of_one_machine() -> None:
    with pytest.raises(UserError, match="--limit reads from the start"):
        run_label(LabelConfig(corpus=["c.txt"], out="o.parquet", ray="local", limit=3))


@pytest.mark.parametrize("address", ["memory://bucket/out", None])
def test_shards_appear_whole_or_not_at_all(tmp_path: Path, address: str | None) -> None:
    fsspec = pytest.importorskip("fsspec")
    out = address or str(tmp_path / "out")
    system = fsspec.core.url_to_fs(out)[0]
    table = arrow.table({"text": ["a", "b", "c"], "label": [0, 1, 1], "cluster": [0, 2, 2]})

    def fill(place: object) -> Shards:
        shards = Shards.under(place, "raw")  # type: ignore[arg-type]
        shards.place.system.makedirs(shards.place.path)
        with shards.place.system.open(f"{shards.place.path}/x.parquet", "wb") as file:
            parquet.write_table(table, file)
        return shards

    with pytest.raises(KeyboardInterrupt), staged(out) as place:
        fill(place)
        raise KeyboardInterrupt
    assert not system.exists(out)
    with staged(out) as place:
        shards = fill(place)
        assert shards.count(3, 2).tolist() == [[1, 0], [0, 0], [0, 2]]
        shards.move_to(place, np.arange(3), None)
    assert [name.rsplit("/", 1)[-1] for name in system.find(out)] == ["part-00000.parquet"]
    if address:
        with pytest.raises(UserError, match="exists already"), staged(out):
            pass
        system.rm("/bucket", recursive=True)


def test_a_store_that_fails_between_two_files_keeps_none(monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec = pytest.importorskip("fsspec")
    system = fsspec.filesystem("memory")
    moved: list[str] = []

    def move(self: object, one: str, two: str) -> None:
        if moved:
            raise OSError("the store is gone")
        moved.append(two)
        system.copy(one, two)
        system.rm(one)

    monkeypatch.setattr(type(system), "mv", move)
    with pytest.raises(OSError, match="gone"), staged("memory://store/out") as place:
        for name in ("a.parquet", "b.parquet", "_run.json"):
            system.pipe(f"{place.path}/{name}", b"x")
    assert moved and not system.find("/store")


def test_a_workers_own_words_are_told_and_not_rays_advice() -> None:
    ours = "Traceback:\n  File x\nserve.errors.UserError: a row: label '5' is wrong: correct it\n"
    assert engine.root_message(ValueError(ours + "To change retry attempts, see the docs.")) == (
        "a row: label '5' is wrong: correct it"
    )
    assert engine.root_message(ValueError("Traceback:\nOSError: disk full")) == "OSError: disk full"


def test_labels_are_called_as_one_machine_calls_them(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    values = ["true", "false", "3", '" Good "', "2.0"]
    path.write_text("".join(f'{{"text": "t", "label": {value}}}\n' for value in values))
    read = LabelledTexts("text", "label")(path)
    assert [label for _, label in read] == ["true", "false", "3", "Good", "2"]


def test_a_folder_at_an_address_has_the_rows_of_one_on_disk(tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    system = fsspec.filesystem("memory")
    for name in ("b-1.5/x", "b-1.5/old/x", "b-1.5/a"):
        path = tmp_path / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(arrow.table({"text": [name]}), path)
        system.pipe(f"/rows/{name}.parquet", path.read_bytes())
    (tmp_path / "b-1.5" / "_SUCCESS").touch()
    system.touch("/rows/b-1.5/_SUCCESS")
    try:
        for folder in (tmp_path / "b-1.5", "memory://rows/b-1.5", "memory://rows/b-1.5/"):
            texts = [row["text"] for _, row in iterate_rows(folder, ["text"])]
            assert texts == ["b-1.5/a", "b-1.5/x"]
        with pytest.raises(UserError, match=r"memory://rows/none.csv does not exist"):
            list(iterate_rows("memory://rows/none.csv", ["text"]))
        with pytest.raises(UserError, match=r"memory://rows/none.parquet does not exist"):
            list(iterate_rows("memory://rows/none.parquet", ["text"]))
        with pytest.raises(UserError) as error:
            list(iterate_rows("memory://rows/none.csv", ["text"], flag="--exclude"))
        assert "--data" not in str(error.value)
        with pytest.raises(UserError, match=r"memory://rows/none.csv does not exist"):
            size_of("memory://rows/none.csv")
    finally:
        system.rm("/rows", recursive=True)


def test_a_folder_of_shards_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    for name in ("b", "a"):
        parquet.write_table(arrow.table({"text": [name, name * 2]}), tmp_path / f"{name}.parquet")
    (tmp_path / "_run.json").write_text("{}")
    found = [(place, row["text"]) for place, row in iterate_rows(tmp_path, ["text"])]
    assert found[1:3] == [("a.parquet, row 2", "aa"), ("b.parquet, row 1", "b")]


def test_the_sample_that_centres_are_found_on_depends_on_the_texts_alone() -> None:
    texts = [f"text {i}" for i in range(500)]
    chosen = {texts[i] for i in fit_sample(texts, 60, 7)}
    assert len(chosen) == 60
    assert {texts[::-1][i] for i in fit_sample(texts[::-1], 60, 7)} == chosen
    assert {texts[i] for i in fit_sample(texts, 60, 8)} != chosen
    assert fit_sample(texts, 500, 7).tolist() == list(range(500))


def test_ranks_are_one_to_one_and_follow_the_seed() -> None:
    ranks = [rank(mark, 1) for mark in range(2000)]
    assert len(set(ranks)) == 2000
    assert abs(np.mean(ranks) / 2**64 - 0.5) < 0.03
    assert ranks != [rank(mark, 2) for mark in range(2000)]


def test_the_nearest_centre_is_that_of_the_least_distance() -> None:
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(50, 4)).astype(np.float32)
    centres = generator.normal(size=(6, 4))
    distances = ((vectors[:, None] - centres[None]) ** 2).sum(-1)
    np.testing.assert_array_equal(nearest(vectors, centres), distances.argmin(1))


@pytest.mark.parametrize(("indices", "codes"), [(True, [0, 1]), (False, None)])
def test_indices_of_files_that_name_their_classes_stay_indices(
    monkeypatch: pytest.MonkeyPatch, indices: bool, codes: list[int] | None
) -> None:
    monkeypatch.setattr(cluster.Embed, "__init__", lambda self, shared: None)
    monkeypatch.setattr(cluster.Assign, "vectors", lambda self, texts: np.eye(len(texts)))
    actor = cluster.Assign(["encoder"], np.eye(2), ["true", "false"], indices)
    batch = {"text": np.array(["a", "b"]), "label": np.array([0, 1]), "bad": np.array(["", ""])}
    if codes is None:
        with pytest.raises(UserError, match="label 0 is not one of true, false: correct the row"):
            actor(batch)
    else:
        found = actor(batch)
        assert (found["label"].tolist(), found["cluster"].tolist()) == (codes, [0, 1])
