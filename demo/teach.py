"""Teaching: from a handful of examples to a task that is served, from several starts.

The prompt is tuned by `trainer.tune`, in a thread; what it measures comes out of an iterator.
"""

from __future__ import annotations

import math
import queue
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from demo.state import Room, check_text
from demo.words import choose_words
from serve.bundle import Arrays
from serve.errors import Failure, UserError, install

if TYPE_CHECKING:
    from trainer.backbone import Backbone
    from trainer.prompt import Prompt
    from trainer.tasks import Task

MOST_LABELS, LEAST_LABELS = 10, 2
MOST_EXAMPLES = 400  # of a lesson; more belong into the trainer's command line
STEPS = 40  # at most; patience may end a run before
ROWS = 16  # a step; half of appendix A.4's 32 reached the same loss in as many steps
# Above appendix A.4's 3e-3: a visitor waits, and more steps would be needed there.
RATE = 1e-2
SEED = 1
MAX_TOKENS = 128  # of an example
LESSON = "teach"  # name of the thread of a lesson
RUNS = ("best", "words", "random")  # the starts of a lesson, in their order


class Cancelled(Exception):
    """The visitor pressed cancel, or left."""


@dataclass(frozen=True)
class Lesson:
    """What a visitor wants to teach, checked.

    Attributes:
        name: of the task; labels: C; texts, classes: N examples with their class, 0..C-1.
    """

    name: str
    labels: list[str]
    texts: list[str]
    classes: list[int]


