"""Which runs a table or a figure is made of.

A run's settings hold everything that its result depends on (backbone, data and source by their
hashes, rates, seeds, the start it tunes from) and nothing that it does not (paths, device, jobs).
Two tables that need the same run share it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from serve.errors import UserError
from trainer.configs import BEST_BY, SourceOptions
from trainer.modes import steer
from trainer.reproduce.config import CLUSTERINGS, EXTRA_METHODS, METHODS, ReproduceConfig
from trainer.reproduce.limits import (
    SAMPLES,
    Facts,
    check_clusters,
    check_samples,
    drawn,
    source_rows,
)
from trainer.reproduce.store import Settings
from trainer.tasks import PAPER_TASKS, Task, check_columns, get_task

ROW_NAMES = {
    "ft": "FT", "pt": "PT (random start)", "ppt": "PPT", "metapt": "MetaPT",
    "metapt-y": "MetaPT(Y)", "setfit": "SetFit (all-MiniLM-L6-v2)",
    "words": "template alone", "pt-vocab": "PT (words of the vocabulary)",
    "metapt-ppt": "MetaPT from PPT's prompt",
}  # fmt: skip
CLUSTER_NAMES = {"kmeans": "K-means", "lda": "LDA", "random": "random", "label": "label"}

_NO_PROMPT = ("ft", "setfit", "words")
UNTRAINED = {"pt": "random", "pt-vocab": "vocab"}  # starts that no source is needed for
SOURCE_SIZES = (1000, 2000, 5000, 10_000, 20_000, 50_000)  # figure 3a; cut to what there is
CLUSTER_COUNTS = (3, 6, 10, 15, 20, 25, 30)  # figure 3b
TSNE_COUNTS = (3, 6, 10)  # figure 4


@dataclass(frozen=True)
class Run:
    """One cell of a table or one point of a curve.

    Attributes:
        row: the row's or curve's name; mode: attention mode, "" where there is no prompt.
        task, seed: of the downstream set; x: the figure's abscissa, 0 in a table.
        settings: what its result depends on.
    """

    row: str
    mode: str
    task: str
    seed: int
    x: int
    settings: Settings

    @property
    def start(self) -> Settings | None:
        """The settings of the start that must be trained before, if one must."""
        start = self.settings.get("start")
        return start if start and start["method"] not in UNTRAINED.values() else None


# In `Facts.sources` of a source that is not built yet: nothing of it is done, and it may turn out
# to have all the sizes of figure 3a.
UNBUILT: dict[str, Any] = {"sha": "", "rows": SOURCE_SIZES[-1], "clustered": False}


def tasks_of(config: ReproduceConfig) -> list[str]:
    """The downstream tasks: what --tasks says, else those of the paper's table or figure."""
    names = config.tasks or (list(PAPER_TASKS) if config.what == "table1" else ["sst5"])
    for name in names:
        get_task(name, "--tasks")
    return names


def methods_of(config: ReproduceConfig) -> list[str]:
    """The rows: what --methods says, else those of the paper's table or figure.

    Raises:
        UserError: an unknown method, or one that this table has no row for.
    """
    allowed = {
        "table1": METHODS, "table2": (*CLUSTERINGS, "ppt"),
        "figure2": METHODS, "figure3a": ("ppt", "metapt"), "figure3b": ("metapt",),
        "figure4": (),
    }[config.what]  # fmt: skip
    standard = {"figure2": ("ft", "ppt", "metapt")}.get(config.what, allowed)
    extra = EXTRA_METHODS if config.what == "table1" else ()
    for name in config.methods:
        if name not in (*allowed, *extra):
            known = ", ".join((*allowed, *extra)) or "no methods"
            raise UserError(f"--methods {name}: {config.what} has {known}")
    return list(config.methods or standard)


def sources_needed(config: ReproduceConfig) -> list[str]:
    """Names of the sources that the rows train on."""
    methods = methods_of(config)
    without = {*_NO_PROMPT, *UNTRAINED, "metapt-y"}
    needed = [] if set(methods) <= without else ["text"]
    if config.what == "figure4":
        needed = ["text"]
    return needed + (["yelp"] if "metapt-y" in methods else [])


