"""`label --ray` ends with what one machine writes, whatever happens to its workers."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest

from serve.errors import Failure, UserError
from trainer.corpus import find_files
from trainer.label import LabelConfig, _annotate
from trainer.remote import Source
from trainer.reservoir import Reservoir

ray = pytest.importorskip("ray", reason="Ray is not installed (the extra `ray`)")

POOR, FINE = ["awful", "boring", "nasty"], ["lovely", "great", "tasty"]
KINDS = [(number, ("txt", "parquet", "csv")[number % 3]) for number in range(7)]
THINGS = ["soup", "room", "film", "song", "phone", "book", "staff", "view"]


class Marks:
    """A labeller of two classes that reads the answer off the text; at a marker it kills itself.

    Once only: the file `flag` says that it was done.
    """

    kind, classes = "marks", 2

    def __init__(self, flag: Path | None = None):
        self.flag = flag

    def probabilities(self, texts: Sequence[str]) -> np.ndarray:
        if self.flag and any("killer" in text for text in texts) and not self.flag.exists():
            self.flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        sure = np.array([0.5 + (hash_of(text) % 1000) / 2001 for text in texts])
        good = np.array([any(word in text for word in FINE) for text in texts])
        return np.where(good[:, None], np.stack([1 - sure, sure], 1), np.stack([sure, 1 - sure], 1))


def hash_of(text: str) -> int:
    return sum(ord(letter) * (i + 1) for i, letter in enumerate(text))


@pytest.fixture
def files(tmp_path: Path) -> list[Source]:
    """Seven files of three formats, 2,100 documents of two sentences, some of them repeated."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(7):
        texts = []
        for row in range(300):
            name = (number % 5) * 1000 + row  # two files repeat two others
            word = (POOR + FINE)[(name * 7) % 6]
            thing = f"{THINGS[name % 8]} number {name}"
            texts.append(f"The {thing} was {word} today. It was {word} indeed {name}.")
        texts[150] += " This is the killer of a lovely worker." if number == 3 else ""
        path = folder / f"part-{number}"
        if number % 3 == 0:
            path.with_suffix(".txt").write_text("\n".join(texts) + "\n", "utf-8")
        elif number % 3 == 1:
            parquet.write_table(arrow.table({"text": texts}), path.with_suffix(".parquet"))
        else:
            path.with_suffix(".csv").write_text(
                "text\n" + "".join(f'"{text}"\n' for text in texts), "utf-8"
            )
    return sorted(folder.iterdir())


def config_of(tmp_path: Path, **changes: Any) -> LabelConfig:
    common: dict[str, Any] = {
        "out": str(tmp_path / "o.parquet"), "threshold": 0.6, "per_class": 200, "chunk": 64,
    }  # fmt: skip
    return LabelConfig(**{**common, **changes})


def assert_same(found: Reservoir, expected: Reservoir) -> None:
    one, other = found.choose(True), expected.choose(True)
    assert len(one["text"]) == 400
    assert (one["text"], one["source"]) == (other["text"], other["source"])
    np.testing.assert_array_equal(one["label"], other["label"])
    np.testing.assert_array_equal(one["confidence"], other["confidence"])
    for name in ("seen", "excluded", "repeated"):
        assert getattr(found, name) == getattr(expected, name), name
    np.testing.assert_array_equal(found.histogram, expected.histogram)
    np.testing.assert_array_equal(found.confident, expected.confident)


def test_a_cluster_draws_the_sample_of_one_machine_though_a_worker_is_killed(
    cluster: int, files: list[Source], tmp_path: Path
) -> None:
    from trainer.distributed.label import annotate
    from trainer.spelling import fingerprint

    banned = {fingerprint("It was lovely indeed 3003.")}
    alone = _annotate(config_of(tmp_path), files, Marks(), banned)  # type: ignore[arg-type]
    flag = tmp_path / "killed"
    ray.cloudpickle.register_pickle_by_value(__import__(__name__))
    config = config_of(tmp_path, ray="local")
    together = annotate(config, files, Marks(flag), banned)  # type: ignore[arg-type]
    assert alone.seen == 4201
    assert flag.exists()
    assert_same(together, alone)


def test_unreadable_files_are_counted_and_stop_the_run_past_their_share(
    cluster: int, files: list[Source], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from trainer.distributed.label import annotate

    ray.cloudpickle.register_pickle_by_value(__import__(__name__))
    assert isinstance(files[1], Path)
    files[1].write_bytes(files[1].read_bytes()[:500])
    config = config_of(tmp_path, bad_files=0.2)
    alone = _annotate(config, files, Marks(), set())  # type: ignore[arg-type]
    assert alone.seen == 3601
    assert caplog.text.count("part-1.parquet is damaged") == 1
    found = annotate(config_of(tmp_path, bad_files=0.2, ray="local"), files, Marks(), set())  # type: ignore[arg-type]
    assert_same(found, alone)
    assert caplog.text.count("part-1.parquet is damaged") == 2
    with pytest.raises(Failure, match=r"1 of 7 files could not be read, more than --bad-files 0.1"):
        annotate(config_of(tmp_path, bad_files=0.1, ray="local"), files, Marks(), set())  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_file_larger_than_the_object_store_streams_through(cluster: int, tmp_path: Path) -> None:
    from trainer.distributed.label import annotate

    ray.cloudpickle.register_pickle_by_value(__import__(__name__))
    path = tmp_path / "large.txt"
    padding = "Word " * 4000  # a sentence too long to be kept, so that reading is all the work
    with path.open("w") as file:
        for number in range(6000):
            file.write(f"The soup number {number} was lovely. {padding}\n")
    assert path.stat().st_size > 1.4 * cluster
    found = annotate(config_of(tmp_path, ray="local"), [path], Marks(), set())  # type: ignore[arg-type]
    assert found.seen == 6000
    assert len(found.kept[1]) == 200


def test_addresses_are_read_like_files(tmp_path: Path, files: list[Source]) -> None:
    """Over HTTP, one machine: any fsspec address takes the same way."""
    from functools import partial
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
    from threading import Thread

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    pytest.importorskip("aiohttp", reason="fsspec reads HTTP through aiohttp")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path)))
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        base = f"http://127.0.0.1:{server.server_port}/corpus"
        there = find_files([f"{base}/part-{number}.{kind}" for number, kind in KINDS])
        assert len(there) == 7
        found = _annotate(config_of(tmp_path), there, Marks(), set())  # type: ignore[arg-type]
        with pytest.raises(UserError, match=r"--corpus http.*/none.txt does not exist"):
            find_files([f"{base}/none.txt"])
    finally:
        server.shutdown()
    assert_same(found, _annotate(config_of(tmp_path), files, Marks(), set()))  # type: ignore[arg-type]
