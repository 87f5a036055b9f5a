"""What visitors share, a classifier, and what each has of their own, the tasks they taught."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from serve.classifier import Classifier
from serve.errors import UserError
from serve.prompt import Arrays
from serve.readout import Result
from serve.task import Task
from serve.tokenize import check_text as check_encodable

log = logging.getLogger(__name__)

MAX_TEXT = (
    5000  # characters of one text; the graph cuts far below, this bounds the tokenizer's work
)
IDLE = 3600.0  # seconds after which a silent visitor's tasks may go
# Methods whose prompts are starting points, not tasks; `start` is a prompt of common words, which
# stands in where MetaPT has found none.
STARTS = ("metapt", "ppt", "start")
_MOST_STARTS = 10  # prompts that a lesson tries: each costs a forward pass over the examples
_FROM = "-from-"  # "film-from-random" is the task "film", tuned from another start


@dataclass(frozen=True)
class Limits:
    """Bounds on what visitors may ask for.

    Attributes:
        rows: of one table.
        megabytes: of one upload.
        tasks: that one visitor may teach; visitors: with taught tasks at a time.
    """

    rows: int = 20_000
    megabytes: float = 5.0
    tasks: int = 5
    visitors: int = 64


@dataclass(frozen=True)
class Answer:
    """Results, the time the server took for them, and the batches that they ran in."""

    results: list[Result]
    milliseconds: float
    batches: int


@dataclass
class Taught:
    """A visitor's task.

    Attributes:
        name: as the visitor wrote it; key: its unique name in the classifier.
        examples: texts that show it in the page.
        variants: further prompts of it by kind (see `Room.variants`), as keys.
    """

    name: str
    key: str
    examples: list[str] = field(default_factory=list)
    variants: dict[str, str] = field(default_factory=dict)


@dataclass
class Visitor:
    """One browser tab or client."""

    tasks: dict[str, Taught] = field(default_factory=dict)
    seen: float = field(default_factory=time.monotonic)
    cancel: threading.Event = field(default_factory=threading.Event)
    here: bool = True


class Room:
    """A classifier and its visitors. Thread-safe.

    A task that a visitor taught lives in the shared classifier under a name that contains a digest
    of the visitor's session, and every look-up by name goes through `key`, which knows only the
    bundle's tasks and the visitor's own.
    """

    def __init__(
        self, classifier: Classifier, limits: Limits | None = None, backbone: str | None = None
    ) -> None:
        self.classifier = classifier
        self.limits = limits or Limits()
        self.backbone_name = backbone or classifier.bundle.header["backbone"].get("id") or ""
        self.bundled = dict(classifier.tasks)
        self._visitors: dict[str, Visitor] = {}
        self._lock = threading.Lock()
        self._variants: dict[str, dict[str, str]] = {}
        self._making: dict[str, threading.Lock] = {}

    # ---- names -------------------------------------------------------------------------------

    def main_tasks(self) -> list[str]:
        """The bundle's tasks without starting points and without second prompts of a task."""
        names = [
            name
            for name, task in self.bundled.items()
            if task.info.get("method") not in STARTS
            and not (_FROM in name and name.split(_FROM)[0] in self.bundled)
        ]
        return names or list(self.bundled)

    def names(self, session: str) -> list[str]:
        """The task names in a visitor's switch: the bundle's, then their own."""
        return [*self.main_tasks(), *self._peek(session)]

    def key(self, session: str, name: str | None) -> str:
        """The classifier's name for a visitor's task.

        Raises:
            UserError: the visitor has no such task.
        """
        own = self._peek(session)
        if name in own:
            return own[name].key
        if name in self.bundled:
            return name
        raise UserError(
            f"There is no task “{name or ''}” here. Choose one of: "
            f"{', '.join(self.names(session))}."
        )

    def task(self, session: str, name: str | None) -> Task:
        """The task itself. Raises: as `key`."""
        return self.classifier.task(self.key(session, name))

    def examples(self, session: str, name: str) -> list[str]:
        """Example texts of a taught task; none for others."""
        own = self._peek(session)
        return own[name].examples if name in own else []

    # ---- answers -----------------------------------------------------------------------------

    def classify(self, session: str, texts: Sequence[str], names: str | Sequence[str]) -> Answer:
        """Classify texts, each by its task's name as the visitor knows it.

        Raises:
            UserError: an unknown task, or a text that is too long.
        """
        for text in texts:
            check_text(text)
        keys: str | list[str]
        if isinstance(names, str):
            keys = self.key(session, names)
        else:
            keys = [self.key(session, name) for name in names]
        return self.classify_keys(texts, keys)

    def classify_keys(self, texts: Sequence[str], keys: str | Sequence[str]) -> Answer:
        """As `classify`, by the classifier's own task names."""
        names = [keys] * len(texts) if isinstance(keys, str) else keys
        tasks = {name: self.classifier.task(name) for name in dict.fromkeys(names)}
        return self.answer(texts, [tasks[name] for name in names])

    def answer(self, texts: Sequence[str], tasks: Sequence[Task]) -> Answer:
        """As `classify`, by the tasks themselves, one for each text.

        Raises:
            UserError: something is not text.
        """
        for position, text in enumerate(texts):
            check_encodable(text, f"text {position}")
        classifier = self.classifier
        started = time.perf_counter()
        rows = classifier.encoder.encode(texts, tasks) if texts else []
        batches, results = len(classifier.batches(rows)), classifier.answer(rows)
        return Answer(results, 1000 * (time.perf_counter() - started), batches)

    # ---- visitors ----------------------------------------------------------------------------

    def visitor(self, session: str) -> Visitor:
        """The visitor of a session, made at the first call."""
        with self._lock:
            now = time.monotonic()
            gone = [s for s, v in self._visitors.items() if now - v.seen > IDLE and s != session]
            stale = [self._visitors.pop(s) for s in gone]
            found = self._visitors.setdefault(session, Visitor())
            found.seen = now
        for visitor in stale:
            self._clear(visitor)
        return found

    def leave(self, session: str) -> None:
        """Forget a visitor: a run under way ends, their tasks go."""
        with self._lock:
            visitor = self._visitors.pop(session, None)
        if visitor is not None:
            visitor.here = False
            visitor.cancel.set()
            self._clear(visitor)

    def check_can_teach(self, session: str, name: str) -> None:
        """Raises: UserError when the visitor, or the server, has too many tasks."""
        own = self._peek(session)
        if name in self.bundled:
            raise UserError(f"The bundle has a task “{name}” already. Choose another name.")
        if name not in own and len(own) >= self.limits.tasks:
            raise UserError(
                f"You have taught {len(own)} tasks, the most this server keeps for one visitor. "
                "Teach one of them again under its name, or reload the page."
            )
        with self._lock:
            others = sum(bool(v.tasks) for s, v in self._visitors.items() if s != session)
        if others >= self.limits.visitors:
            raise UserError("Too many visitors are teaching at the moment. Try again later.")

    def add(
        self,
        session: str,
        name: str,
        record: Mapping[str, Any],
        arrays: Arrays,
        variants: Mapping[str, Arrays] | None = None,
        examples: Sequence[str] = (),
        visitor: Visitor | None = None,
    ) -> Taught:
        """Serve a visitor's task from now on, in place of one of the same name.

        Args:
            record, arrays: as for `Classifier.add_task`.
            variants: prompts of other origin under the same labels, by kind.
            visitor: as `visitor` gave it when the work began, so that one who left meanwhile is
                not taken for a new one.

        Raises:
            UserError: the prompt does not fit the bundle, or the visitor has left.
        """
        visitor = visitor or self.visitor(session)
        owner = hashlib.sha256(session.encode()).hexdigest()[:16]
        place = hashlib.sha256(name.encode()).hexdigest()[:12]
        key = f"visitor.{owner}.{place}"
        taught = Taught(name, key, list(examples))
        self.classifier.add_task(key, record, arrays)
        for kind, other in (variants or {}).items():
            taught.variants[kind] = f"{key}.{kind}"
            self.classifier.add_task(taught.variants[kind], record, other)
        with self._lock:
            staying = visitor.here and self._visitors.get(session) is visitor
            before = visitor.tasks.get(name)
            if staying:
                visitor.tasks = {**visitor.tasks, name: taught}
        if not staying:
            self._drop(taught)
            raise UserError("The visitor has left.")
        if before is not None:  # kinds that this lesson has not
            self._remove(set(before.variants.values()) - set(taught.variants.values()))
        return taught

    def _peek(self, session: str) -> dict[str, Taught]:
        with self._lock:
            visitor = self._visitors.get(session)
            if visitor is None:
                return {}
            visitor.seen = time.monotonic()
            return visitor.tasks

    def _clear(self, visitor: Visitor) -> None:
        for taught in visitor.tasks.values():
            self._drop(taught)

    def _drop(self, taught: Taught) -> None:
        self._remove({taught.key, *taught.variants.values()})

    def _remove(self, keys: Iterable[str]) -> None:
        for key in keys:
            if key in self.classifier.tasks:
                self.classifier.remove_task(key)

    # ---- prompts of other origin -------------------------------------------------------------

    def start(self, method: str) -> Task | None:
        """The bundle's starting point of that method (one of `STARTS`), if it carries one."""
        return next((t for t in self.bundled.values() if t.info.get("method") == method), None)

    def lesson_starts(self) -> dict[str, Task]:
        """The prompts that a lesson may begin with: MetaPT's, or else all tasks' own."""
        metapt = self.start("metapt")
        if metapt is not None:
            return {"metapt": metapt}
        return {name: self.bundled[name] for name in self.main_tasks()[:_MOST_STARTS]}

    def variants(self, session: str, name: str) -> dict[str, str]:
        """The prompts that a task can be read with: kind -> the classifier's task name.

        `tuned` is the task's own; `metapt`, `ppt` and `start` are the untuned starting points
        that the bundle carries; `from-random` and the like are tuned from another start; `random`
        is noise of the spread of the task's own prompt. They share labels and template.
        """
        key = self.key(session, name)
        own = self._peek(session)
        if name in own:
            return {"tuned": key, **own[name].variants}
        with self._lock:
            making = self._making.setdefault(key, threading.Lock())
        with making:  # runs a graph: who asks for another task need not wait
            if key not in self._variants:
                self._variants[key] = self._make_variants(key)
        return self._variants[key]

    def _make_variants(self, key: str) -> dict[str, str]:
        task = self.bundled[key]
        found = {"tuned": key}
        for other in self.bundled:
            if other.startswith(key + _FROM):
                found[other.removeprefix(key + "-")] = other
        prompts: dict[str, Arrays] = {}
        for method in STARTS:
            start = self.start(method)
            if start is not None and start.name != key:
                prompts[method] = self.classifier.bundle.read_prompt(start)
        prompts["random"] = random_like(self.classifier.bundle.read_prompt(task))
        for kind, arrays in prompts.items():
            digest = hashlib.sha256(key.encode()).hexdigest()[:12]
            found[kind] = f"variant.{digest}.{kind}"
            self.classifier.add_task(found[kind], record_of(task), arrays)
        return found

    # ---- sizes -------------------------------------------------------------------------------

    def prompt_bytes(self, task: Task) -> int:
        """Bytes of a task's prompt as numbers of 4 bytes."""
        if task.size_bytes:
            return task.size_bytes
        return sum(array.nbytes for array in (task.arrays or {}).values())

    def backbone_bytes(self) -> int:
        """Bytes of the graph in use with its weights: what all tasks share."""
        bundle, precision = self.classifier.bundle, self.classifier.precision
        graph = Path(bundle.header["precisions"][precision]["graph"]).name
        others = [name for name in bundle.header["precisions"] if name != precision]
        total = 0
        for name, entry in bundle.files.items():
            of_another = any(f".{other}." in name for other in others)
            if name == graph or (name.endswith(".data") and not of_another):
                total += entry["bytes"]
        return total


def record_of(task: Task) -> dict[str, Any]:
    """A task's record as `Classifier.add_task` takes it."""
    keys = (
        "labels", "words", "word_ids", "template", "prefix_ids", "suffix_ids", "temperature",
        "max_tokens",
    )  # fmt: skip
    return {key: getattr(task, key) for key in keys}


def random_like(arrays: Arrays, seed: int = 0) -> dict[str, np.ndarray]:
    """Normal noise of the shapes and spreads of a prompt's arrays."""
    generator = np.random.default_rng(seed)
    return {
        name: generator.normal(0, float(np.std(value)), value.shape).astype(np.float32)
        for name, value in sorted(arrays.items())
    }


def check_text(text: str) -> None:
    """Raises: UserError when a text is longer than the page takes."""
    if len(text) > MAX_TEXT:
        raise UserError(
            f"The text has {len(text):,} characters; this page takes {MAX_TEXT:,}. Shorten it."
        )
