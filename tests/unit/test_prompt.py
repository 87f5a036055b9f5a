"""The prompt folder: PEFT reads ours, we read PEFT's and Google's, damage is named."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from serve.errors import Failure, UserError
from trainer.backbone import Backbone, load_backbone
from trainer.initial import initial_params
from trainer.modes import add_group
from trainer.prompt import Prompt, TaskRecord, check_fits, load_prompt, save_prompt
from trainer.readout import class_scores, collate, compile_template, encode_texts, word_ids

TEMPLATE = "{text} It was <extra_id_0>."


@pytest.fixture(scope="module")
def backbone(tiny_t5: Path) -> Backbone:
    return load_backbone(str(tiny_t5))


@pytest.fixture
def prompt() -> Prompt:
    torch.manual_seed(0)
    task = TaskRecord("films", ["no", "yes"], ["bad", "good"], TEMPLATE, mode="full")
    return Prompt({"prompt_embeddings": torch.randn(6, 32)}, task)


def our_scores(backbone: Backbone, prompt: Prompt, texts: list[str]) -> torch.Tensor:
    tokenizer = backbone.tokenizer
    batch = collate(encode_texts(tokenizer, compile_template(tokenizer, TEMPLATE), texts, 64))
    words = torch.tensor(word_ids(tokenizer, prompt.task.words))
    params = add_group(prompt.params)
    return class_scores(backbone.t5, "full", params, batch, words, backbone.decoder_ids)


def test_peft_loads_ours_with_the_same_logits(
    backbone: Backbone, prompt: Prompt, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import T5ForConditionalGeneration

    save_prompt(prompt, tmp_path / "p", backbone)
    model = T5ForConditionalGeneration.from_pretrained(backbone.folder, attn_implementation="eager")
    peft_model = PeftModel.from_pretrained(model, tmp_path / "p").eval()
    texts = ["the film was good", "a very bad plot , not good at all"]
    rows = backbone.tokenizer([f"{t} It was <extra_id_0>." for t in texts], padding=True)
    with torch.no_grad():
        out = peft_model(
            input_ids=torch.tensor(rows["input_ids"]),
            attention_mask=torch.tensor(rows["attention_mask"]),
            decoder_input_ids=backbone.decoder_ids.expand(2, -1),
        )
    want = out.logits[:, -1, word_ids(backbone.tokenizer, ["bad", "good"])]
    torch.testing.assert_close(our_scores(backbone, prompt, texts), want, atol=1e-5, rtol=1e-5)


def test_we_load_what_peft_saves(backbone: Backbone, tmp_path: Path) -> None:
    """PEFT's seq2seq default holds 2P rows, of which the encoder uses the first P."""
    from peft import PromptTuningConfig, TaskType, get_peft_model
    from transformers import T5ForConditionalGeneration

    model = T5ForConditionalGeneration.from_pretrained(backbone.folder)
    config = PromptTuningConfig(task_type=TaskType.SEQ_2_SEQ_LM, num_virtual_tokens=5)
    peft_model = get_peft_model(model, config)
    peft_model.save_pretrained(tmp_path / "theirs")
    stored = load_file(tmp_path / "theirs" / "adapter_model.safetensors")["prompt_embeddings"]
    assert stored.shape == (10, 32)
    loaded = load_prompt(tmp_path / "theirs")
    assert torch.equal(loaded.params["prompt_embeddings"], stored[:5])
    assert loaded.task.mode == "full"
    check_fits(loaded, backbone)


def test_google_npy_is_read(tmp_path: Path) -> None:
    value = np.arange(12, dtype=np.float32).reshape(3, 4)
    np.save(tmp_path / "sst2.npy", value)
    loaded = load_prompt(tmp_path / "sst2.npy")
    assert loaded.tokens == 3 and loaded.width == 4 and loaded.task.name == "sst2"
    assert np.array_equal(loaded.params["prompt_embeddings"].numpy(), value)


def test_saved_folder_holds_exactly_the_contract(
    backbone: Backbone, prompt: Prompt, tmp_path: Path
) -> None:
    save_prompt(prompt, tmp_path / "p", backbone)
    assert sorted(f.name for f in (tmp_path / "p").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "task.json"
    ]  # fmt: skip
    stored = load_file(tmp_path / "p" / "adapter_model.safetensors")
    assert list(stored) == ["prompt_embeddings"] and stored["prompt_embeddings"].shape == (6, 32)
    config = json.loads((tmp_path / "p" / "adapter_config.json").read_text())
    assert config["num_transformer_submodules"] == 1
    loaded = load_prompt(tmp_path / "p")
    assert loaded.task == prompt.task
    assert torch.equal(loaded.params["prompt_embeddings"], prompt.params["prompt_embeddings"])


