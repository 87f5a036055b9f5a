"""Training the judge on whole documents, and its verdicts on single sentences.

See `trainer.pretraining.judge`. A judge's folder is a BERT folder with one file more, so it serves
as `--teacher` like any other.
"""

import logging
import multiprocessing as mp
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import nn
from tqdm import tqdm

from serve.errors import Failure
from serve.files import atomic_folder
from trainer.cpu import half_precision
from trainer.pretraining.judge import (
    HEAD,
    Batches,
    Document,
    Judge,
    JudgeSchedule,
    allowed_degrees,
    batch_loss,
    pieces,
)
from trainer.pretraining.parallel import make_team
from trainer.pretraining.recipe import Labelled, Recipe
from trainer.pretraining.rows import classes_of, read_rows
from trainer.pretraining.state import Progress, load_state, save_state
from trainer.pretraining.teacher import read_bert
from trainer.pretraining.texts import HeldOut, sentences

logger = logging.getLogger(__name__)
_PART = 2000  # texts that are tokenised, or judged, between two steps of a progress bar
_NEUTRAL = 2  # sentences of a plain document whose source the recipe calls neutral
_NEUTRAL_DOCUMENTS = 1500  # of each such source


def load_judge(folder: Path) -> tuple[Judge, Tokenizer]:
    """A judge's folder, or that of a plain BERT (whose head is then new); see `read_bert`."""
    bert, tokenizer = read_bert(folder)
    for module in bert.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    torch.manual_seed(1)
    judge = Judge(bert)
    if (folder / HEAD).is_file():
        judge.load_state_dict(load_file(folder / HEAD), strict=False)
    return judge, tokenizer


