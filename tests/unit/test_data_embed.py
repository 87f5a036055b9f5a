"""Sentence embeddings: order, cache, and where the encoder comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serve.errors import UserError
from trainer import embed as module
from trainer.embed import embed, encoder_source, load_encoder


class Fake:
    """An encoder that tells how often it ran: a text's vector is its length and first letter, of
    length 1 where it is told to normalise."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []

    def encode(self, texts: list[str], *, normalize_embeddings: bool, **_: Any) -> np.ndarray:
        self.batches.append(texts)
        vectors = np.array([[len(text), ord(text[0])] for text in texts], np.float32)
        if normalize_embeddings:
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    monkeypatch.setenv("METAPT_CACHE", str(tmp_path / "cache"))
    encoder = Fake()
    monkeypatch.setattr(module, "load_encoder", lambda source: encoder)
    return encoder


def test_rows_belong_to_their_texts_though_batches_go_by_length(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH", 3)
    texts = [chr(97 + i % 26) * (1 + i * 7 % 19) for i in range(50)]
    found = embed(texts, "some/id", quiet=True)
    want = np.array([[len(text), ord(text[0])] for text in texts])
    np.testing.assert_allclose(found, want / np.hypot(*want.T)[:, None], rtol=1e-6)
    assert found.dtype == np.float32
    lengths = [len(text) for batch in fake.batches for text in batch]
    assert lengths == sorted(lengths, reverse=True)
    assert len(fake.batches) > 1


def test_the_cache_knows_texts_and_encoders_apart(fake: Fake) -> None:
    first = embed(["ab", "c"], "some/id", quiet=True)
    again = embed(["ab", "c"], "some/id", quiet=True)
    np.testing.assert_array_equal(first, again)
    assert len(fake.batches) == 1
    embed(["a", "bc"], "some/id", quiet=True)  # the same letters, cut elsewhere
    embed(["ab", "c"], "other/id", quiet=True)
    embed(["ab", "c"], "some/id", cache=False, quiet=True)
    assert len(fake.batches) == 4


def test_a_damaged_cache_is_made_again(fake: Fake, tmp_path: Path) -> None:
    first = embed(["ab", "c"], "some/id", quiet=True)
    (path,) = (tmp_path / "cache" / "embeddings").iterdir()
    path.write_bytes(path.read_bytes()[:-5])
    np.testing.assert_array_equal(embed(["ab", "c"], "some/id", quiet=True), first)
    assert len(fake.batches) == 2


def test_a_folder_is_known_by_its_files_not_its_path(fake: Fake, tmp_path: Path) -> None:
    made = 0
    for name, file, content, new in (
        ("one", "pytorch_model.bin", b"w", True), ("copy", "pytorch_model.bin", b"w", False),
        ("other", "pytorch_model.bin", b"v", True), ("copy", "1_Pooling/config.json", b"{}", True),
        ("one", "1_Pooling/config.json", b"{}", False), ("one", "README.md", b"what", False),
        ("one", ".cache/downloaded", b"when", False),
    ):  # fmt: skip
        path = tmp_path / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        embed(["text"], str(tmp_path / name), quiet=True)
        made += new
        assert len(fake.batches) == made, (name, file)


def test_the_encoder_comes_from_the_package_a_folder_or_an_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path.parent)
    assert encoder_source(str(tmp_path)) == encoder_source(tmp_path.name) == str(tmp_path)
    assert encoder_source("sentence-transformers/all-mpnet-base-v2").endswith("mpnet-base-v2")
    monkeypatch.setattr(module, "PACKAGE", "a_package_that_is_not_there")
    assert encoder_source(None) == "sentence-transformers/all-MiniLM-L6-v2"
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "__init__.py").write_text("", "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(module, "PACKAGE", "pack")
    assert encoder_source(None) == str(tmp_path / "pack" / "model")


@pytest.mark.parametrize("name", ["./none", "/none/at/all", "a/b/c", "~/none"])
def test_a_path_that_is_no_folder_is_not_asked_of_the_hub(name: str) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        encoder_source(name)


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no config\.json"):
        load_encoder(str(tmp_path))


def test_a_pipe_gets_no_progress_bar(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    embed(["ab", "c"], "some/id")
    assert capsys.readouterr().err == ""
