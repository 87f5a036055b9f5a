"""Classifying texts with a bundle: tokenize, run, read out.

    classifier = Classifier("bundle")
    classifier.classify(["Great!", "Awful."], task="film")

One batch may hold rows of any tasks. Notation: B rows, N slots of the bank, P prompt tokens,
D model width, L layers, H heads, K width of a head, C classes, S tokens.
"""

from __future__ import annotations

import hashlib
import logging
import math
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from serve import bundle as bundles
from serve.bank import Bank, key_of
from serve.constants import Constants
from serve.engine import CUDA, Engine, choose_providers, on_device, physical_cores, share_cores
from serve.errors import Failure, UserError
from serve.plan import BatchLimits, in_groups, plan
from serve.prompt import Arrays, check_prompt
from serve.readout import Result, read_out
from serve.task import Task, make_task, which
from serve.tokenize import Encoded, Encoder, check_text

log = logging.getLogger(__name__)

MIB = 2**20
# Attention scores, in bytes. Beyond the first a CPU is slower in one batch than in two
# (docs/speed.md); a batch beyond the second, one long row then, gives its memory back.
_CACHED, _LARGE = 6 * MIB, 16 * MIB
_TOGETHER = 16  # tasks whose constants are computed before the bank is renewed on a GPU
# What a run costs besides its tokens, in tokens: on a CPU for each thread; on a GPU for starting
# some hundreds of kernels, whatever the number of threads (3 ms of an H200, docs/speed.md).
_RUN_COST, _RUN_COST_CUDA = 16, 1400
# Tokens and rows of a batch, where nobody says: a GPU is twice as fast with more than a CPU wants.
DEFAULT_BATCH = {"cpu": (2048, 32), "cuda": (16384, 256)}
_TEXT_INPUTS = ("input_ids", "attention_mask", "task_id")