def save_judge(judge: Judge, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the folder, whole or not at all."""
    head = {name: value for name, value in judge.state_dict().items() if "bert." not in name}
    with atomic_folder(folder) as temporary:
        judge.bert.save_pretrained(temporary)
        tokenizer.save(str(temporary / "tokenizer.json"))
        save_file(head, temporary / HEAD)


def documents(recipe: Recipe, held_out: HeldOut, tokenizer: Tokenizer, seed: int
              ) -> list[Document]:  # fmt: skip
    """Every labelled document of the recipe as sentences, and neutral sentences of plain text."""
    found: list[tuple[list[str], tuple[float, ...]]] = []
    for entry in recipe.labelled:
        found += _labelled(entry, held_out)
    rng = np.random.default_rng(seed)
    neutral = allowed_degrees({"tone": 1})
    assert neutral is not None
    for plain in recipe.plain:
        if not plain.neutral:
            continue
        for row in read_rows(plain.file, min(plain.documents, _NEUTRAL_DOCUMENTS), seed):
            fit = [s for s in sentences(row["text"])
                   if 4 <= s.count(" ") <= 30 and s not in held_out]  # fmt: skip
            found += [([fit[i]], neutral) for i in rng.permutation(len(fit))[:_NEUTRAL].tolist()]
    result = []
    for start in range(0, len(found), _PART):
        part = found[start : start + _PART]
        rows = iter(pieces(tokenizer, [text for texts, _ in part for text in texts]))
        result += [Document([next(rows) for _ in texts], allowed) for texts, allowed in part]
    return result


def _labelled(entry: Labelled, held_out: HeldOut
              ) -> Iterator[tuple[list[str], tuple[float, ...]]]:  # fmt: skip
    for row in read_rows(entry.file):
        allowed = allowed_degrees(classes_of(row, {**entry.columns, **entry.degrees}))
        if allowed is None:
            continue
        parts = sentences(row["text"])
        if entry.split and row.get("title"):
            parts.append(str(row["title"]))
        if kept := [text for text in parts if text.strip() and text not in held_out]:
            yield kept, allowed


def train_judge(judge: Judge, given: Sequence[Document], schedule: JudgeSchedule, seed: int,
                workers: int, checkpoint: Path, *, resume: bool = False,
                stop_after: int | None = None, half: bool | None = None) -> Progress:  # fmt: skip
    """Train in place; `checkpoint` is written every 200 steps, and read with `resume`.

    half: products in bf16; None: where the device multiplies it.
    """
    device = judge.device
    half = half_precision(device, half)
    judge.bert.embeddings.word_embeddings.requires_grad_(False)  # rare words keep their place
    batches = Batches(given, schedule.tokens, seed)
    head = [*judge.degrees.parameters()]
    encoder = [p for p in judge.bert.parameters() if p.requires_grad]
    trained = nn.ParameterList([*encoder, *head])
    optimizer = torch.optim.AdamW(
        [{"params": encoder, "peak": schedule.rate}, {"params": head, "peak": 10 * schedule.rate}],
        lr=schedule.rate, weight_decay=0.01, fused=True)  # fmt: skip

    def compute(rank: int, step: int, done: float) -> list[float]:
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            loss, tokens = batch_loss(judge, batches(step * workers + rank))
        loss.backward()
        return [0, loss.item(), 0, 0, tokens]

    steps = max(1, round(schedule.epochs * batches.count / workers))
    settings = {"seed": seed, "documents": len(given), "batches": batches.count,
                "processes": workers, "steps": steps, "rate": schedule.rate}  # fmt: skip
    modules: dict[str, nn.Module] = {"judge": trained}
    progress = load_state(checkpoint, modules, optimizer, settings) if resume else Progress()
    team = make_team([trained], compute, workers)
    average = float("nan")
    with tqdm(total=steps, initial=progress.step, desc="judge", mininterval=1.0) as bar:
        while progress.step < steps and progress.step != stop_after:
            done = progress.step / steps
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * schedule.factor(done)
            metrics = team.step(progress.step, done)
            norm = torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
            if not norm.isfinite():  # before a checkpoint is spoilt
                raise Failure("the judge's gradient is not finite: lower --judge-rate")
            optimizer.step()
            progress.step += 1
            progress.tokens += int(metrics[:, -1].sum())
            loss = float(metrics[:, 1].mean())
            average = loss if average != average else 0.98 * average + 0.02 * loss
            bar.set_postfix(loss=f"{average:.3f}", refresh=False)
            bar.update()
            if progress.step % 200 == 0 or progress.step in (steps, stop_after):
                save_state(checkpoint, modules, optimizer, progress, settings)
    team.close()
    return progress


def verdicts(judge: Judge, tokenizer: Tokenizer, texts: Sequence[str], workers: int,
             half: bool | None = None) -> np.ndarray:  # fmt: skip
    """Probabilities of the five degrees, [N, 5] float32. On a CPU `workers` processes share it.

    half: as in `train_judge`.
    """
    judge.eval()
    device = judge.device
    half = half_precision(device, half)
    result = np.zeros((len(texts), 5), np.float32)

    def judged(part: np.ndarray) -> np.ndarray:
        rows = pieces(tokenizer, [texts[i] for i in part])
        with (
            torch.no_grad(),
            torch.autocast(device.type, torch.bfloat16, enabled=half),
        ):
            found = [judge(rows[k : k + 100]).softmax(-1) for k in range(0, len(rows), 100)]
        return torch.cat(found).cpu().numpy()

    for part, found in mapped(judged, texts, workers if device.type == "cpu" else 1, "verdicts"):
        result[part] = found
    return result


_job: Callable[[int], np.ndarray] | None = None  # what forked processes inherit


def _run_job(number: int) -> np.ndarray:
    assert _job is not None
    return _job(number)


def mapped(function: Callable[[np.ndarray], np.ndarray], texts: Sequence[str], workers: int,
           what: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:  # fmt: skip
    """(indices of some texts, function of these indices) until all are seen, texts of about one
    length together, by `workers` forked processes of one thread each; `what` names the progress
    bar."""
    order = np.argsort([len(text) for text in texts], kind="stable")
    parts = np.array_split(order, max(1, len(texts) // _PART))
    with tqdm(total=len(texts), desc=what, mininterval=1.0) as bar:
        for part, found in _in_processes(function, parts, workers):
            yield part, found
            bar.update(len(part))


def _in_processes(function: Callable[[np.ndarray], np.ndarray], parts: Sequence[np.ndarray],
                  workers: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:  # fmt: skip
    """(part, function of it), in order, by `workers` forked processes of one thread each."""
    if workers == 1:
        yield from ((part, function(part)) for part in parts)
        return
    global _job
    _job = lambda number: function(parts[number])  # noqa: E731 - pickled by its number only
    try:
        with ProcessPoolExecutor(
            workers, mp.get_context("fork"), torch.set_num_threads, (1,)
        ) as pool:
            yield from zip(parts, pool.map(_run_job, range(len(parts))), strict=True)
    except BrokenProcessPool:
        raise Failure("a judging process died: start again") from None
    finally:
        _job = None
