"""A T5 of a given shape with random weights: to exercise commands where weights are out of reach.

    python -m benchmarks.random_t5 --geometry base --tokenizer mini --out runs/random-base

What it answers is noise; what it takes in time and memory is what the real one takes.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import torch
from transformers import T5Config, T5ForConditionalGeneration

from benchmarks.meta_training import GEOMETRIES
from serve.cli import guarded
from serve.files import atomic_folder
from trainer.backbone import backbone_folder

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def write_random_t5(folder: Path, geometry: str, tokenizer: Path, seed: int = 0) -> None:
    """Write a Hugging Face folder: random weights, and another folder's tokenizer."""
    torch.manual_seed(seed)
    config = T5Config(vocab_size=32128, decoder_start_token_id=0, **GEOMETRIES[geometry])
    model = T5ForConditionalGeneration(config)
    with atomic_folder(folder) as temporary:
        model.save_pretrained(temporary)
        for name in _TOKENIZER_FILES:
            if (tokenizer / name).is_file():
                shutil.copy(tokenizer / name, temporary / name)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--geometry", choices=sorted(GEOMETRIES), default="base")
    parser.add_argument("--tokenizer", default="mini", help="a backbone whose tokenizer is taken")
    parser.add_argument("--out", required=True)
    given = parser.parse_args()
    write_random_t5(Path(given.out), given.geometry, backbone_folder(given.tokenizer))
    print(f"{given.out}: T5-{given.geometry}, random weights")


if __name__ == "__main__":
    sys.exit(guarded(main))
