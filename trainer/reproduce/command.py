"""The command: what is left is run, and what there is, is written."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from serve.cli import as_json
from serve.errors import Failure, UserError
from serve.files import atomic_write, write_json
from trainer.backbone import backbone_folder, backbone_mark
from trainer.cluster import assign
from trainer.data import Examples
from trainer.options import output_folder
from trainer.reproduce import plots, setfit_row
from trainer.reproduce.config import ReproduceConfig
from trainer.reproduce.plan import (
    TSNE_COUNTS,
    UNBUILT,
    Facts,
    Run,
    make_plan,
    methods_of,
    sources_needed,
    tasks_of,
)  # fmt: skip
from trainer.reproduce.pool import Job, devices, run_jobs
from trainer.reproduce.report import X_NAMES, Done, as_csv, comparisons, make_grid, markdown
from trainer.reproduce.sources import (
    SOURCE_FLAGS,
    balanced_rows,
    describe_source,
    describe_task,
    embeddings,
    encoder_mark,
    source_files,
)  # fmt: skip
from trainer.reproduce.store import Settings, Store, settings_hash
from trainer.reproduce.work import Surroundings
from trainer.runs import versions
from trainer.source import read_source

log = logging.getLogger(__name__)

TITLES = {
    "table1": "Table 1: few-shot accuracy by method",
    "table2": "Table 2: how the source texts are grouped",
    "figure2": "Figure 2: accuracy by the number of samples",
    "figure3a": "Figure 3a: accuracy by the size of the source",
    "figure3b": "Figure 3b: accuracy by the number of clusters",
    "figure4": "Figure 4: the clusters, by t-SNE",
}


def run_reproduce(config: ReproduceConfig) -> None:
    """`python -m trainer reproduce`."""
    out = output_folder(config.out)
    if "setfit" in methods_of(config) and not config.plan:
        setfit_row.check_setfit()
    devices(config.device)  # which is refused before a source is built for hours
    names = sources_needed(config)
    files = source_files(config, names, build=not config.plan)
    for name in [name for name in names if name not in files]:
        sys.stdout.write(f"source {name}: not built yet; `label` makes it first\n")
    if config.what == "figure4":
        if config.plan:
            counts = ", ".join(map(str, tsne_counts(config)))
            sys.stdout.write(f"figure4: one t-SNE, k = {counts}; nothing is run\n")
        else:
            _figure4(config, out, files["text"])
        return
    facts = Facts(
        backbone_mark(backbone_folder(config.backbone)),
        {task: describe_task(task, config.data_dir) for task in tasks_of(config)},
        {
            name: describe_source(files[name], SOURCE_FLAGS[name]) if name in files else UNBUILT
            for name in names
        },
        encoder_mark(config.encoder),
    )
    plan, store = make_plan(config, facts), Store(out)
    jobs = missing_jobs(plan, store)
    starts = sum(job.settings["kind"] == "start" for job in jobs)
    unique = len({settings_hash(run.settings) for run in plan})
    left = len(jobs) - starts
    sys.stdout.write(
        f"{config.what}: {unique} runs, {unique - left} done, {left} left; {starts} starts to "
        "train first\n"
    )
    failures: list[str] = []
    if jobs and config.plan:
        _show(plan, store)
    elif jobs:
        _warm_embeddings(jobs, facts, files, config)
        where = Surroundings(
            str(out), config.backbone, config.device, config.data_dir,
            {facts.sources[name]["sha"]: str(path) for name, path in files.items()},
            config.encoder, quiet=config.jobs > 1,
        )  # fmt: skip
        failures = _run(jobs, where, config)
    _write(config, plan, store, out)
    if failures:
        raise Failure(f"{len(failures)} of {len(jobs)} runs failed, the first with: {failures[0]}")


def missing_jobs(plan: list[Run], store: Store) -> list[Job]:
    """What is left of a plan, each run once, starts first."""
    starts: dict[str, Job] = {}
    cells: dict[str, Job] = {}

    def need(start: Settings) -> str:
        name, first = settings_hash(start), start["init"]
        if not store.has_start(start):
            starts.setdefault(name, Job(start, need(first) if isinstance(first, dict) else None))
        return name

    for run in plan:
        if store.load(run.settings) is None:
            after = None if run.start is None else need(run.start)
            cells.setdefault(settings_hash(run.settings), Job(run.settings, after))
    # A start is entered before the one that it goes on from; that one must be run before it.
    ordered = sorted(starts.values(), key=lambda job: job.after is not None)
    return [*ordered, *cells.values()]


def _show(plan: list[Run], store: Store) -> None:
    """List what is left, a line for each row, mode and task."""
    left: dict[tuple[str, str, str], list[str]] = {}
    for run in plan:
        if store.load(run.settings) is None:
            mark = f"{run.seed}" if not run.x else f"{run.seed} at {run.x}"
            left.setdefault((run.row, run.mode or "-", run.task), []).append(mark)
    for (row, mode, task), seeds in left.items():
        sys.stdout.write(f"  left: {row:26} {mode:7} {task:20} seeds {', '.join(seeds)}\n")


def _warm_embeddings(
    jobs: list[Job], facts: Facts, files: dict[str, Path], config: ReproduceConfig
) -> None:
    """Embed what K-means will need, once, before several processes would each do it."""
    wanted = {
        job.settings["source"]["sha"]
        for job in jobs
        if job.settings["kind"] == "start" and job.settings["source"]["grouping"] == "kmeans"
    }
    for name, path in files.items():
        if facts.sources[name]["sha"] in wanted:
            embeddings(str(path), config.encoder)


def _run(jobs: list[Job], where: Surroundings, config: ReproduceConfig) -> list[str]:
    failures: list[str] = []
    with tqdm(total=len(jobs), desc=config.what, unit="run", disable=None) as bar:

        def done(settings: Settings, message: str | None) -> None:
            if message:
                failures.append(message)
                log.warning("%s: %s", _name(settings), message)
            bar.set_postfix_str(_name(settings), refresh=False)
            bar.update()

        run_jobs(jobs, where, count=config.jobs, threads=config.threads, done=done)
    return failures


def _name(settings: Settings) -> str:
    if settings["kind"] == "start":
        return f"start {settings['method']} [{settings['mode']}]"
    start = settings.get("start")
    method = start["method"] if start else settings["method"]
    return f"{method} {settings['task']} seed {settings.get('seed', '-')}"


def finished(plan: list[Run], store: Store) -> list[Done]:
    """The runs of a plan that are done."""
    found = []
    for run in plan:
        record = store.load(run.settings)
        if record is not None:
            found.append(Done(run, 100 * record["result"]["accuracy"], record))
    return found


def _write(config: ReproduceConfig, plan: list[Run], store: Store, out: Path) -> None:
    done = finished(plan, store)
    what, title = config.what, TITLES[config.what]
    grid = make_grid(what, plan, done, config.modes)
    rows = "all test rows" if not config.limit_eval else f"{config.limit_eval} test rows at most"
    notes = [
        f"backbone {config.backbone}, {config.prompt_tokens} prompt tokens, modes "
        f"{', '.join(config.modes)}",
        f"{'N' if what == 'figure2' else config.train} + {config.validation} samples, seeds "
        f"{', '.join(map(str, config.seeds))}, {rows}",
        f"MetaPT: {config.meta_steps} outer steps at most, alpha {config.inner_rate:g}, beta "
        f"{config.outer_rate:g}; PPT: {config.ppt_steps or config.meta_steps} steps at most of "
        f"{config.ppt_batch} rows, rate {config.ppt_rate:g}",
        f"downstream rate {config.rate:g}, {config.epochs} epochs at most",
        *_beyond(config),
        f"{len(done)} of {len(plan)} runs done",
    ]
    text = markdown(grid, f"{title} ({config.backbone})", notes)
    _write_text(out / f"{what}.md", text)
    _write_text(out / f"{what}.csv", as_csv(done))
    write_json(
        out / f"{what}.json",
        {
            "config": as_json(config),
            "versions": versions(),
            "comparisons": [comparison.as_json() for comparison in comparisons(grid)],
            "runs": [
                {
                    "row": item.run.row, "mode": item.run.mode, "task": item.run.task,
                    "seed": item.run.seed, "x": item.run.x, **item.record,
                }
                for item in done
            ],
        },
    )  # fmt: skip
    if done:
        if what in X_NAMES:
            plots.plot_lines(what, done, config.modes, title, out / what)
        else:
            plots.plot_bars(grid, title, out / what)
    sys.stdout.write(text + f"\n{out / what}.md, .csv, .json, .png, .svg\n")


def _beyond(config: ReproduceConfig) -> list[str]:
    """A note on what is on that the paper does not have."""
    names = ("learn_rates", "first_order_steps", "each_step", "held_clusters", "balanced",
             "outer_decay", "outer_clip", "template", "words")  # fmt: skip
    on = [f"{name.replace('_', ' ')}: {getattr(config, name)}" for name in names]
    used = [text for text, name in zip(on, names, strict=True) if getattr(config, name)]
    used += [] if config.inner_rate else ["alpha by search"]
    first = ReproduceConfig.start_seed
    used += [] if config.start_seed == first else [f"start seed: {config.start_seed}"]
    return [f"beyond the paper: {', '.join(used)}"] if used else []


def _write_text(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, "utf-8")


def tsne_counts(config: ReproduceConfig) -> list[int]:
    """The numbers of clusters that figure 4 shows."""
    return config.sizes or list(TSNE_COUNTS)


def _figure4(config: ReproduceConfig, out: Path, path: Path) -> None:
    """t-SNE of the source's embeddings, coloured by K-means for each number of clusters."""
    data = read_source(str(path), clustered=False)
    rows = balanced_rows(data.labels, config.source_rows)
    vectors = embeddings(str(path), config.encoder)[rows]
    texts = [data.texts[i] for i in rows]
    examples = Examples(texts, data.labels[rows], tuple(map(str, range(data.classes))))
    counts = tsne_counts(config)
    if max(counts) > len(texts):
        raise UserError(f"--sizes {max(counts)} clusters of {len(texts)} texts: pass fewer")
    clusters = {k: assign(examples, "kmeans", k, 1, vectors) for k in counts}
    # Groups are made of all texts, and shown on a part of them.
    shown = balanced_rows(examples.labels, plots.TSNE_TEXTS)
    points = plots.tsne(vectors[shown])
    stem = out / "figure4"
    part = {k: labels[shown] for k, labels in clusters.items()}
    plots.plot_clusters(points, part, TITLES["figure4"], stem)
    sizes: dict[str, Any] = {str(k): np.bincount(v).tolist() for k, v in clusters.items()}
    lines = ["x,y,label," + ",".join(f"k{k}" for k in counts)]
    for index, row in enumerate(shown):
        groups = ",".join(str(clusters[k][row]) for k in counts)
        lines.append(
            f"{points[index, 0]:.4f},{points[index, 1]:.4f},{examples.labels[row]},{groups}"
        )
    _write_text(stem.with_suffix(".csv"), "\n".join(lines) + "\n")
    table = "| k | texts of each cluster |\n|---|---|\n" + "".join(
        f"| {k} | {', '.join(map(str, sizes[str(k)]))} |\n" for k in counts
    )
    _write_text(stem.with_suffix(".md"), f"# {TITLES['figure4']}\n\n{table}")
    write_json(
        stem.with_suffix(".json"),
        {"config": as_json(config), "versions": versions(), "texts": len(texts), "sizes": sizes},
    )
    sys.stdout.write(table + json.dumps({"shown": len(shown)}) + f"\n{stem}.png, .svg, .csv\n")
