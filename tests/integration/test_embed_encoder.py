"""The packaged encoder, against mean pooling written out; and compiled, against torch."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from serve.errors import UserError
from trainer import onnx_encoder
from trainer.embed import embed, encoder_source
from trainer.onnx_encoder import choose_encoder, compile_encoder

WITHOUT_TORCH = """
import pickle, sys
import numpy as np
encoder = pickle.load(open(sys.argv[1], "rb"))
np.save(sys.argv[2], encoder.encode(["The soup was cold.", "Yes"]))
assert not {"torch", "transformers", "sentence_transformers"} & set(sys.modules)
"""


def test_embeddings_are_the_mean_of_the_last_states_on_the_unit_sphere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    monkeypatch.setenv("METAPT_CACHE", str(tmp_path))
    texts = ["The soup was cold.", "A dreadful film, and much too long for what it says.", "Yes"]
    found = embed(texts, quiet=True)
    folder = encoder_source(None)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    for text, vector in zip(texts, found, strict=True):
        with torch.no_grad():  # one at a time: no padding to get wrong
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        mean = states.mean(0).numpy()
        np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), atol=1e-5)


def test_a_compiled_encoder_gives_torchs_vectors_without_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("METAPT_CACHE", str(tmp_path / "cache"))
    texts = [
        "The soup was cold.", "Yes", "  ", "Ünïcode – 数字 😀", "A line\nand a second one.",
        "It goes on and on, far past what the encoder reads of a text. " * 60,
        *(" ".join(["word"] * length) for length in range(1, 40)),
    ]  # fmt: skip
    folder = encoder_source(None)
    encoder = compile_encoder(folder)
    found = encoder.encode(texts)
    np.testing.assert_allclose(found, embed(texts, cache=False, quiet=True), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    assert encoder.encode([]).shape[0] == 0

    # The second time it comes out of the cache, and an actor's copy needs no torch. What is damaged
    # there is made again.
    (kept,) = (tmp_path / "cache" / "encoders").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(onnx_encoder, "_compile", lambda source: encoder)
        for name in ("encoder.onnx", "tokenizer.json", "encoder.json"):
            whole = (kept / name).read_bytes()
            (kept / name).write_bytes(whole[: len(whole) // 2])
            compile_encoder(folder)
            assert (kept / name).read_bytes() == whole
    monkeypatch.setattr(onnx_encoder, "_compile", lambda source: pytest.fail("compiled again"))
    (tmp_path / "pickled").write_bytes(pickle.dumps(choose_encoder(folder, "auto", "onnx")))
    script = [sys.executable, "-c", WITHOUT_TORCH, str(tmp_path / "pickled")]
    subprocess.run([*script, str(tmp_path / "vectors.npy")], check=True, timeout=120)
    np.testing.assert_array_equal(np.load(tmp_path / "vectors.npy"), encoder.encode(texts[:2]))


def test_torch_takes_over_where_the_encoder_cannot_be_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("METAPT_CACHE", str(tmp_path / "cache"))
    caplog.set_level("INFO")
    empty = str(tmp_path)
    for engine in ("auto", "torch"):
        assert choose_encoder(empty, engine) == empty  # torch, with nothing asked
    assert not caplog.text
    assert choose_encoder(empty, "auto", "onnx") == empty
    assert "the encoder runs in torch (--encoder" in caplog.text
    with pytest.raises(UserError, match=r"holds no config\.json"):
        choose_encoder(empty, "onnx")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs onnx and onnxscript: pip install"):
        choose_encoder(empty, "onnx")
    assert not (tmp_path / "cache").exists()