class Classifier:
    """A bundle at work. Thread-safe: threads share the session and the bank.

    Attributes:
        tasks: by name; what `classify` takes. Do not change it, use `add_task` and `remove_task`.
        bundle: as it was at start.
        encoder: texts to ids (the first of the three stages).
        bank: the constants of the tasks in use.
        threads, workers: of a batch; batches that may run at the same time.
        limits: of a batch.
    """

    def __init__(
        self,
        bundle: str | Path,
        precision: str = "fp32",
        *,
        threads: int | None = None,
        workers: int | None = 1,
        providers: Sequence[str] | None = None,
        token_budget: int | None = None,
        max_rows: int | None = None,
        max_tokens: int | None = None,
        bank_memory: int = 512 * MIB,
        spin: bool = True,
        verify: bool = True,
    ) -> None:
        """Args:
            bundle: its folder.
            precision: one of the bundle's.
            threads: for the products of one batch; default: the physical cores over the workers.
            workers: batches that `classify` runs side by side, each on its threads. One answers a
                single text soonest; as many as there are cores classify most texts a second. None:
                what fills the cores (at most 8; one on a GPU).
            providers: of onnxruntime; default: CUDA where it is there, otherwise the CPU.
            token_budget: padded tokens of a batch, B x S; more gain nothing once the cores are
                busy, and cost memory. Default: 2,048, on a GPU 16,384.
            max_rows: rows of a batch; each takes a copy of its task's keys and values in a layer.
                Default: 32, on a GPU 256.
            max_tokens: longest row with its template, at most the bundle's; longer texts are cut,
                and those of a task at its own `max_tokens`.
            bank_memory: bytes that task constants may take (twice that while the bank grows).
            spin: see `Engine`.
            verify: hash every file of the bundle first.

        Raises:
            UserError: no such bundle, precision or provider, or a value out of range.
            Failure: a damaged bundle, named by file, or a provider that does not start.
        """
        self.bundle = bundles.load(bundle, verify=verify)
        header = self.bundle.header
        limit = header["max_tokens"]
        if max_tokens is not None and not 1 <= max_tokens <= limit:
            raise UserError(f"--max-tokens must be within 1 and {limit}, the bundle's own")
        given = [n for n in (token_budget, max_rows, threads, workers) if n is not None]
        if given and min(given) < 1:
            raise UserError(
                "--token-budget, --max-rows, --threads and --workers must be at least 1"
            )
        self.precision = precision
        self._providers = choose_providers(providers)
        if workers is None and CUDA in self._providers:
            workers = 1
        self.threads, self.workers = share_cores(threads, workers, physical_cores())
        self._pool = ThreadPoolExecutor(self.workers, thread_name_prefix="classify")
        graph = self.bundle.graph(precision)
        self._grouped = bool(header.get("grouped"))  # bundles of before have a slot for each row
        self._engine = Engine(
            graph, threads=self.threads, providers=self._providers, spin=spin,
            fallback=providers is None,
        )  # fmt: skip
        log.info(
            "%s: %s on %s, %s, %d tasks", self.bundle.folder, precision, self._engine.device,
            f"{self.threads} threads" if self.workers == 1
            else f"{self.workers} batches at a time of {self.threads} threads each",
            len(self.bundle.tasks),
        )  # fmt: skip
        self.encoder = Encoder(self.bundle.folder / "tokenizer.json", max_tokens or limit)
        self._changing = threading.Lock()
        self.tasks: dict[str, Task] = dict(self.bundle.tasks)
        for task in self.tasks.values():
            self._check_room(task)
        constants = Constants(self.bundle, self.threads)
        self.bank = Bank(
            constants.shapes(self._engine),
            constants.of,
            memory=bank_memory,
            device=self._engine.device,
            first_slots=max(1, len(self.tasks)),
        )
        device, prompt = self._engine.device, self.bundle.prompt_tokens
        self._score_bytes = 4 * self.bundle.size("num_heads")
        tokens, rows = DEFAULT_BATCH[device]
        self.limits = BatchLimits(
            token_budget or tokens, max_rows or rows, tasks=self.bank.capacity,
            run_cost=_RUN_COST * self.threads if device == "cpu" else _RUN_COST_CUDA,
            scores=_CACHED // self._score_bytes if device == "cpu" else None,
            queries=prompt if self.bundle.mode == "full" else 0, keys=prompt,
        )  # fmt: skip
        log.info(
            "bank: %.2f MiB for each task, %d tasks fit",
            self.bank.slot_bytes / MIB, self.bank.capacity,
        )  # fmt: skip

    # ---- tasks -------------------------------------------------------------------------------

    def task(self, name: str) -> Task:
        """The task of that name.

        Raises:
            UserError: there is none.
        """
        found = self.tasks.get(name)
        if found is None:
            raise UserError(f"no task '{name}': {which(self.tasks, 'there are')}")
        return found

    def add_task(
        self,
        name: str,
        record: Mapping[str, Any] | None = None,
        prompt: np.ndarray | Arrays | None = None,
    ) -> Task:
        """Serve a task, or its new version, from now on. Texts under way keep the old version.

        Args:
            name: of the task.
            record, prompt: as for `serve.bundle.add_task`, kept in memory only; without them the
                task is read from the bundle's folder as it is now.

        Raises:
            UserError: the bundle has no such task, or record and prompt do not fit it.
            Failure: its prompt is damaged, or the folder is gone or was exported again with other
                graphs.
        """
        with self._changing:
            return self.serve_task(self.read_task(name, record, prompt))

    def read_task(
        self,
        name: str,
        record: Mapping[str, Any] | None = None,
        prompt: np.ndarray | Arrays | None = None,
    ) -> Task:
        """The checked task that `add_task` would serve, with its prompt in `arrays`."""
        if record is None or prompt is None:
            try:
                fresh = bundles.load(self.bundle.folder, verify=False)
            except UserError as error:  # it was one when this started
                raise Failure(f"the bundle cannot be read any more: {error}") from None
            if self.bundle.has_other_graphs(fresh):  # a prompt belongs to the weights it saw
                raise Failure(f"{fresh.folder} has other graphs now: restart the server")
            if name not in fresh.tasks:
                raise UserError(f"{fresh.folder} has no task '{name}': {which(fresh.tasks)}")
            task = fresh.tasks[name]
            arrays = fresh.read_prompt(task)
        else:
            arrays = check_prompt(prompt, self.bundle)
            digest = hashlib.sha256(b"".join(arrays[k].tobytes() for k in sorted(arrays)))
            values = {key: record[key] for key in record if key not in ("prompt", "sha256")}
            task = make_task(name, values, self.bundle.header)
            task = replace(task, sha256=digest.hexdigest())
        self._check_room(task)
        return replace(task, arrays=arrays)

    def serve_task(self, held: Task) -> Task:
        """Serve a task that `read_task` gave, from now on; the task as it is kept."""
        # One with a file need not keep its prompt in memory as well.
        kept = replace(held, arrays=None) if held.prompt else held
        with self.bank.lend([held]):  # so that its first request does not wait
            self._replace(held.name, kept)
        return kept

    def remove_task(self, name: str) -> None:
        """Stop serving a task; the bundle's folder stays as it is. Texts under way are answered.

        Raises:
            UserError: there is no such task.
        """
        with self._changing:
            self.task(name)
            self._replace(name, None)

    def warm(self) -> None:
        """Fill the bank with as many tasks as fit and run the first of them once, so that the first
        request waits for neither.

        Raises:
            Failure: a prompt is damaged; it names the file.
        """
        tasks = list(self.tasks.values())[: self.bank.capacity]
        for start in range(0, len(tasks), _TOGETHER):
            with self.bank.lend(tasks[start : start + _TOGETHER]):
                pass
        for task in tasks[:1]:
            self.run([Encoded([*task.prefix_ids, *task.suffix_ids], False, task)])

    def _replace(self, name: str, task: Task | None) -> None:
        tasks = dict(self.tasks)  # readers keep the dict that they hold
        old = tasks.pop(name, None)
        if task is not None:
            tasks[name] = task
        self.tasks = tasks
        if old is not None and (task is None or key_of(old) != key_of(task)):
            self.bank.drop(old)

    def _check_room(self, task: Task) -> None:
        if self.encoder.room(task) < 1:
            raise UserError(
                f"--max-tokens {self.encoder.max_tokens} leaves no room for a text in task "
                f"'{task.name}', whose template takes "
                f"{len(task.prefix_ids) + len(task.suffix_ids)}"
            )

    # ---- the three stages --------------------------------------------------------------------

    def only_task(self) -> str:
        """The name of the bundle's task, for who names none.

        Raises:
            UserError: there are several, or there is none.
        """
        if len(self.tasks) != 1:
            raise UserError(f"pass a task (--task): {which(self.tasks, 'there are')}")
        return next(iter(self.tasks))

    def classify(
        self, texts: Iterable[str], task: str | Sequence[str] | None = None
    ) -> list[Result]:
        """Classify texts, each by its task, in length-sorted batches under the token budget.

        Args:
            texts: any number; an empty text is classified by its template alone.
            task: one task's name for all, or one name per text; None where there is only one.

        Returns:
            One result per text, in the order of the texts.

        Raises:
            UserError: an unknown task, something that is not text, or lists of two lengths.
        """
        if isinstance(texts, str | bytes) or not isinstance(texts, Iterable):
            kind = type(texts).__name__
            raise UserError(f"texts is one {kind}, not a list of texts: pass [text]")
        texts = list(texts)
        if task is None:
            task = self.only_task()
        if not isinstance(task, Iterable) or isinstance(task, bytes):
            raise UserError("task must be a task's name, or a list of one name for each text")
        names = [task] * len(texts) if isinstance(task, str) else list(task)
        if not all(isinstance(name, str) for name in names):
            raise UserError("task must be a list of names, one for each text")
        if len(names) != len(texts):
            raise UserError(
                f"{len(texts)} texts, but {len(names)} tasks: give one task, or as many"
            )
        for position, text in enumerate(texts):
            check_text(text, f"text {position}")
        tasks = {name: self.task(name) for name in dict.fromkeys(names)}
        return self.answer(
            self.encoder.encode(texts, [tasks[name] for name in names]) if texts else []
        )

    def batches(self, encoded: Sequence[Encoded]) -> list[list[int]]:
        """Which of the texts run together: positions in `encoded`."""
        # Few texts are shared out, so that no worker looks on.
        most = min(self.limits.rows, math.ceil(len(encoded) / self.workers) or 1)
        return plan(encoded, replace(self.limits, rows=most))

    def answer(self, encoded: Sequence[Encoded]) -> list[Result]:
        """`classify`, from the ids on."""
        results: list[Result | None] = [None] * len(encoded)
        batches = self.batches(encoded)
        run = self._pool.map if self.workers > 1 and len(batches) > 1 else map
        answers = run(lambda rows: self.run([encoded[i] for i in rows]), batches)
        for rows, found in zip(batches, answers, strict=True):
            for row, result in zip(rows, found, strict=True):
                results[row] = result
        return [result for result in results if result is not None]

    def run(self, batch: Sequence[Encoded]) -> list[Result]:
        """Run one batch as it is and read it out.

        Args:
            batch: at least one row, of at most `limits.tasks` different tasks.

        Raises:
            Failure: a prompt cannot be read, or onnxruntime fails.
        """
        return read_out(batch, self.logits(batch))

    def logits(self, batch: Sequence[Encoded]) -> np.ndarray:
        """The graph's answer for one batch: [B, C] float32, padded classes hugely negative."""
        longest = max(len(row.ids) for row in batch)
        found: dict[int, Task] = {id(item.task): item.task for item in batch}
        with self.bank.lend(list(found.values())) as view:
            slot_of = dict(zip(found, view.slots, strict=True))
            slots = [slot_of[id(item.task)] for item in batch]
            order, groups = in_groups(slots) if self._grouped else (range(len(batch)), slots)
            input_ids = np.zeros((len(batch), longest), np.int64)
            mask = np.zeros((len(batch), longest), np.int64)
            for row, place in enumerate(order):
                ids = batch[place].ids
                input_ids[row, : len(ids)] = ids
                mask[row, : len(ids)] = 1
            feed = dict(view.inputs)
            values = (input_ids, mask, np.array(groups, np.int64))
            for name, value in zip(_TEXT_INPUTS, values, strict=True):
                feed[name] = on_device(value, "cpu")  # a GPU's copy is made on the run's own stream
            large = self.limits.cells(len(batch), longest) * self._score_bytes > _LARGE
            logits = self._engine.run(feed, give_back=large)[0].astype(np.float32)
        return logits[np.argsort(order)]
