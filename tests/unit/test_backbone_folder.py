"""Backbones that cannot be used, each with what is wrong and what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from serve.errors import Failure, UserError
from trainer.backbone import load_backbone


def edit(name: str, **changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        value = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**value, **changes}))

    return change


def without(name: str, key: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        value = json.loads((folder / name).read_text())
        del value[key]
        (folder / name).write_text(json.dumps(value))

    return change


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def truncated(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def without_sentinels(folder: Path) -> None:
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace("<extra_id_0>", "<other_0>"))
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            text = (folder / name).read_text()
            (folder / name).write_text(text.replace("<extra_id_0>", "<other_0>"))


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (lambda f: (f / "config.json").unlink(), UserError, "holds no config.json"),
        (pickled, UserError, r"holds no model.safetensors: .*pickled weights are not read"),
        (edit("config.json", model_type="bert"), UserError, "is a bert, but prompts steer a T5"),
        (truncated, Failure, r"cannot be read \(.*fetch it again"),
        (without_sentinels, UserError, "has no <extra_id_0>: it is not T5's"),
        (without("config.json", "decoder_start_token_id"), UserError, "has no decoder_start_token"),
        (without("tokenizer_config.json", "eos_token"), UserError, "has no eos_token"),
    ],
)
def test_a_folder_that_is_no_backbone_says_why(
    tiny_t5: Path, tmp_path: Path, change: Callable[[Path], None], kind: type, message: str
) -> None:
    folder = tmp_path / "t5"
    shutil.copytree(tiny_t5, folder)
    load_backbone(str(folder))
    change(folder)
    with pytest.raises(kind, match=message) as error:
        load_backbone(str(folder))
    assert str(folder) in str(error.value)


def test_a_name_that_the_hub_does_not_give_says_what_to_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import huggingface_hub

    def unreachable(*_: object, **__: object) -> str:
        raise ConnectionError("no route\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(Failure, match=r"'a/b' could not be .* \(no route\): pass a local folder"):
        load_backbone("a/b")
    monkeypatch.undo()
    with pytest.raises(UserError, match="'a/b/c' is neither a folder nor a Hugging Face id"):
        load_backbone("a/b/c")
