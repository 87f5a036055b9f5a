"""Texts that lie in an object store, read and written over its own protocol (S3, by moto)."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest

from serve.errors import Failure, UserError
from trainer.cluster import ClusterConfig, run_cluster
from trainer.corpus import documents, find_files
from trainer.source import read_source
from trainer.tables import iterate_rows

ray = pytest.importorskip("ray", reason="Ray is not installed (the extra `ray`)")
s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed (the extra `store`)")
pytest.importorskip("moto", reason="moto is not installed (the extra `store`)")

SERVER = "import sys; from moto.server import main; main(['-H', '127.0.0.1', '-p', sys.argv[1]])"
WORDS = ["soup", "song", "phone", "rare"]


class Topics:
    """An encoder of topics by their words."""

    def encode(self, texts: Sequence[str], **_: Any) -> np.ndarray:
        vectors = np.array([[word in text for word in WORDS] for text in texts], np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """An S3 server; Ray, which starts after it, hands its address to the workers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {
        "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_MAX_ATTEMPTS": "1",
    }  # fmt: skip
    log = tmp_path_factory.mktemp("moto") / "log"
    with pytest.MonkeyPatch.context() as patch, log.open("w") as out:
        for name, value in settings.items():
            patch.setenv(name, value)
        server = subprocess.Popen([sys.executable, "-c", SERVER, str(port)], stdout=out, stderr=out)
        try:
            deadline = time.monotonic() + 60
            while socket.socket().connect_ex(("127.0.0.1", port)):
                assert server.poll() is None, log.read_text()
                assert time.monotonic() < deadline
                time.sleep(0.1)
            yield s3fs.S3FileSystem()
        finally:
            server.kill()
            server.wait()


def files(system: Any, bucket: str, tmp_path: Path) -> None:
    """Two Parquet files as `label` writes them: 90 texts of three topics, and a few of a fourth."""
    system.mkdir(bucket)
    schema = arrow.schema([("text", arrow.string()), ("label", arrow.int32())],
                          metadata={"class_names": json.dumps(["poor", "fine"])})  # fmt: skip
    for number in range(2):
        texts = [f"about the {WORDS[row % 3]} {number} {row}" for row in range(45)]
        texts[7] = f"a rare thing {number}"
        rows = {"text": texts, "label": [(row // 3) % 2 for row in range(45)]}
        path = tmp_path / f"{number}.parquet"
        parquet.write_table(arrow.table(rows, schema), path)
        system.put(str(path), f"{bucket}/labelled/{number}.parquet")


def rows_of(path: str | Path) -> list[tuple[Any, ...]]:
    columns = ["text", "label", "cluster"]
    return sorted(tuple(row[name] for name in columns) for _, row in iterate_rows(path, columns))


def test_clusters_go_from_a_store_to_a_store(
    store: Any, cluster: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer.distributed import cluster as on_ray

    files(store, "texts", tmp_path)
    (tmp_path / "encoder").mkdir()
    monkeypatch.setattr(on_ray, "load_encoder", lambda _: Topics())
    for module in (on_ray, __import__(__name__)):
        ray.cloudpickle.register_pickle_by_value(module)
    common: dict[str, Any] = {
        "data": "s3://texts/labelled", "encoder": str(tmp_path / "encoder"), "k": 4,
        "samples": 2, "small": "drop", "ray": "local",
    }  # fmt: skip
    run_cluster(ClusterConfig(**common, out="s3://texts/clusters"))
    run_cluster(ClusterConfig(**common, out=str(tmp_path / "here")))

    names = [name.removeprefix("texts/") for name in store.find("texts")]
    assert names == ["clusters/_run.json", *[n for n in names if n.startswith("clusters/part-")],
                     "labelled/0.parquet", "labelled/1.parquet"]  # fmt: skip
    found = rows_of("s3://texts/clusters")
    assert len(found) == 88  # the fourth topic's two are left out
    assert found == rows_of(tmp_path / "here")
    for word in WORDS[:3]:
        assert len({place for text, _, place in found if word in text}) == 1
    assert len({place for _, _, place in found}) == 3
    data = read_source("s3://texts/clusters", clustered=True)
    assert data.names == ("poor", "fine")
    assert sorted(zip(data.texts, data.labels, data.clusters, strict=True)) == found


def test_an_output_that_is_there_is_refused_before_any_work(
    store: Any, cluster: int, tmp_path: Path
) -> None:
    files(store, "taken", tmp_path)
    with pytest.raises(UserError, match="--out s3://taken/labelled exists already"):
        run_cluster(ClusterConfig(data="s3://none/x", out="s3://taken/labelled", ray="local"))
    assert len(store.find("taken")) == 2


def test_a_corpus_is_read_from_a_store(store: Any) -> None:
    store.mkdir("corpus")
    for name, text in {"b.txt": "two\nthree\n", "a.txt": "one\n", "notes.pdf": "none\n"}.items():
        store.pipe(f"corpus/in/{name}", text.encode())
    for pattern in ("s3://corpus/in", "s3://corpus/in/*.txt"):
        there = find_files([pattern])
        assert there == ["s3://corpus/in/a.txt", "s3://corpus/in/b.txt"]
        texts = [text for file in there for text in documents(file, "text")]
        assert texts == ["one\n", "two\n", "three\n"]
    for missing in ("s3://corpus/out", "s3://no-such-bucket/in", "s3://corpus/in/*.csv"):
        with pytest.raises(UserError, match="does not exist, nor matches a file"):
            find_files([missing])


def test_a_store_that_does_not_answer_is_named(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{closed.getsockname()[1]}"
        monkeypatch.setenv("AWS_ENDPOINT_URL", dead)
        s3fs.S3FileSystem.clear_instance_cache()
        try:
            with pytest.raises(Failure, match="--corpus s3://texts/in could not be reached"):
                find_files(["s3://texts/in"])
        finally:
            s3fs.S3FileSystem.clear_instance_cache()