def test_a_failed_save_leaves_what_was_there(
    backbone: Backbone, prompt: Prompt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_prompt(prompt, tmp_path / "p", backbone)
    before = {f.name: f.read_bytes() for f in (tmp_path / "p").iterdir()}

    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trainer.tensors.save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_prompt(prompt, tmp_path / "p", backbone)
    assert {f.name: f.read_bytes() for f in (tmp_path / "p").iterdir()} == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["p"]


@pytest.mark.parametrize("cut", [0, 7, 60, -5])
def test_truncated_weights_are_named(
    backbone: Backbone, prompt: Prompt, tmp_path: Path, cut: int
) -> None:
    save_prompt(prompt, tmp_path / "p", backbone)
    weights = tmp_path / "p" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:cut])
    with pytest.raises(Failure, match=r"adapter_model\.safetensors is damaged"):
        load_prompt(tmp_path / "p")


def test_values_that_are_not_finite_are_refused(prompt: Prompt, tmp_path: Path) -> None:
    prompt.params["prompt_embeddings"][2, 3] = float("nan")
    save_prompt(prompt, tmp_path / "p")
    with pytest.raises(Failure, match="not finite"):
        load_prompt(tmp_path / "p")


def test_wrong_width_quotes_both(backbone: Backbone) -> None:
    wide = Prompt({"prompt_embeddings": torch.zeros(100, 512)}, TaskRecord())
    with pytest.raises(UserError, match=r"\[100, 512\].* is 32 wide"):
        check_fits(wide, backbone)


def test_other_weights_are_refused(
    backbone: Backbone, tiny_t5_v11: Path, prompt: Prompt, tmp_path: Path
) -> None:
    save_prompt(prompt, tmp_path / "p", backbone)
    other = load_backbone(str(tiny_t5_v11))
    with pytest.raises(UserError, match="other weights"):
        check_fits(load_prompt(tmp_path / "p"), other)


def test_deep_prompt_round_trip(backbone: Backbone, tmp_path: Path) -> None:
    params = initial_params(backbone, "random", "deep", 4, 0)
    task = TaskRecord("t", ["a", "b"], ["bad", "good"], mode="deep")
    save_prompt(Prompt(params, task), tmp_path / "p", backbone)
    assert not (tmp_path / "p" / "adapter_config.json").exists()
    loaded = load_prompt(tmp_path / "p")
    assert loaded.params["kv"].shape == (2, 2, 4, 4, 8)
    assert torch.equal(loaded.params["kv"], params["kv"].detach())
    with pytest.raises(UserError, match="--mode deep"):
        initial_params(backbone, str(tmp_path / "p"), "prefix", 4, 0)


def test_a_random_prompt_is_as_large_as_the_embeddings(tiny_t5: Path) -> None:
    backbone = load_backbone(str(tiny_t5))
    with torch.no_grad():
        backbone.t5.model.shared.weight.mul_(0.03)  # T5's own are of about 1
    value = initial_params(backbone, "random", "full", 500, 0)["prompt_embeddings"].detach()
    want = float(backbone.t5.model.shared.weight.std())
    assert value.shape == (500, 32)
    assert float(value.std()) == pytest.approx(want, rel=0.03)
    assert abs(float(value.mean())) < 0.03 * want


@pytest.mark.parametrize(("tokens", "times"), [(7, {1}), (20, {2, 3})])
def test_a_prompt_of_the_vocabulary_is_of_its_most_common_pieces(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch, tokens: int, times: set[int]
) -> None:
    """Each of them before any comes twice; <pad>, </s> and <unk> are no words."""
    monkeypatch.setattr("trainer.initial._COMMON", 7)
    value = initial_params(backbone, "vocab", "full", tokens, 3)["prompt_embeddings"].detach()
    weight = backbone.t5.model.shared.weight
    ids = [int((weight == row).all(1).nonzero()) for row in value]
    assert sorted(set(ids)) == list(range(3, 10))
    assert {ids.count(piece) for piece in set(ids)} == times


def test_wrong_number_of_rows_is_refused(prompt: Prompt, tmp_path: Path) -> None:
    save_prompt(prompt, tmp_path / "p")
    save_file({"prompt_embeddings": torch.zeros(7, 32)}, tmp_path / "p/adapter_model.safetensors")
    with pytest.raises(Failure, match=r"7 rows.*6 virtual tokens"):
        load_prompt(tmp_path / "p")


