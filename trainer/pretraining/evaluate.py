"""Tracking: accuracy of the half-trained backbone on small held-out sets, asked in words.

It costs seconds, and tells a plateau at chance from progress, which the loss does not.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from serve.errors import UserError
from trainer.pretraining.asker import Asker
from trainer.pretraining.corruption import EOS, FIRST_SENTINEL
from trainer.pretraining.packing import pad
from trainer.pretraining.wordings import HELD_OUT, TEMPLATE
from trainer.t5 import FrozenT5, Segment

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Probe:
    """A small fixed sample of a set: texts [N] and labels [N] (0 negative, 1 positive)."""

    name: str
    texts: list[str]
    labels: np.ndarray


def read_probes(folder: Path, names: Sequence[str], rows: int = 200) -> list[Probe]:
    """Two-class samples from the Parquet files `names` (stars and neutral rows are left out)."""
    probes = []
    for name in names:
        table = pq.read_table(folder / f"{name}.parquet").to_pandas()
        if not {"text", "label"} <= {*table}:
            raise UserError(f"--probes {name}: its file has no columns text and label")
        if "split" in table and len(set(table["split"]) & {"dev", "test"}):
            table = table[table["split"].isin(["dev", "test"])]
        top = 1 if table["label"].max() == 1 else 2
        table = table[table["label"].isin([0, top])].drop_duplicates("text")
        table = table.sample(min(rows, len(table)), random_state=0)
        probes.append(Probe(name, table["text"].tolist(), (table["label"] == top).to_numpy(int)))
    return probes


@torch.no_grad()
def ask(t5: FrozenT5, asker: Asker, pattern: str, words: tuple[str, ...], texts: list[str],
        limit: int = 96) -> np.ndarray:  # fmt: skip
    """Scores [N, C] of the label words for a wording; texts are cut to `limit` pieces."""
    wording = asker.wording(pattern, words)
    rows = [[*wording.before, *e.ids[:limit], *wording.after, EOS]
            for e in asker.tokenizer.encode_batch(texts, add_special_tokens=False)]  # fmt: skip
    order = np.argsort([len(row) for row in rows])
    device = t5.model.device
    start = torch.tensor([0, FIRST_SENTINEL], device=device)
    word_ids = torch.tensor(wording.words, device=device)
    scores = np.zeros((len(rows), len(words)), np.float32)
    for part in np.array_split(order, max(1, len(rows) // 64)):
        ids, mask = pad([rows[i] for i in part])
        ids, mask = ids.to(device), mask.to(device)
        states = t5.encode(t5.embed(ids), mask)
        decoded = t5.decode(start, [Segment(states[:, None], mask[:, None])])
        scores[part] = t5.scores(decoded, word_ids).float().cpu().numpy()
    return scores


def track(t5: FrozenT5, asker: Asker, probes: list[Probe], step: int, log: Path) -> dict:
    """Accuracy per probe: the toolkit's template, and the mean of the held-out wordings."""
    found: dict[str, dict[str, float]] = {}
    for probe in probes:
        known = ask(t5, asker, TEMPLATE, ("terrible", "great"), probe.texts).argmax(1)
        unknown = [(ask(t5, asker, w, words, probe.texts).argmax(1) == probe.labels).mean()
                   for w, words in HELD_OUT[:3]]  # fmt: skip
        found[probe.name] = {"template": round(float((known == probe.labels).mean()), 3),
                             "held_out_wordings": round(float(np.mean(unknown)), 3)}  # fmt: skip
    with log.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, "accuracy": found}) + "\n")
    logger.info("step %d: %s", step, ", ".join(
        f"{n} {100 * v['template']:.0f}/{100 * v['held_out_wordings']:.0f}"
        for n, v in found.items()))  # fmt: skip
    return found