@dataclass(frozen=True)
class Step:
    """One evaluation of a run.

    Attributes:
        run: one of `RUNS` (the start); step: of the optimizer.
        loss: of the training batch, None before the first step; accuracy: on held-out examples.
    """

    run: str
    step: int
    loss: float | None
    validation_loss: float
    accuracy: float


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    Attributes:
        name: of the prompt in the bundle, or `words`, `random`; among: of how many it is the best.
        params: its tensors, requiring gradients.
    """

    name: str
    among: int
    params: Any

    def arrays(self) -> Arrays:
        """As the classifier takes them."""
        from exporter.record import bundle_arrays

        return bundle_arrays({k: v.detach().cpu().float().numpy() for k, v in self.params.items()})


@dataclass
class Lessons:
    """What a lesson ended with: starts and prompts by run, and the label words chosen; classes:
    of the examples that were held out."""

    starts: dict[str, Start] = field(default_factory=dict)
    prompts: dict[str, Prompt] = field(default_factory=dict)
    words: list[str] = field(default_factory=list)
    classes: list[int] = field(default_factory=list)

    @property
    def held(self) -> int:
        """How many examples were held out."""
        return len(self.classes)

    def winner(self) -> str:
        """The run that ended with the lowest loss on the held-out examples; its prompt is served.

        No start is the best for every lesson: one that judges opinions is a detour to a task that
        asks for something else.
        """
        return min(self.prompts, key=lambda run: self.prompts[run].task.figures["validation_loss"])


def parse_labels(value: str) -> list[str]:
    """Labels separated by commas or lines.

    Raises:
        UserError: fewer than 2, more than 10, one twice, or one too long.
    """
    labels = [part.strip() for part in re.split(r"[,\n]", value) if part.strip()]
    if not LEAST_LABELS <= len(labels) <= MOST_LABELS:
        raise UserError(
            f"Name {LEAST_LABELS} to {MOST_LABELS} labels, separated by commas; these are "
            f"{len(labels)}."
        )
    lower = [label.casefold() for label in labels]
    twice = next((label for label in labels if lower.count(label.casefold()) > 1), None)
    if twice:
        raise UserError(f"The label “{twice}” stands there twice.")
    long = next((label for label in labels if len(label) > 40), None)
    if long:
        raise UserError(f"The label “{long[:40]} …” is longer than 40 characters.")
    return labels


def make_lesson(name: str, labels: Sequence[str], examples: Sequence[Sequence[str]]) -> Lesson:
    """Check a lesson.

    Args:
        examples: one list of texts per label.

    Raises:
        UserError: with the sentence to show.
    """
    name = " ".join(name.split())
    if not name or len(name) > 40:
        raise UserError("Give the task a name of 1 to 40 characters.")
    texts: list[str] = []
    classes: list[int] = []
    for index, (label, group) in enumerate(zip(labels, examples, strict=True)):
        kept = list(dict.fromkeys(text.strip() for text in group if text.strip()))
        if len(kept) < 2:
            raise UserError(
                f"“{label}” has {len(kept)} examples. Give at least 2 different ones: one to "
                "learn from, one to test on."
            )
        texts += kept
        classes += [index] * len(kept)
    for text in texts:
        check_text(text)
    if len(texts) > MOST_EXAMPLES:
        raise UserError(
            f"These are {len(texts)} examples; this page takes {MOST_EXAMPLES}. For more, use "
            "the trainer: python -m trainer tune --data FILE."
        )
    seen: dict[str, int] = {}
    for text, number in zip(texts, classes, strict=True):
        if seen.setdefault(text, number) != number:
            raise UserError(f"“{text[:60]}” is an example of two labels. Remove one of them.")
    return Lesson(name, list(labels), texts, classes)


def split(classes: Sequence[int], seed: int = SEED) -> tuple[list[int], list[int]]:
    """Positions to learn from and to test on: of each class a third, at least one, is held out."""
    generator = np.random.default_rng(seed)
    learn: list[int] = []
    held: list[int] = []
    for number in sorted(set(classes)):
        members = generator.permutation([i for i, c in enumerate(classes) if c == number]).tolist()
        count = max(1, len(members) // 3)
        held += members[:count]
        learn += members[count:]
    return [int(i) for i in generator.permutation(learn)], held


@lru_cache(maxsize=1)
def load_backbone(name: str, sha256: str) -> Backbone:
    """The backbone in torch, loaded at the first lesson and then kept.

    Raises:
        UserError: it is another one than the bundle's. Failure: it cannot be had.
    """
    try:
        from trainer.backbone import load_backbone as load
    except ModuleNotFoundError as error:
        raise UserError(
            f"Teaching needs the trainer ({error.name} is missing): {install('trainer')}."
        ) from None
    backbone = load(name)
    if sha256 and backbone.sha256 != sha256:
        raise UserError(
            f"The backbone “{Path(name).name}” is not the one that this bundle was made with. "
            "Start the demo with --backbone and its folder."
        )
    return backbone


def choose_start(room: Room, backbone: Backbone, task: Task, train: Any) -> Start:
    """Where the first run begins: at the bundle's MetaPT prompt.

    A bundle without one lets all its prompts answer the training examples as they are, and takes
    the one of the lowest loss (after SPoT's retrieval of a source prompt, Vu et al. 2022).
    """
    import torch

    from trainer.modes import deepen
    from trainer.rows import Rows, Scorer

    bundle = room.classifier.bundle
    keys = ("kv", "states") if bundle.mode == "deep" else ("prompt_embeddings",)
    found: dict[str, Any] = {}
    for name, source in room.lesson_starts().items():
        arrays = bundle.read_prompt(source)
        params = {key: torch.from_numpy(arrays[key]).to(backbone.device) for key in keys}
        found[name] = deepen(backbone.t5, params) if bundle.mode == "deep" else params
    if not found:  # a bundle of starting points only
        return plain_start(room, backbone, "words", bundle.prompt_tokens)
    best = next(iter(found))
    if len(found) > 1:
        scorer = Scorer.of(backbone, task, bundle.mode)
        rows = Rows(backbone, task.template, train.texts, train.labels, MAX_TOKENS)
        with torch.no_grad():
            best = min(found, key=lambda name: scorer.score(found[name], rows).loss)
    params = {key: value.detach().clone().requires_grad_() for key, value in found[best].items()}
    return Start(best, len(found), params)


def plain_start(room: Room, backbone: Backbone, kind: str, tokens: int) -> Start:
    """P = `tokens` common `words` of the vocabulary, or `random` numbers."""
    from trainer.initial import initial_params

    mode = room.classifier.bundle.mode
    init = "vocab" if kind == "words" else kind
    return Start(kind, 1, initial_params(backbone, init, mode, tokens, SEED))


def study(
    room: Room, lesson: Lesson, cancel: threading.Event, lessons: Lessons
) -> Iterator[Step | None]:
    """Tune from every start; yields every evaluation, and None each half second without one.

    `lessons.prompts` gains a start's prompt as soon as its run has ended.

    Raises:
        Cancelled: `cancel` was set. UserError, Failure: the trainer's.
    """
    header = room.classifier.bundle.header["backbone"]
    try:
        backbone = load_backbone(room.backbone_name, header.get("sha256") or "")
    except Failure as error:
        raise UserError(f"Teaching needs the backbone, but {error}.") from None
    from trainer.data import Examples
    from trainer.tasks import make_task

    lessons.words = choose_words(backbone, lesson.labels)
    task = make_task(lesson.name, lesson.labels, lessons.words)
    learn, held = split(lesson.classes)
    lessons.classes = [lesson.classes[i] for i in held]
    pool = Examples(lesson.texts, np.array(lesson.classes), tuple(lesson.labels), "the examples")
    for run in RUNS:
        yield from _study_one(
            room, backbone, task, pool.take(learn), pool.take(held), run, cancel, lessons
        )


def _study_one(
    room: Room,
    backbone: Backbone,
    task: Task,
    train: Any,
    validation: Any,
    run: str,
    cancel: threading.Event,
    lessons: Lessons,
) -> Iterator[Step | None]:
    from trainer.configs import TuneConfig
    from trainer.loop import RunOptions
    from trainer.tune import tune

    config = TuneConfig(
        out="", mode=room.classifier.bundle.mode, name=task.name, max_tokens=MAX_TOKENS,
        batch=4, accumulation=ROWS // 4, epochs=math.ceil(STEPS * ROWS / len(train)),
        rate=RATE, seed=SEED,
    )  # fmt: skip
    out: queue.Queue[Step | Exception | None] = queue.Queue()

    def watch(step: int, metrics: dict[str, float]) -> None:
        if cancel.is_set():
            raise Cancelled
        out.put(
            Step(
                run, step, metrics.get("loss"), metrics["validation_loss"],
                metrics["validation_accuracy"],
            )
        )  # fmt: skip

    def work() -> None:
        try:
            if run == "best":
                start = choose_start(room, backbone, task, train)
            else:
                start = plain_start(room, backbone, run, lessons.prompts["best"].tokens)
            lessons.starts[run] = start
            # The run changes its tensors; the start is shown later as it was.
            params = {k: v.detach().clone().requires_grad_() for k, v in start.params.items()}
            options = RunOptions(watch=watch, quiet=True)
            tuned = tune(backbone, task, train, validation, config, options, params=params)
            lessons.prompts[run] = tuned.prompt
            out.put(None)
        except Exception as error:  # it is raised again in the visitor's thread, below
            out.put(error)

    worker = threading.Thread(target=work, name=LESSON, daemon=True)
    worker.start()
    try:
        while True:
            try:
                item = out.get(timeout=0.5)
            except queue.Empty:
                yield None
                continue
            if item is None:
                return
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        # The iterator may be closed early, when the visitor leaves: the thread must not go on.
        if worker.is_alive() and run not in lessons.prompts:
            cancel.set()
        worker.join(timeout=60)


def served(room: Room, prompt: Prompt) -> tuple[dict[str, Any], Arrays]:
    """A tuned prompt as record and arrays for the classifier.

    Raises:
        UserError: its words or length do not fit the bundle.
    """
    from tokenizers import Tokenizer

    from exporter.record import bundle_arrays, task_record

    tokenizer = Tokenizer.from_file(str(room.classifier.bundle.folder / "tokenizer.json"))
    record = task_record(vars(prompt.task), tokenizer, f"The task “{prompt.task.name}”")
    arrays = {name: value.detach().cpu().float().numpy() for name, value in prompt.params.items()}
    return record, bundle_arrays(arrays)


def write_zip(prompt: Prompt, backbone: Backbone | None = None) -> str:
    """The prompt folder (safetensors, task.json, PEFT's configuration) as a zip file."""
    import shutil
    import tempfile

    from trainer.prompt import save_prompt

    safe = re.sub(r"[^a-z0-9-]+", "-", prompt.task.name.lower()).strip("-") or "task"
    folder = Path(tempfile.mkdtemp(prefix="metapt-"))
    save_prompt(prompt, folder / safe, backbone)
    path = shutil.make_archive(str(folder / safe), "zip", folder, safe)
    shutil.rmtree(folder / safe)
    return path