@pytest.mark.parametrize(
    ("tensors", "task", "message"),
    [
        ({"kv": (1, 2, 4, 3, 8)}, {}, "holds kv, but mode 'full' needs prompt_embeddings"),
        ({"prompt_embeddings": (6, 32)}, {"mode": "deep"}, "mode 'deep' needs kv, states"),
        ({"prompt_embeddings": (6, 4, 8)}, {}, r"the prompt is \[6, 4, 8\], not \[P, D\]"),
        ({}, {}, "holds no tensors"),
        ({"prompt_embeddings": (6, 32)}, {"mode": "sideways"}, "mode 'sideways' is unknown"),
        ({"prompt_embeddings": (6, 32)}, {"labels": ["a"]}, "1 labels but 2 label words"),
        ({"prompt_embeddings": (6, 32)}, {"colour": "red"}, "holds unknown settings: colour"),
        ({"prompt_embeddings": (6, 32)}, {"format": 99}, "has format 99, this version reads"),
    ],
)
def test_a_folder_whose_files_do_not_fit_says_which(
    prompt: Prompt, tmp_path: Path, tensors: dict[str, tuple[int, ...]], task: dict[str, object],
    message: str,
) -> None:  # fmt: skip
    folder = tmp_path / "p"
    save_prompt(prompt, folder)
    values = {name: torch.zeros(shape) for name, shape in tensors.items()}
    save_file(values, folder / "adapter_model.safetensors")
    record = json.loads((folder / "task.json").read_text())
    (folder / "task.json").write_text(json.dumps({**record, **task}))
    with pytest.raises((Failure, UserError), match=message) as error:
        load_prompt(folder)
    assert str(folder) in str(error.value)


def test_a_record_that_is_no_object_and_a_file_that_is_no_prompt(
    prompt: Prompt, tmp_path: Path
) -> None:
    save_prompt(prompt, tmp_path / "p")
    (tmp_path / "p" / "task.json").write_text("[]")
    with pytest.raises(Failure, match=r"task\.json must hold a JSON object"):
        load_prompt(tmp_path / "p")
    with pytest.raises(UserError, match=r"none\.npy does not exist"):
        load_prompt(tmp_path / "none.npy")
    np.save(tmp_path / "ids.npy", np.zeros((3, 4), np.int64))
    with pytest.raises(UserError, match=r"holds int64 \[3, 4\], not floats \[P, D\]"):
        load_prompt(tmp_path / "ids.npy")
    (tmp_path / "text.npy").write_text("prompt")
    with pytest.raises(Failure, match=r"text\.npy is not a NumPy file of numbers"):
        load_prompt(tmp_path / "text.npy")


def test_deep_keys_of_another_geometry_quote_both(backbone: Backbone) -> None:
    params = initial_params(backbone, "random", "deep", 4, 0)
    other = {**params, "kv": params["kv"][:1].repeat(3, 1, 1, 1, 1)}
    check_fits(Prompt(params, TaskRecord(mode="deep")), backbone)
    with pytest.raises(UserError, match=r"\[3, 2, 4, 4, 8\], but .* needs \[2, 2, 4, 4, 8\]"):
        check_fits(Prompt(other, TaskRecord(mode="deep")), backbone)


@pytest.mark.parametrize(
    ("field", "value", "what"),
    [
        ("temperature", 0, "0, but must be a number above 0"),
        ("temperature", -1.5, "-1.5, but must be a number above 0"),
        ("temperature", math.inf, "Infinity, but must be a number above 0"),
        ("temperature", math.nan, "NaN, but must be a number above 0"),
        ("temperature", "1.0", '"1.0", but must be a number above 0'),
        ("temperature", True, "true, but must be a number above 0"),
        ("max_tokens", 0, "0, but must be a whole number of at least 1"),
        ("max_tokens", 12.5, "12.5, but must be a whole number of at least 1"),
        ("labels", "no yes", '"no yes", but must be a list of texts'),
        ("words", ["bad", 1], r'\["bad", 1\], but must be a list of texts'),
        ("template", None, "null, but must be a text"),
        ("backbone_sha256", 7, "7, but must be a text or null"),
        ("seed", "1", '"1", but must be a whole number or null'),
        ("figures", [], r"\[\], but must be an object of figures"),
    ],
)
def test_a_record_that_was_edited_wrongly_names_the_field(
    prompt: Prompt, tmp_path: Path, field: str, value: Any, what: str
) -> None:
    save_prompt(prompt, tmp_path / "p")
    path = tmp_path / "p" / "task.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(Failure, match=rf"task\.json: '{field}' is {what}: correct it"):
        load_prompt(tmp_path / "p")
