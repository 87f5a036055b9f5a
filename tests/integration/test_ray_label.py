"""`label --ray` ends with what one machine writes, whatever happens to its workers."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest

from serve.errors import Failure, UserError
from trainer.label import LabelConfig, _annotate, run_label
from trainer.remote import Source
from trainer.reservoir import Reservoir

ray = pytest.importorskip("ray", reason="Ray is not installed (the extra `ray`)")
STORE = 80 << 20  # bytes; Ray's own minimum is 75 MiB

POOR, FINE = ["awful", "boring", "nasty"], ["lovely", "great", "tasty"]
THINGS = ["soup", "room", "film", "song", "phone", "book", "staff", "view"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init("local", num_cpus=2, object_store_memory=STORE, include_dashboard=False,
             log_to_driver=False)  # fmt: skip
    yield
    ray.shutdown()


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
    generator = np.random.default_rng(0)
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(7):
        texts = []
        for row in range(300):
            name = (number % 5) * 1000 + row  # two files repeat two others
            word = (POOR + FINE)[(name * 7) % 6]
            texts.append(
                f"The {THINGS[name % 8]} number {name} was {word} today. It was {word} indeed {name}."
            )
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
    generator.shuffle(texts)
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


@pytest.mark.parametrize("kill", [False, True])
def test_a_cluster_draws_the_sample_of_one_machine_though_a_worker_is_killed(
    cluster: None, files: list[Source], tmp_path: Path, kill: bool
) -> None:
    from trainer.distributed.label import annotate
    from trainer.reservoir import fingerprint

    banned = {fingerprint("It was lovely indeed 3003.")}
    alone = _annotate(config_of(tmp_path), files, Marks(), banned)  # type: ignore[arg-type]
    flag = tmp_path / "killed" if kill else None
    ray.cloudpickle.register_pickle_by_value(__import__(__name__))
    together = annotate(config_of(tmp_path, ray="local"), files, Marks(flag), banned)  # type: ignore[arg-type]
    assert alone.seen == 4201
    assert flag is None or flag.exists()
    assert_same(together, alone)