def scale(words: Sequence[str], classes: int) -> tuple[str, ...]:
    """The words that so many classes take of five, from the worst to the best.

    Raises:
        UserError: they are not five, or so many classes are no scale of opinion.
    """
    places = {2: (0, 4), 3: (0, 2, 4), 5: range(5)}.get(classes)
    if len(words) != 5 or places is None:
        raise UserError(
            f"--words {' '.join(words)}: five words from the worst to the best are needed, of "
            f"which tasks of two, three or five classes (not {classes}) take theirs"
        )
    return tuple(words[place] for place in places)


def asked(task: Task, question: Mapping[str, Any]) -> Task:
    """The task with another template or other label words, as `question` has them.

    Raises:
        UserError: the template has no place for the text or the answer; see `scale`.
    """
    changes = dict(question)
    if "words" in changes:
        changes["words"] = scale(changes["words"], task.classes)
    return replace(task, **changes)


def _question(config: ReproduceConfig) -> Settings:
    """What --template and --words say: named in settings only where they are given."""
    values = {"template": config.template, "words": list(config.words)}
    question = {name: value for name, value in values.items() if value}
    return {"question": question} if question else {}


def _check_question(config: ReproduceConfig) -> None:
    """Raises: UserError as for `asked`, or where the template names a column."""
    if config.template:
        check_columns(config.template, "a task's own columns are read by themselves")
    for name in tasks_of(config):
        asked(get_task(name), _question(config).get("question", {}))


def _source(config: ReproduceConfig, facts: Facts, name: str, **changes: Any) -> dict[str, Any]:
    found = facts.sources[name]
    grouping = "given" if found["clustered"] else "kmeans"
    settings = {
        "sha": found["sha"], "rows": config.source_rows, "grouping": grouping,
        "clusters": config.clusters, **changes,
    }  # fmt: skip
    if settings["rows"] >= found["rows"]:
        settings["rows"] = 0  # all there are, however it is said
    if settings["grouping"] in ("given", "label"):
        settings["clusters"] = 0  # the file, or the number of classes, says how many
    if settings["grouping"] == "kmeans":
        settings["encoder"] = facts.encoder  # whose embeddings are grouped
    return settings


def _start(
    config: ReproduceConfig, facts: Facts, method: str, mode: str, source: dict[str, Any]
) -> Settings:
    common = {
        "kind": "start", "method": method, "mode": mode, "backbone": facts.backbone,
        "prompt_tokens": config.prompt_tokens, "max_tokens": config.max_tokens,
        "init": config.start, "evaluate_every": config.meta_evaluate_every,
        "patience": config.meta_patience, "best_by": BEST_BY, **_question(config),
    }  # fmt: skip
    # What the paper does not have is named only where it is used.
    if config.outer_decay:
        common["decay"] = True
    if config.outer_clip:
        common["clip"] = config.outer_clip
    if config.start_seed != SourceOptions.seed:
        common["seed"] = config.start_seed
    if method == "ppt":
        # Groups mean nothing to PPT: one run serves whatever they are.
        source = {"sha": source["sha"], "rows": source["rows"], "grouping": "none", "clusters": 0}
        return {
            **common, "source": source, "steps": config.ppt_steps or config.meta_steps,
            "rate": config.ppt_rate, "batch": config.ppt_batch,
        }  # fmt: skip
    names = ("learn_rates", "first_order_steps", "each_step", "held_clusters")
    more = {name: getattr(config, name) for name in names if getattr(config, name)}
    if method == "metapt-ppt":
        # Where a start goes on from another start, that one's settings stand in place of a name.
        common["init"] = _start(config, facts, "ppt", mode, source)
    return {
        **common, "method": "metapt", "source": source, "steps": config.meta_steps,
        "rate": config.outer_rate,
        "inner_rate": config.inner_rate, "inner_steps": config.inner_steps,
        "samples": config.samples, "balanced": config.balanced, "more": more,
    }  # fmt: skip


