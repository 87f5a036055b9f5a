"""Training on source data: MetaPT over its clusters, PPT over all of it at once."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from serve.errors import UserError
from trainer.backbone import Backbone
from trainer.configs import MetaConfig, PretrainConfig, SourceOptions
from trainer.graphs import OuterGraphs
from trainer.initial import initial_params
from trainer.labels import (
    Classes,
    as_index,
    class_codes,
    class_names,
    find_labels,
    match_classes,
    scale_order,
    tell_words,
)
from trainer.loop import DEFAULT_OPTIONS, Loop, RunOptions, Score, check_rate
from trainer.meta import Outcome, TaskSampler, adapt, outer_losses, task_losses
from trainer.modes import Params, add_group
from trainer.options import checkpoint_folder, result_folder
from trainer.parallel import workers
from trainer.prompt import Prompt, TaskRecord, save_prompt
from trainer.readout import Batch
from trainer.rows import Rows, Scorer
from trainer.runs import METRICS_FILE, RUN_FILE, record
from trainer.tables import iterate_rows
from trainer.tasks import FIVE_WORDS, THREE_WORDS, TWO_WORDS, check_columns
from trainer.tensors import digest
from trainer.tune import epoch_stream, prompt_gradient
from trainer.variants import InnerRates, hold_out_clusters, query_losses, step_size

log = logging.getLogger(__name__)

_ADVICE = "pass the word of each class, in that order, with --words"
_WORDS = {2: TWO_WORDS, 3: THREE_WORDS, 5: FIVE_WORDS}
_EPISODES = 8  # validation episodes a cluster: enough to see a point's difference, quick to run


@dataclass
class SourceData:
    """Clustered, labelled source texts.

    Attributes:
        texts: N; labels, clusters: int [N]; classes: C; names: of the C classes, or none.
    """

    texts: list[str]
    labels: np.ndarray
    clusters: np.ndarray
    classes: int
    names: tuple[str, ...] = ()


def read_source(path: str, *, clustered: bool, flag: str = "--data") -> SourceData:
    """Read what `cluster` (or, for PPT, `label`) wrote, or any file of texts and labels.

    Labels are class names or indices: see `trainer.labels.find_labels`. `flag` is the one that
    named the file.

    Raises:
        UserError: a missing column, a value that is no class or cluster, no rows, or one class.
    """
    columns = ["text", "label", *(["cluster"] if clustered else [])]
    advice = f"run `python -m trainer cluster --data {path}` first, and pass what it writes"
    known = advice if flag == "--data" else None
    placed = list(iterate_rows(path, columns, flag=flag, advice=known))
    if not placed:
        raise UserError(f"{flag} {path} has no rows: run `python -m trainer label` again")
    places = [f"{path}, {place}" for place, _ in placed]
    rows = [row for _, row in placed]
    values = [row["label"] for row in rows]
    called = class_names(path)
    names = called or find_labels(values, places, "label", "label the texts again")
    labels = class_codes(values, places, names, (), indices=called is not None, advice="")
    if len(held := np.unique(labels)) < 2:
        raise UserError(
            f"{flag} {path} holds texts of class '{names[held[0]]}' only: label it with at least "
            "two classes"
        )
    numbers = [as_index(row["cluster"]) if clustered else 0 for row in rows]
    if None in numbers:
        raise UserError(f"{places[numbers.index(None)]}: the cluster is no whole number: {advice}")
    clusters = np.array(numbers, np.int64)
    texts = [row["text"] for row in rows]
    for text, place in zip(texts, places, strict=True):
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{place}: 'text' is {text!r}, no text: correct or remove the row")
    return SourceData(texts, labels, clusters, len(names), tuple(names))


def source_words(words: Sequence[str], data: SourceData, advice: str = _ADVICE) -> list[str]:
    """The label words of the source data: `words`, or those of a scale, lowest first.

    Args:
        words: what the user said they are; empty for the defaults.
        advice: what errors tell the user to do.

    Raises:
        UserError: there is no default for so many classes or such names, or another number of
            words is given.
    """
    found = list(words) or list(_WORDS.get(data.classes, ()))
    if found and not words and data.names and scale_order(data.names) != list(range(data.classes)):
        raise UserError(
            f"the classes are called {', '.join(data.names)}, which is no scale that the label "
            f"words {', '.join(found)} fit: {advice}"
        )
    if len(found) != data.classes:
        raise UserError(
            f"the source data has {data.classes} classes, but there are {len(found)} label words: "
            f"{advice}"
        )
    return found


def in_order(data: SourceData, names: Sequence[str]) -> SourceData:
    """The same rows with their classes in the order of `names`, without case.

    Raises:
        UserError: the classes are called something else.
    """
    found = match_classes(Classes(data.names), Classes(names))
    if found is None or not found.by_name:
        raise UserError(
            f"--labels {' '.join(names)}: the classes of --data are called "
            f"{', '.join(data.names)}: name each of them once, in the order of --words"
        )
    return replace(data, labels=np.array(found.order)[data.labels], names=tuple(names))


def hold_out(data: SourceData, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers of training and validation; every cluster gives its share."""
    generator = np.random.default_rng(seed)
    train, held = [], []
    for cluster in np.unique(data.clusters):
        rows = generator.permutation(np.flatnonzero(data.clusters == cluster))
        count = max(1, round(share * len(rows)))
        held.append(rows[:count])
        train.append(rows[count:])
    return np.concatenate(train), np.concatenate(held)


