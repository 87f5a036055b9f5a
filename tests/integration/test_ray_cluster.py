"""`cluster --ray` ends with the rows of one machine, whatever happens to its workers."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest

from trainer.cluster import ClusterConfig, run_cluster
from trainer.tables import iterate_rows

ray = pytest.importorskip("ray", reason="Ray is not installed (the extra `ray`)")


class Topics:
    """An encoder of three topics by their words; the second time that it meets "killer" it dies."""

    words = ("soup", "song", "phone", "rare")

    def __init__(self, folder: Path):
        self.folder = folder

    def encode(self, texts: Sequence[str], **_: Any) -> np.ndarray:
        if any("killer" in text for text in texts):
            # First in the sample, then when all texts are assigned, shards being written.
            for name in ("met", "killed"):
                if not (self.folder / name).exists():
                    (self.folder / name).touch()
                    if name == "killed":
                        os.kill(os.getpid(), signal.SIGKILL)
                    break
        vectors = np.array(
            [[word in text for word in self.words] + [len(text) % 7 / 50] for text in texts]
        )
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def load_topics(source: str) -> Topics:
    return Topics(Path(source))


def test_a_cluster_writes_the_rows_of_one_machine_though_a_worker_is_killed(
    cluster: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer.distributed import cluster as on_ray

    folder = tmp_path / "in"
    folder.mkdir()
    topics = ["soup", "song", "phone"]
    for number in range(3):
        texts = [f"about the {topics[i % 3]} of day {number}{'x' * (i % 5)} {i}" for i in range(60)]
        texts[30] = "the soup of a killer"
        texts[40] = f"a rare thing {number}"  # three of them: too few for a task
        labels = [1 - i % 2 for i in range(60)]
        parquet.write_table(
            arrow.table({"text": texts, "label": labels}), folder / f"{number}.parquet"
        )
    # What `label` says beside its shards: neither the order of the alphabet nor that of the rows.
    record = {"command": "label", "labels": ["poor", "fine"]}
    (folder / "_run.json").write_text(json.dumps(record), "utf-8")
    (tmp_path / "encoder").mkdir()
    common: dict[str, Any] = {
        "data": str(folder), "encoder": str(tmp_path / "encoder"), "k": 4, "samples": 2,
        "small": "drop", "fit": 150,
    }  # fmt: skip
    monkeypatch.setattr(
        "trainer.cluster.embed",
        lambda texts, encoder, **_: Topics(tmp_path).encode(
            [t.replace("killer", "k") for t in texts]
        ),
    )
    run_cluster(ClusterConfig(**common, out=str(tmp_path / "one.parquet")))
    monkeypatch.setattr(on_ray, "load_encoder", load_topics)
    for module in (on_ray, __import__(__name__)):
        ray.cloudpickle.register_pickle_by_value(module)
    out = tmp_path / "many"
    run_cluster(ClusterConfig(**common, out=str(out), ray="local"))
    assert (tmp_path / "encoder" / "killed").exists()
    columns = ["text", "label", "cluster"]
    expected, found = (
        sorted(tuple(row[name] for name in columns) for _, row in iterate_rows(path, columns))
        for path in (tmp_path / "one.parquet", out)
    )
    assert len(found) == 177
    assert found == expected
    assert len({cluster for _, _, cluster in found}) == 3
    record = json.loads((out / "_run.json").read_text("utf-8"))
    assert record["labels"] == ["poor", "fine"]
    assert sum(record["sizes"]) == 177
    assert "has 3 texts, but a task needs 5: left out" in record["notes"][0]
    assert sorted(path.suffix for path in out.iterdir())[0] == ".json"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("many")] == ["many"]
