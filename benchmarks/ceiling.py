"""How much the encoder's own weights allow: all of them, and a linear head, tuned on many rows.

    python -m benchmarks.ceiling --data-dir data --model mini --out ceiling.jsonl
    python -m benchmarks.ceiling --data-dir data --model MINILM --out ceiling.jsonl

--model is a T5 (`mini`, a folder) or the folder of a sentence encoder, told apart by the file
modules.json. A linear layer over the mean of the last states, scaled to length one, and every
weight below it learn from the same --samples rows; what they reach bounds what a prompt in front of
the same weights can. Rows, test rows and the seed's draw are those of `backbone_table`.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy, normalize

from benchmarks.backbone_table import Bench, TableConfig
from serve.cli import guarded
from trainer.backbone import load_backbone
from trainer.data import Examples
from trainer.few_shot import draw_few_shot

log = logging.getLogger(__name__)

Vectors = Callable[[list[str]], torch.Tensor]


def t5_encoder(name: str) -> tuple[torch.nn.Module, Vectors]:
    """(the encoder of a T5, texts -> their vectors [N, D])."""
    backbone = load_backbone(name, trainable=True)
    encoder = backbone.t5.model.get_encoder()

    def vectors(texts: list[str]) -> torch.Tensor:
        batch = backbone.tokenizer(
            texts, return_tensors="pt", padding=True, truncation=True, max_length=128
        )
        mask = batch["attention_mask"]
        states = encoder(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
        weights = mask[..., None].to(states.dtype)
        return normalize((states * weights).sum(1) / weights.sum(1), dim=-1)

    return encoder, vectors


def sentence_encoder(folder: str) -> tuple[torch.nn.Module, Vectors]:
    """(a sentence-transformers model, texts -> their vectors [N, D])."""
    from sentence_transformers import SentenceTransformer

    encoder = SentenceTransformer(folder, device="cpu")

    def vectors(texts: list[str]) -> torch.Tensor:
        return normalize(encoder(encoder.tokenize(texts))["sentence_embedding"], dim=-1)

    return encoder, vectors


def accuracy(vectors: Vectors, head: torch.nn.Module, rows: Examples) -> float:
    """Share of right answers."""
    with torch.no_grad():
        found = [
            head(vectors(list(rows.texts[i : i + 64]))).argmax(1).numpy()
            for i in range(0, len(rows), 64)
        ]
    return float((np.concatenate(found) == rows.labels).mean())


def main() -> None:
    """Tune, and append a line of JSON after each epoch."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--model", default="mini", help="a T5, or a sentence encoder's folder")
    parser.add_argument("--task", default="sst2")
    parser.add_argument("--samples", type=int, default=2560)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rate", type=float, default=5e-5, help="of the encoder; the head: 1e-3")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", required=True, help="file of results, one JSON object a line")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    bench = Bench(TableConfig(data_dir=args.data_dir, out=args.out))
    task, pool, test = bench.data(args.task)
    drawn = draw_few_shot(pool, args.seed, args.samples, args.samples, task.classes)
    train, held = (pool.take(part) for part in drawn)

    torch.manual_seed(args.seed)
    make = sentence_encoder if (Path(args.model) / "modules.json").is_file() else t5_encoder
    encoder, vectors = make(args.model)
    head = torch.nn.Linear(vectors(["a"]).shape[1], task.classes)
    groups = [{"params": encoder.parameters(), "lr": args.rate},
              {"params": head.parameters(), "lr": 1e-3}]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    steps = args.epochs * math.ceil(len(train) / 32)

    def schedule(step: int) -> float:
        """A tenth of the steps up, then down to zero."""
        return min(1.0, (step + 1) / (0.1 * steps)) * max(0.0, 1 - step / steps)

    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    draws, start = np.random.default_rng(args.seed), time.monotonic()
    for epoch in range(1, args.epochs + 1):
        encoder.train()
        order = draws.permutation(len(train))
        for chosen in np.split(order, range(32, len(order), 32)):
            logits = head(vectors([train.texts[i] for i in chosen]))
            loss = cross_entropy(logits, torch.from_numpy(train.labels[chosen]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            falling.step()
        encoder.eval()
        result = {
            "model": args.model, "task": args.task, "samples": args.samples, "rate": args.rate,
            "epochs": args.epochs, "seed": args.seed, "epoch": epoch,
            "held_out": round(accuracy(vectors, head, held), 4),
            "test": round(accuracy(vectors, head, test), 4), "rows": len(test),
            "seconds": round(time.monotonic() - start),
        }  # fmt: skip
        with Path(args.out).open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
        log.info("%s", result)


if __name__ == "__main__":
    sys.exit(guarded(main))