def _subset(data: SourceData, rows: np.ndarray) -> SourceData:
    texts = [data.texts[i] for i in rows]
    return replace(data, texts=texts, labels=data.labels[rows], clusters=data.clusters[rows])


def _start(config: SourceOptions, backbone: Backbone, flag: str) -> Params:
    check_columns(
        config.template, "cluster or label the texts again with --text-column '{%s}: {text}'"
    )
    params = initial_params(backbone, config.init, config.mode, config.tokens, config.seed)
    check_rate(config.rate, config.steps, params, flag)
    return params


def meta_train(
    backbone: Backbone,
    data: SourceData,
    config: MetaConfig,
    options: RunOptions = DEFAULT_OPTIONS,
) -> Loop:
    """Run MetaPT and return its loop, whose `best` is the prompt.

    Raises:
        UserError: clusters too small for M + M rows, or settings that do not fit.
    """
    if config.held_clusters:
        parts = hold_out_clusters(data.clusters, config.held_clusters, config.seed)
    else:
        parts = hold_out(data, config.validation_share, config.seed)
    train, held = (_subset(data, rows) for rows in parts)
    sampler = TaskSampler(
        train.clusters, train.labels, config.samples,
        balanced=config.balanced, each_step=config.each_step,
    )  # fmt: skip
    if sampler.small:
        raise UserError(
            f"cluster {sampler.small[0]} has fewer than the {2 * config.samples} rows that a task "
            "draws: lower --samples, or make fewer clusters"
        )
    scorer = Scorer(backbone, source_words(config.words, data), config.mode)
    params = _start(config, backbone, options.rate_flag)
    rows, held_rows = (
        Rows(backbone, config.template, part.texts, part.labels, config.max_tokens)
        for part in (train, held)
    )
    episodes = _episodes(held, config.samples, config.seed)
    batches = [
        (held_rows.batch(support), held_rows.batch(query), tasks)
        for support, query, tasks in episodes
    ]
    found = float(config.inner_rate) or _search_rate(scorer, params, batches)
    alpha = workers().of_main(lambda: found)
    rates = InnerRates(params, alpha, learned=config.learn_rates)
    trained = {**params, **rates.trained}
    # Stages take batched gradients, which sums over processes have no rule for.
    whole = workers().shards.count == 1
    stages = scorer.stages() if whole else None
    graphs = OuterGraphs(trained, enabled=whole)

    def gradient(step: int) -> dict[str, float]:
        team = workers()
        mine = team.share(sampler.tasks)
        measured = {"loss": 0.0, "accuracy": 0.0, "before": 0.0}
        if len(mine):
            # [T*M] -> [T, M]: a process takes whole tasks
            support, query = (
                part.reshape(sampler.tasks, -1)[mine].ravel()
                for part in sampler.draw(config.seed, step)
            )
            second = config.order == "second" and step >= config.first_order_steps

            def losses(support: Batch, query: Batch) -> tuple[torch.Tensor, torch.Tensor]:
                return outer_losses(
                    scorer, params, support, query, len(mine),
                    inner_rate=rates.now(), inner_steps=config.inner_steps, stages=stages,
                    second_order=second,
                )  # fmt: skip

            figures = graphs.step(losses, rows.collated(support), rows.collated(query), kind=second)
            outcome = Outcome.of(figures)
            share = len(mine) / sampler.tasks
            measured = {
                "loss": share * outcome.loss,
                "accuracy": share * outcome.accuracy,
                "before": share * outcome.support_loss,
            }
        team.sum_gradients(trained)
        return team.sum_values(measured)

    def evaluate() -> Score:
        """Query loss and accuracy after adaptation, on episodes of held-out rows."""
        losses, hits, count, moved = 0.0, 0, 0, 0.0
        for support, query, tasks in batches:
            copies, _ = adapt(
                scorer, add_group(params, tasks), support,
                inner_rate=rates.now(), inner_steps=config.inner_steps, second_order=False,
            )  # fmt: skip
            with torch.no_grad():
                scores = scorer(copies, query)
                assert query.labels is not None
                losses += float(task_losses(scores, query.labels, tasks).sum())
                hits += int((scores.argmax(-1) == query.labels).sum())
            moved += step_size(params, copies) / len(batches)
            count += tasks
        more = {"inner_rate": alpha, "inner_step": moved}
        return Score(hits / (count * config.samples), losses / count, more)

    loop = Loop(trained, gradient, evaluate, config.schedule(), options, "meta")
    loop.run()
    loop.best = {name: value for name, value in loop.best.items() if name in params}
    return loop