def _cell(
    config: ReproduceConfig, facts: Facts, method: str, mode: str, task: str, seed: int,
    start: Settings | None, train: int,
) -> Settings:  # fmt: skip
    settings: Settings = {
        "kind": "cell", "method": method, "task": task, "data": facts.data[task].digest,
        "limit_eval": config.limit_eval if config.limit_eval < facts.data[task].test else 0,
    }  # fmt: skip
    if method == "setfit":
        return {**settings, "seed": seed, "train": train, "encoder": facts.encoder}
    settings |= _question(config)
    if method == "words":  # neither samples nor a seed: one run for all
        return {**settings, "backbone": facts.backbone, "max_tokens": config.max_tokens}
    settings |= {
        "seed": seed, "train": train,
        "validation": config.validation, "backbone": facts.backbone,
        "max_tokens": config.max_tokens, "epochs": config.epochs, "patience": config.patience,
        "rate": config.ft_rate if method == "ft" else config.rate,
    }  # fmt: skip
    if method == "tune":
        settings |= {"mode": mode, "prompt_tokens": config.prompt_tokens, "start": start}
    return settings


def _variants(
    config: ReproduceConfig, facts: Facts
) -> list[tuple[str, str, int, dict[str, Any] | None]]:
    """(row, method, x, source) of a table or figure, before modes, tasks and seeds."""
    methods, what = methods_of(config), config.what
    yelp = {"metapt-y": "yelp"}
    if what in ("table1", "figure2"):
        sizes = [0] if what == "table1" else config.sizes or list(SAMPLES)
        return [
            (
                ROW_NAMES[method], method, x,
                _source(config, facts, yelp.get(method, "text"))
                if method in ("ppt", "metapt", "metapt-y", "metapt-ppt") else None,
            )
            for method in methods for x in sizes
        ]  # fmt: skip
    if what == "table2":
        rows: list[tuple[str, str, int, dict[str, Any] | None]] = []
        for name in methods:
            if name == "ppt":
                rows.append(("PPT", "ppt", 0, _source(config, facts, "text")))
            else:
                source = _source(
                    config, facts, "text", grouping=name,
                    clusters=0 if name == "label" else config.clusters,
                )  # fmt: skip
                rows.append((f"MetaPT, {CLUSTER_NAMES[name]}", "metapt", 0, source))
        return rows
    if what == "figure3a":
        have = source_rows(config, facts)
        sizes = config.sizes or [*(size for size in SOURCE_SIZES if size < have), have]
        if facts.sources["text"]["sha"] and max(sizes) > have:
            of = " that may be used" if config.source_rows else ""
            raise UserError(f"--sizes {max(sizes)}: the source has {have} rows{of}")
        return [
            (
                ROW_NAMES[method], method, size,
                _source(
                    config, facts, "text", grouping="kmeans", clusters=config.clusters,
                    rows=size,
                ),
            )
            for method in methods for size in sizes
        ]  # fmt: skip
    return [
        ("MetaPT", "metapt", k, _source(config, facts, "text", grouping="kmeans", clusters=k))
        for k in config.sizes or [k for k in CLUSTER_COUNTS if k <= source_rows(config, facts)]
    ]


def make_plan(config: ReproduceConfig, facts: Facts) -> list[Run]:
    """All runs of `config.what`, in the order of the table (figure 4 has none).

    Raises:
        UserError: settings that do not go together, or more rows than there are.
    """
    for mode in config.modes:
        steer(mode)
    if config.what == "figure4":
        return []
    _check_question(config)
    check_samples(config, facts, methods_of(config))
    runs = []
    for row, method, x, source in _variants(config, facts):
        train = x if config.what == "figure2" else config.train
        if source is not None and method != "ppt":  # which is not grouped
            check_clusters(config, facts, source)
        for mode in config.modes if method not in _NO_PROMPT else [""]:
            start: Settings | None = None
            if method in UNTRAINED:
                start = {"method": UNTRAINED[method]}
            elif source is not None:
                kind = "metapt" if method == "metapt-y" else method
                start = _start(config, facts, kind, mode, source)
            way = method if method in _NO_PROMPT else "tune"
            runs += [
                Run(row, mode, task, seed, x,
                    _cell(config, facts, way, mode, task, seed, start, train))
                for task in tasks_of(config) for seed in config.seeds
                if config.what != "figure2" or drawn(config, method, x) <= facts.data[task].pool
            ]  # fmt: skip
    return runs
