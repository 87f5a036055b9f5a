"""Loading a frozen T5: `mini`, a folder, or a Hugging Face id."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, T5ForConditionalGeneration
from transformers.utils import logging as transformers_logging

from serve.errors import Failure, UserError
from serve.files import read_json, sha256
from trainer.readout import BLANK
from trainer.sharding import WHOLE, Shards
from trainer.t5 import FrozenT5

log = logging.getLogger(__name__)

MINI = Path(__file__).parent / "backbones" / "mini"

_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "spiece.model", "special_tokens_map.json",
)  # fmt: skip
# Of config.json: where it came from, and how the weights are stored.
_UNREAD = ("_name_or_path", "architectures", "torch_dtype", "dtype", "transformers_version")

# Configuration and tokenizer of the first `mini`: its runs were known by their weights alone.
_MINI_READS = "580a3a5bebbe7bc83eb1b9da52b50b21e06920dbc6dc23584097df30ed761012"


@dataclass
class Backbone:
    """A frozen T5 with its tokenizer.

    Attributes:
        name: what the user called it; sha256: of its weights' files, so that a prompt is not used
            on other weights than it was trained on.
    """

    name: str
    sha256: str
    t5: FrozenT5
    tokenizer: Any
    folder: Path

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.t5.model.shared.weight.device

    @property
    def decoder_ids(self) -> Tensor:
        """int64 [2]: `[pad, <extra_id_0>]`, the decoder input of the read-out."""
        blank = self.tokenizer.convert_tokens_to_ids(BLANK)
        start = self.t5.model.config.decoder_start_token_id
        return torch.tensor([start, blank], device=self.device)

    def parameters(self) -> int:
        """How many numbers the backbone holds."""
        return sum(weight.numel() for weight in self.t5.model.parameters())


def _hub_folder(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    patterns = ["*.json", "*.safetensors", "*.model"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except HFValidationError:
        raise UserError(
            f"backbone '{name}' is neither a folder nor a Hugging Face id: check the path"
        ) from None
    # The hub client raises its own, requests' and httpx's errors, without a common base.
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Failure(
            f"backbone '{name}' could not be fetched from the hub ({reason}): pass a local folder "
            "or 'mini' with --backbone"
        ) from None


def backbone_folder(name: str) -> Path:
    """The local folder of a backbone, fetched from the hub where it must be.

    Raises:
        UserError: the folder holds no T5 of this kind. Failure: the hub cannot be reached.
    """
    folder = MINI if name == "mini" else Path(name)
    if not folder.is_dir():
        if name == "mini":
            raise Failure("the backbone 'mini' is not installed: install the package again")
        if name.startswith((".", "/", "~")):
            raise UserError(f"backbone folder {name} does not exist: check the path")
        folder = _hub_folder(name)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no config.json: it is not a Hugging Face model folder")
    return folder


def weights_hash(folder: Path) -> str:
    """SHA-256 over the safetensors files of a folder, in the order of their names.

    Raises:
        UserError: there are none.
    """
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise UserError(
            f"{folder} holds no model.safetensors: convert the weights with transformers' "
            "save_pretrained (pickled weights are not read)"
        )
    if len(files) == 1:
        return sha256(files[0])
    return hashlib.sha256("".join(sha256(file) for file in files).encode()).hexdigest()


def backbone_mark(folder: Path) -> str:
    """A digest of all that a backbone's answers follow from: its weights, its configuration and its
    tokenizer. A prompt is bound to the weights alone; a finished run is kept for as long as nothing
    of this changes.

    Raises:
        UserError: as for `weights_hash`.
    """
    config = read_json(folder / "config.json")
    if isinstance(config, dict):  # what else it may be is refused when it is loaded
        config = {name: value for name, value in config.items() if name not in _UNREAD}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name in _TOKENIZER_FILES:
        file = folder / name
        digest.update(f"{name} {sha256(file) if file.is_file() else '-'}".encode())
    weights = weights_hash(folder)
    if digest.hexdigest() == _MINI_READS:
        return weights
    digest.update(weights.encode())
    return digest.hexdigest()


def load_backbone(
    name: str,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    trainable: bool = False,
    shards: Shards = WHOLE,
) -> Backbone:
    """Load a T5 for training prompts on it.

    Args:
        name: `mini`, a folder, or a Hugging Face id.
        trainable: keep its weights trainable (full tuning only).
        shards: which part of the weights to keep; the device gets no more than that.

    Raises:
        UserError: the name or the folder is wrong. Failure: it is damaged or out of reach.
    """
    folder = backbone_folder(name)
    digest = weights_hash(folder)
    transformers_logging.disable_progress_bar()  # its "Loading weights" would hide our own
    try:
        config = AutoConfig.from_pretrained(folder)
        if config.model_type != "t5":
            raise UserError(
                f"backbone '{name}' is a {config.model_type}, but prompts steer a T5 (v1.0, v1.1, "
                "FLAN): pass another --backbone"
            )
        # Fused attention has no second derivative (pytorch#116350), so eager throughout.
        model = T5ForConditionalGeneration.from_pretrained(
            folder, config=config, dtype=dtype, attn_implementation="eager"
        )
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except UserError:
        raise
    # safetensors, tokenizers and transformers each raise their own kinds on damaged files.
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Failure(f"backbone {folder} cannot be read ({reason}): fetch it again") from None
    if tokenizer.convert_tokens_to_ids(BLANK) in (None, tokenizer.unk_token_id):
        raise UserError(f"the tokenizer of backbone '{name}' has no {BLANK}: it is not T5's")
    if getattr(config, "decoder_start_token_id", None) is None:  # transformers 5 has no default
        raise UserError(
            f"config.json of backbone '{name}' has no decoder_start_token_id: add it (T5's is that "
            "of the padding, 0)"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of backbone '{name}' has no eos_token, which ends a T5's input: name "
            "it in tokenizer_config.json (T5's is </s>)"
        )
    t5 = FrozenT5(model, trainable=trainable, shards=shards)
    t5.to(device)
    return Backbone(name, digest, t5, tokenizer, folder)
