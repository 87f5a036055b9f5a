"""Prompts that ship with a backbone, as starts: their names, their values, the errors."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from serve.errors import Failure, UserError
from trainer.backbone import Backbone, load_backbone
from trainer.initial import initial_params
from trainer.prompt import Prompt, TaskRecord, save_prompt
from trainer.shipped import FILE, load_shipped, shipped_names, shipped_starts


def values(seed: int, tokens: int = 5) -> torch.Tensor:
    return torch.randn(tokens, 32, generator=torch.Generator().manual_seed(seed)).half()


@pytest.fixture
def folder(tmp_path: Path, tiny_t5: Path) -> Path:
    found = tmp_path / "t5"
    shutil.copytree(tiny_t5, found)
    save_file({"polarity: bad good": values(1), "tone: bad okay good": values(2)}, found / FILE)
    return found


@pytest.fixture
def backbone(folder: Path) -> Backbone:
    return load_backbone(str(folder))


@pytest.mark.parametrize(
    "name", ["polarity:bad,good", "polarity: bad good", " polarity : bad, good "]
)
def test_a_start_is_the_files_tensor_under_any_form_of_its_name(
    backbone: Backbone, name: str
) -> None:
    params = initial_params(backbone, f"shipped:{name}", "prefix", 100, 0)
    assert set(params) == {"prompt_embeddings"} and params["prompt_embeddings"].requires_grad
    assert torch.equal(params["prompt_embeddings"].detach(), values(1).float())


def test_mode_deep_starts_from_its_keys_and_values(backbone: Backbone) -> None:
    params = initial_params(backbone, "shipped:tone:bad,okay,good", "deep", 100, 0)
    from trainer.modes import deepen

    expected = deepen(backbone.t5, {"prompt_embeddings": values(2).float()})
    assert set(params) == {"kv", "states"}
    assert torch.allclose(params["kv"], expected["kv"], atol=1e-6)


def test_the_record_can_be_served(backbone: Backbone) -> None:
    task = load_shipped(backbone, "polarity:bad,good", "full").task
    assert (task.labels, task.words) == (["bad", "good"], ["bad", "good"])
    assert (task.mode, task.backbone_sha256) == ("full", backbone.sha256)


def test_an_unknown_name_lists_those_that_there_are(backbone: Backbone, tiny_t5: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"ships no prompt 'stars': there are polarity:bad,good tone:bad,okay,good$",
    ):
        initial_params(backbone, "shipped:stars", "prefix", 4, 0)
    with pytest.raises(UserError, match="it ships none at all"):
        initial_params(load_backbone(str(tiny_t5)), "shipped:stars", "prefix", 4, 0)


def test_a_meta_learned_start_is_found_by_its_folder(folder: Path, backbone: Backbone) -> None:
    assert shipped_starts(folder) == {}
    start = Prompt(
        {"prompt_embeddings": values(4).float()},
        TaskRecord("metapt", ["a", "b"], ["bad", "good"], method="metapt"),
    )
    save_prompt(start, folder / "metapt_start", backbone)
    assert shipped_starts(folder) == {"metapt": folder / "metapt_start"}
    params = initial_params(backbone, "shipped:metapt", "prefix", 4, 0)
    assert torch.equal(params["prompt_embeddings"].detach(), values(4).float())
    with pytest.raises(UserError, match="there are metapt polarity:bad,good"):
        initial_params(backbone, "shipped:ppt", "prefix", 4, 0)


def test_damage_and_a_wrong_width_are_told(folder: Path, backbone: Backbone) -> None:
    save_file({"polarity: bad good": torch.zeros(5, 31)}, folder / FILE)
    with pytest.raises(UserError, match=r"\[5, 31\].* is 32 wide"):
        load_shipped(backbone, "polarity:bad,good")
    (folder / FILE).write_bytes(b"\0" * 40)
    with pytest.raises(Failure, match=r"soft_prompts.safetensors is damaged"):
        shipped_names(folder)


def test_mini_ships_prompts_of_one_length_and_known_words() -> None:
    mini = load_backbone("mini")
    from trainer.readout import word_ids

    names = shipped_names(mini.folder)
    assert len(names) > 10
    for name in names[:: len(names) // 4]:
        prompt = load_shipped(mini, name)
        assert prompt.width == 384 and prompt.tokens == 20
        assert len(word_ids(mini.tokenizer, prompt.task.words)) == len(prompt.task.labels) > 1
