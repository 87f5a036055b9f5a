"""`python -m trainer quickstart`: the whole path on real sentences, small enough for two cores.

    film ratings ──label──► open text with pseudo-labels ──cluster──► tasks ──meta──► MetaPT start
    product and tweet ratings ──tune──► prompts ──export──► bundle ──serve──► figures

The sentences are VADER's (Hutto and Gilbert 2014), each rated by some twenty people. Film ratings
teach the labeller, film and editorial sentences are its open text; products and tweets are never
seen before a prompt is tuned on 40 of them.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from serve.bundle import MODES
from serve.cli import as_json, option
from serve.files import atomic_write, write_json
from trainer.data import Examples, load_task
from trainer.options import MOST_SEED, output_folder, pick_device
from trainer.runs import RUN_FILE, versions, write_record
from trainer.spelling import normalise

if TYPE_CHECKING:
    from trainer.prompt import Prompt

log = logging.getLogger(__name__)

TASKS = ("vader-product-2", "vader-tweet-2")
STARTS = ("metapt", "random")


@dataclass(kw_only=True)
class QuickstartConfig:
    """Label, cluster, meta-train, tune, export and serve, in minutes on two cores.

    Every stage leaves its result in --out and is skipped when it is there already, so a run that
    was stopped goes on. --out/bundle is what `python -m serve` and `python -m demo` take.
    """

    out: str = option("runs/quickstart", help="folder of everything that is made")
    backbone: str = option("mini", help="a Hugging Face id, a folder, or mini, which ships")
    mode: str = option("prefix", choices=MODES, help="attention mode")
    prompt_tokens: int = option(20, help="P; the paper's 100 take longer to train", minimum=1)
    sentences: int = option(800, help="pseudo-labelled sentences kept of each class", minimum=50)
    clusters: int = option(6, help="K-means clusters (the paper's 10)", minimum=2)
    meta_steps: int = option(40, help="outer steps of MetaPT (the paper's 20,000)", minimum=1)
    inner_rate: float = option(
        1.0, minimum=0, help="alpha (the paper's 0.08 is for T5-base); 0 finds one by search"
    )
    outer_rate: float = option(0.01, minimum=0, help="beta (the paper's is 0.025)")
    epochs: int = option(30, help="epochs of each tuning (the paper's 200)", minimum=1)
    test_rows: int = option(400, help="rows of each task that are classified", minimum=10)
    seed: int = option(1, help="seed of every random draw", minimum=0, maximum=MOST_SEED)
    device: str = option("auto", help="auto, cpu or cuda, for the training")

    examples = ["", "--backbone google-t5/t5-base --prompt-tokens 100 --meta-steps 2000"]


class Files:
    """The files of a quick start."""

    def __init__(self, out: Path):
        self.out = out
        self.rated = out / "film_rated.csv"
        self.text = out / "open_text.txt"
        self.labelled = out / "labelled.parquet"
        self.clusters = out / "clusters.parquet"
        self.metapt = out / "metapt"
        self.bundle = out / "bundle"
        self.report = out / "report.json"

    def prompt(self, task: str, start: str) -> Path:
        """The folder of a tuned prompt."""
        return self.out / f"{task}-from-{start}"


def _record_of(result: Path) -> Path:
    return result / RUN_FILE if result.is_dir() else result.with_suffix(".run.json")


def _fresh(result: Path, config: Any, inputs: Sequence[Path] = ()) -> bool:
    """Whether a stage's result is there, made with the same settings and after its inputs."""
    run = _record_of(result)
    if not result.exists() or not run.is_file():
        return False
    written = run.stat().st_mtime_ns
    if any(_record_of(path).stat().st_mtime_ns > written for path in inputs):
        return False
    try:
        made = json.loads(run.read_text())
    except ValueError:
        return False
    if weights := made.get("backbone_sha256"):  # the name may be the same, and the model another
        from trainer.backbone import backbone_folder, weights_hash

        if weights != weights_hash(backbone_folder(config.backbone)):
            return False
    return made.get("config") == as_json(config)


