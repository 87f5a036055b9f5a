"""The packaged encoder, against mean pooling written out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from trainer.embed import embed, encoder_source


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
