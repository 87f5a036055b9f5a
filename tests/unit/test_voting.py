"""Backbones' votes on a sentence's opinion, beside the judge's."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from serve.errors import UserError
from trainer.backbone import load_backbone
from trainer.pretraining.start import named_folder
from trainer.pretraining.voting import odds, vote

DEGREES = np.array([[0.5, 0.3, 0.1, 0.1, 0.0], [0.0, 0.1, 0.2, 0.3, 0.4],
                    [0.02, 0.05, 0.9, 0.02, 0.01]], np.float32)  # fmt: skip


def test_only_the_side_is_put_to_the_vote() -> None:
    others = [np.array([-1.0, 3.0, 0.5]), np.array([-30.0, -90.0, 60.0])]
    found = vote(DEGREES, others)
    judged = [math.log(sum(d[3:]) + 1e-4) - math.log(sum(d[:2]) + 1e-4) for d in DEGREES.tolist()]
    loud = np.std(judged)
    for i, degrees in enumerate(DEGREES.tolist()):
        mean = (judged[i] + sum(float(o[i]) * loud / np.std(o) for o in others)) / 3
        share = 1 / (1 + math.exp(-mean))
        opinion = 1 - degrees[2]
        assert found[i, 2] == pytest.approx(degrees[2], abs=1e-6)
        assert found[i, 3:].sum() == pytest.approx(opinion * share, abs=1e-5)
        assert found[i, :2].sum() == pytest.approx(opinion * (1 - share), abs=1e-5)
        # How strong an opinion of a side would be is the judge's word.
        for one, two in ((0, 1), (4, 3)):
            assert (found[i, one] * (degrees[two] + 1e-4)
                    == pytest.approx(found[i, two] * (degrees[one] + 1e-4), abs=1e-6))  # fmt: skip


def test_a_vote_that_says_nothing_leaves_the_judges_sides_but_milder() -> None:
    found = vote(DEGREES, [np.zeros(3)])
    assert (found[:, 3:].sum(1) > found[:, :2].sum(1)).tolist() == [False, True, False]
    assert found.sum(1) == pytest.approx([1, 1, 1], abs=1e-5)


def test_odds_are_those_of_the_template_under_the_backbone() -> None:
    backbone = load_backbone("mini")
    texts = ["A lovely film.", "It broke after a day, and nobody answered my letters.", "A door."]
    found = odds(backbone, texts, 1, half=False)
    assert found == pytest.approx(odds(backbone, texts, 2, half=False), abs=1e-4)
    for text, value in zip(texts, found, strict=True):
        inputs = backbone.tokenizer(f"{text} It was <extra_id_0>.", return_tensors="pt")
        with torch.no_grad():
            scores = backbone.t5.model(
                **inputs, decoder_input_ids=backbone.decoder_ids.view(1, -1)
            ).logits
        good, bad = (backbone.tokenizer.convert_tokens_to_ids(w) for w in ("great", "terrible"))
        assert value == pytest.approx(float(scores[0, -1, good] - scores[0, -1, bad]), abs=2e-3)


def test_mini_is_the_one_that_ships_and_a_path_the_folder_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_backbone(named_folder("mini")).sha256 == load_backbone("mini").sha256
    assert named_folder("./mini") == str(tmp_path / "mini")
    with pytest.raises(UserError, match="config"):  # not the one that ships
        (tmp_path / "mini").mkdir()
        load_backbone(named_folder("./mini"))