def _stage(
    title: str, result: Path, config: Any, run: Callable[[Any], object],
    inputs: Sequence[Path] = (),
) -> None:  # fmt: skip
    if _fresh(result, config, inputs):
        log.info("== %s: there already", title)
        return
    log.info("== %s", title)
    started = time.monotonic()
    run(config)
    log.info("   %.0f s", time.monotonic() - started)


@dataclass
class SourceConfig:
    """What the draw of the open text depends on."""

    out: str
    seed: int


def write_source(files: Files, config: SourceConfig) -> None:
    """Film ratings for the labeller, and the other sentences as open text without labels."""
    import csv

    from trainer import vader

    rated = vader.load("film", 2)
    order = np.random.default_rng(config.seed).permutation(len(rated))
    taught = rated.take(order[: len(rated) // 2])
    everything = vader.sentences()
    # Neither what the labeller learned from nor a sentence of the domains that prompts are tuned
    # on: a few short ones ("I love it.") stand in several.
    known = {normalise(text) for text in taught.texts}
    known |= {normalise(text) for name in ("product", "tweet") for text in everything[name].texts}
    with atomic_write(files.rated) as path, path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows(
            (text, rated.names[label])
            for text, label in zip(taught.texts, taught.labels, strict=True)
        )
    texts = [*everything["film"].texts, *everything["editorial"].texts]
    with atomic_write(files.text) as path:
        path.write_text(
            "".join(f"{text}\n" for text in texts if normalise(text) not in known), "utf-8"
        )
    write_record(_record_of(files.text), "source", config)


def _train(config: QuickstartConfig, files: Files) -> None:
    from trainer.cluster import ClusterConfig, run_cluster
    from trainer.configs import MetaConfig, TuneConfig
    from trainer.label import LabelConfig, run_label
    from trainer.source import run_meta
    from trainer.tune import run_tune

    source = SourceConfig(str(files.text), config.seed)
    if not (files.rated.is_file() and _fresh(files.text, source)):
        write_source(files, source)
    label = LabelConfig(
        out=str(files.labelled), corpus=[str(files.text)], data=str(files.rated),
        threshold=0.6, per_class=config.sentences, seed=config.seed,
    )  # fmt: skip
    _stage("label open text (4.1)", files.labelled, label, run_label, [files.text])
    cluster = ClusterConfig(
        data=str(files.labelled), out=str(files.clusters), k=config.clusters, seed=config.seed
    )
    _stage("cluster it into tasks (4.2)", files.clusters, cluster, run_cluster, [files.labelled])
    common: dict[str, Any] = {
        "backbone": config.backbone, "mode": config.mode, "prompt_tokens": config.prompt_tokens,
        "seed": config.seed, "device": config.device, "max_tokens": 64,
    }  # fmt: skip
    meta = MetaConfig(
        data=str(files.clusters), out=str(files.metapt), steps=config.meta_steps,
        inner_rate=config.inner_rate, rate=config.outer_rate, evaluate_every=20, **common,
    )  # fmt: skip
    _stage(
        f"MetaPT, {config.meta_steps} outer steps (4.3)",
        files.metapt,
        meta,
        run_meta,
        [files.clusters],
    )
    for task in TASKS:
        for start in STARTS:
            init = str(files.metapt) if start == "metapt" else "random"
            tune = TuneConfig(
                task=task,
                init=init,
                out=str(files.prompt(task, start)),
                name=task,
                epochs=config.epochs,
                **common,
            )
            title = f"tune {task} on 40 samples, from {start} (A.4)"
            inputs = [files.metapt] if start == "metapt" else []
            _stage(title, files.prompt(task, start), tune, run_tune, inputs)


def _export(config: QuickstartConfig, files: Files) -> None:
    from exporter.export import export_bundle
    from trainer.backbone import load_backbone
    from trainer.bonnet import write_bonnet
    from trainer.embed import embed
    from trainer.tables import iterate_rows

    # The MetaPT start goes along: the demo compares with it, and teaches from it.
    prompts = [files.prompt(task, start) for task in TASKS for start in STARTS] + [files.metapt]
    newest = max((prompt / "task.json").stat().st_mtime for prompt in prompts)
    parts = [files.bundle / name for name in ("bundle.json", "bonnet.json")]  # as they are written
    if all(part.is_file() and part.stat().st_mtime > newest for part in parts):
        log.info("== export to ONNX: there already")
        return
    log.info("== export to ONNX")
    started = time.monotonic()
    names = [
        task if start == "metapt" else f"{task}-from-{start}" for task in TASKS for start in STARTS
    ] + ["metapt"]
    backbone = load_backbone(config.backbone)
    export_bundle(prompts, backbone, files.bundle, names=names)
    texts = [row["text"] for _, row in iterate_rows(files.clusters, ["text"])]
    shown: dict[str, str | Path | Prompt] = dict(zip(names, prompts, strict=True))
    # What the demo shows of how the bundle came about; the embeddings are `cluster`'s, cached.
    write_bonnet(files.bundle, files.clusters, embed(texts, quiet=True), shown, backbone)
    log.info("   %.0f s", time.monotonic() - started)


def _accuracy(answers: list[Any], examples: Examples) -> float:
    truth = [examples.names[label] for label in examples.labels]
    return float(
        np.mean([answer.label == name for answer, name in zip(answers, truth, strict=True)])
    )


def _serve(config: QuickstartConfig, files: Files) -> dict[str, Any]:
    from serve.classifier import Classifier

    log.info("== classify %d unseen rows of each task with onnxruntime", config.test_rows)
    classifier = Classifier(files.bundle)
    rows: dict[str, Any] = {}
    for task in TASKS:
        examples = load_task(task, "test").sample(config.test_rows, config.seed)
        majority = float(examples.counts.max() / len(examples))
        result: dict[str, Any] = {"rows": len(examples), "majority": majority}
        for start in STARTS:
            name = task if start == "metapt" else f"{task}-from-{start}"
            classifier.classify(examples.texts[:32], task=name)  # the task's constants, once
            started = time.perf_counter()
            answers = classifier.classify(examples.texts, task=name)
            seconds = time.perf_counter() - started
            result[start] = _accuracy(answers, examples)
            result["milliseconds_per_text"] = 1000 * seconds / len(examples)
        rows[task] = result
    text = load_task(TASKS[0], "test").texts[0]
    times = []
    for _ in range(30):
        started = time.perf_counter()
        classifier.classify([text], task=TASKS[0])
        times.append(time.perf_counter() - started)
    return {"tasks": rows, "milliseconds_single_text": 1000 * float(np.median(times))}


def report_table(report: dict[str, Any]) -> str:
    """The report as a table for a terminal."""
    lines = [f"{'task':20}{'rows':>6}{'majority':>10}{'random start':>14}{'MetaPT start':>14}"]
    for task, row in report["tasks"].items():
        lines.append(
            f"{task:20}{row['rows']:6}{row['majority']:10.3f}{row['random']:14.3f}"
            f"{row['metapt']:14.3f}"
        )
    each = np.mean([row["milliseconds_per_text"] for row in report["tasks"].values()])
    lines.append(
        f"onnxruntime: {each:.2f} ms a text in batches, "
        f"{report['milliseconds_single_text']:.1f} ms for a single text; "
        f"{report['seconds']:.0f} s in all"
    )
    return "\n".join(lines)


def run_quickstart(config: QuickstartConfig) -> None:
    """`python -m trainer quickstart`."""
    started = time.monotonic()
    files = Files(output_folder(config.out))
    pick_device(config.device)
    files.out.mkdir(parents=True, exist_ok=True)
    _train(config, files)
    _export(config, files)
    report = _serve(config, files)
    report |= {
        "seconds": time.monotonic() - started, "config": as_json(config), "versions": versions(),
    }  # fmt: skip
    write_json(files.report, report)
    sys.stdout.write(
        f"\n{report_table(report)}\n\nNext:\n"
        f'  echo "I loved it." | python -m serve classify {files.bundle} --task {TASKS[0]}\n'
        f"  python -m serve http {files.bundle}\n  python -m demo {files.bundle}\n"
    )