def _search_rate(scorer: Scorer, params: Params, batches: list[tuple[Batch, Batch, int]]) -> float:
    found = query_losses(scorer, params, batches[: _EPISODES // 2])
    best = min(found, key=lambda rate: found[rate])
    log.info(
        "inner rate %g: query loss after one inner step %s", best,
        ", ".join(f"{loss:.3f} at {rate:g}" for rate, loss in found.items()),
    )  # fmt: skip
    return best


def _episodes(
    held: SourceData, samples: int, seed: int
) -> list[tuple[np.ndarray, np.ndarray, int]]:
    """Fixed validation episodes; clusters whose held-out rows do not fill one are left out."""
    counts = {name: int((held.clusters == name).sum()) for name in np.unique(held.clusters)}
    large = [name for name, count in counts.items() if count >= 2 * samples]
    if not large:
        raise UserError(
            f"no cluster keeps {2 * samples} rows for validation: pass more data or fewer "
            "--samples, make fewer clusters, or give `meta` a larger --validation-share"
        )
    rows = np.flatnonzero(np.isin(held.clusters, large))
    sampler = TaskSampler(held.clusters[rows], held.labels[rows], samples)
    draws = (sampler.draw(seed, number) for number in range(_EPISODES))
    return [(rows[support], rows[query], sampler.tasks) for support, query in draws]


def pretrain(
    backbone: Backbone,
    data: SourceData,
    config: PretrainConfig,
    options: RunOptions = DEFAULT_OPTIONS,
) -> Loop:
    """Run PPT and return its loop, whose `best` is the prompt."""
    train, held = (
        _subset(data, rows) for rows in hold_out(data, config.validation_share, config.seed)
    )
    scorer = Scorer(backbone, source_words(config.words, data), config.mode)
    params = _start(config, backbone, options.rate_flag)
    rows = Rows(backbone, config.template, train.texts, train.labels, config.max_tokens)
    most = _EPISODES * config.batch  # as many rows as MetaPT's validation episodes hold
    chosen = np.random.default_rng(config.seed).permutation(len(held.texts))[:most]
    held = _subset(held, chosen)
    held_rows = Rows(backbone, config.template, held.texts, held.labels, config.max_tokens)

    def gradient(step: int) -> dict[str, float]:
        indices = epoch_stream(len(rows), config.batch, config.seed, step)
        return prompt_gradient(scorer, params, rows, indices)

    schedule = config.schedule()
    loop = Loop(
        params, gradient, lambda: scorer.score(params, held_rows), schedule, options, "pretrain"
    )
    loop.run()
    return loop


def source_prompt(loop: Loop, config: SourceOptions, words: list[str], method: str) -> Prompt:
    """The prompt of a finished loop; its labels are its label words."""
    best = loop.state.best
    assert best is not None
    task = TaskRecord(
        name=method,
        labels=list(words),
        words=list(words),
        template=config.template,
        mode=config.mode,
        max_tokens=config.max_tokens,
        method=method,
        seed=config.seed,
        figures={
            "validation_accuracy": best.accuracy,
            "validation_loss": best.loss,
            "steps": loop.state.step,
            "best_step": loop.state.best_step,
        },
    )
    return Prompt(loop.best, task)


def _run(config: SourceOptions, command: str, train: Callable[..., Loop]) -> None:
    out = result_folder(config.out)
    data = read_source(config.data, clustered=command == "meta")
    if config.labels:
        data = in_order(data, config.labels)
    words = source_words(config.words, data)
    if config.words and not config.labels:
        tell_words(data.names, words)
    backbone = config.load_backbone()
    rows = digest(data.texts, data.labels, data.clusters)
    run = record(command, config, backbone_sha256=backbone.sha256, data_sha256=rows)
    loop = train(backbone, data, config, RunOptions(checkpoint_folder(out), run))
    if not workers().main:
        return
    prompt = source_prompt(loop, config, words, "metapt" if command == "meta" else "ppt")
    extras = {METRICS_FILE: loop.metrics_text(), RUN_FILE: json.dumps(run, indent=2) + "\n"}
    save_prompt(prompt, out, backbone, extras)
    loop.clean_up()
    log.info(
        "validation accuracy %.3f, loss %.3f (best at step %d of %d); prompt in %s",
        prompt.task.figures["validation_accuracy"], prompt.task.figures["validation_loss"],
        loop.state.best_step, loop.state.step, out,
    )  # fmt: skip


def run_meta(config: MetaConfig) -> None:
    """`python -m trainer meta`."""
    _run(config, "meta", meta_train)


def run_pretrain(config: PretrainConfig) -> None:
    """`python -m trainer pretrain`."""
    _run(config, "pretrain", pretrain)
