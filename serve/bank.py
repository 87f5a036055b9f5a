"""The bank: the constants of the tasks in use, side by side, indexed by `task_id` in the graph.

A row of a batch names a slot. Slots are filled when a task is first used, and the least recently
used task gives way when the memory is spent; its constants are computed again at its next use.

A batch in flight pins its slots. A free slot can be filled meanwhile, because no running batch
reads it; when the bank grows, running batches keep the arrays that they started with.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort

from serve.engine import on_device
from serve.errors import UserError
from serve.task import Task

Key = tuple[str, str, tuple[int, ...]]
_HALF = 65504.0  # the largest number of half precision
_FEWEST = 2  # labels of a task
Compute = Callable[[Task], Mapping[str, np.ndarray]]


def key_of(task: Task) -> Key:
    """What tells two versions of a task apart: its name, and its prompt and labels."""
    return task.name, task.sha256, tuple(task.word_ids)


@dataclass(frozen=True)
class View:
    """What one batch needs of the bank.

    Attributes:
        slots: the slot of each task that was asked for, in order.
        inputs: the graph's bank inputs.
    """

    slots: list[int]
    inputs: dict[str, ort.OrtValue]


class Bank:
    """Thread-safe slots of task constants within a bound of memory.

    Attributes:
        slot_bytes: the memory of one task.
        capacity: the number of tasks that fit in the bound; a batch may hold no more.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[tuple[int, ...], type]],
        compute: Compute,
        *,
        memory: int,
        device: str = "cpu",
        first_slots: int = 1,
    ) -> None:
        """Args:
            shapes: per graph input, the shape of one slot and its type, for example
                `{"bank_kv": ((L, 2, H, P, K), np.float32), ...}`.
            compute: gives a task's arrays, one per key of `shapes`. Called by one thread at a
                time, and without holding up batches whose tasks are there.
            memory: bytes; bounds the slots.
            device: where the inputs shall lie.
            first_slots: slots to start with; they double as needed.

        Raises:
            UserError: not even one task fits.
        """
        self._compute = compute
        self._device = device
        self.slot_bytes = sum(
            int(np.prod(shape)) * np.dtype(kind).itemsize for shape, kind in shapes.values()
        )
        self.capacity = memory // self.slot_bytes
        if self.capacity < 1:
            raise UserError(
                f"--bank-memory of {memory / 2**20:.1f} MiB holds no task: one takes "
                f"{self.slot_bytes / 2**20:.1f} MiB"
            )
        count = max(1, min(first_slots, self.capacity))
        self._arrays: dict[str, np.ndarray] = {
            name: np.zeros((count, *shape), kind) for name, (shape, kind) in shapes.items()
        }
        self._arrays["bank_length"] = np.ones(count, np.int64)
        self._arrays["label_ids"] = np.full((count, _FEWEST), -1, np.int64)
        self._inputs: dict[str, ort.OrtValue] = {}
        self._free = list(range(count - 1, -1, -1))
        self._used: OrderedDict[Key, int] = OrderedDict()  # least recently used first
        self._pins: dict[Key, int] = {}
        self._dropped: set[Key] = set()  # removed while pinned
        self._changed = threading.Condition()
        self._filling = threading.Lock()
        self.misses = 0
        self.evictions = 0
        self._publish()

    def __len__(self) -> int:
        """Tasks in the bank."""
        return len(self._used)

    @contextmanager
    def lend(self, tasks: Sequence[Task]) -> Iterator[View]:
        """The slots of `tasks` (all different), filled, and kept as they are within the block.

        Raises:
            UserError: more tasks than `capacity`.
            Failure: a task's prompt cannot be read.
        """
        if len(tasks) > self.capacity:
            raise UserError(f"{len(tasks)} tasks in one batch, but --bank-memory holds "
                            f"{self.capacity}")  # fmt: skip
        keys = [key_of(task) for task in tasks]
        view = self._take(keys)
        while view is None:
            with self._filling:
                missing = [t for t, key in zip(tasks, keys, strict=True) if key not in self._used]
                filled = {key_of(task): (task, self._compute(task)) for task in missing}
                with self._changed:
                    try:
                        for key, (task, arrays) in filled.items():
                            self._place(key, task, arrays, set(keys))
                        if filled:
                            self._publish()
                    except BaseException:
                        self._forget(filled)
                        raise
                    view = self._take(keys)  # None when one was evicted meanwhile: once more
        try:
            yield view
        finally:
            with self._changed:
                for key in keys:
                    self._pins[key] -= 1
                    if not self._pins[key]:
                        del self._pins[key]
                        if key in self._dropped:
                            self._dropped.discard(key)
                            self._free.append(self._used.pop(key))
                self._changed.notify_all()

    def drop(self, task: Task) -> None:
        """Free a task's slot, as soon as no batch uses it."""
        key = key_of(task)
        with self._changed:
            if key in self._pins:
                self._dropped.add(key)
            elif key in self._used:
                self._free.append(self._used.pop(key))
                self._changed.notify_all()

    def _forget(self, keys: Iterable[Key]) -> None:
        """Free the slots of tasks that were placed and not published: runs would read what a
        device had there before, another task's prompt."""
        for key in keys:
            if key in self._used and key not in self._pins:
                self._free.append(self._used.pop(key))

    def _take(self, keys: list[Key]) -> View | None:
        """Pin the slots of `keys`, or None when one is not there."""
        with self._changed:
            if not all(key in self._used for key in keys):
                return None
            for key in keys:
                self._used.move_to_end(key)
                self._pins[key] = self._pins.get(key, 0) + 1
                self._dropped.discard(key)  # it came back before it could go
            return View([self._used[key] for key in keys], self._narrow(keys))

    def _narrow(self, keys: list[Key]) -> dict[str, ort.OrtValue]:
        """The inputs, with no more labels to a task than those of `keys` have: the graph scores
        every column for every row, and one task of a thousand labels would be paid for by all."""
        labels = self._arrays["label_ids"]
        width = max([_FEWEST, *(len(word_ids) for _, _, word_ids in keys)])
        if width >= labels.shape[1]:
            return self._inputs
        # Like a batch's texts it lies on the CPU: a GPU's copy is made on the run's own stream.
        own = np.ascontiguousarray(labels[:, :width])
        return {**self._inputs, "label_ids": on_device(own, "cpu")}

    def _place(
        self, key: Key, task: Task, arrays: Mapping[str, np.ndarray], wanted: set[Key]
    ) -> None:
        """Write a task's arrays into a free slot; grow, evict or wait to get one."""
        while not self._free:
            if len(self._arrays["bank_length"]) < self.capacity:
                self._grow()
                break
            idle = (k for k in self._used if k not in self._pins and k not in wanted)
            victim = next(idle, None)
            if victim is None:
                self._publish()  # what is placed already may be used while we wait
                self._changed.wait()  # a batch ends and unpins; it never waits for us
            else:
                self._free.append(self._used.pop(victim))
                self.evictions += 1
        slot = self._free.pop()
        labels = self._arrays["label_ids"]
        if len(task.word_ids) > labels.shape[1]:
            wider = np.full((len(labels), len(task.word_ids)), -1, np.int64)
            wider[:, : labels.shape[1]] = labels
            self._arrays["label_ids"] = labels = wider
        labels[slot] = -1
        labels[slot, : len(task.word_ids)] = task.word_ids
        for name, value in arrays.items():
            array = self._arrays[name]
            # Beyond half precision's range a number would become infinite, and an answer none.
            array[slot] = np.clip(value, -_HALF, _HALF) if array.dtype == np.float16 else value
        self._used[key] = slot
        self.misses += 1

    def _grow(self) -> None:
        count = len(self._arrays["bank_length"])
        target = min(2 * count, self.capacity)
        grown = {}
        for name, array in self._arrays.items():
            grown[name] = np.zeros((target, *array.shape[1:]), array.dtype)
            grown[name][:count] = array
        grown["label_ids"][count:] = -1
        grown["bank_length"][count:] = 1
        self._arrays = grown  # all of them or, where memory ends, none
        self._free.extend(range(target - 1, count - 1, -1))

    def _publish(self) -> None:
        # On the CPU the inputs are the arrays themselves; a GPU gets a new copy of what changed,
        # and running batches keep the old one.
        self._inputs = {name: on_device(a, self._device) for name, a in self._arrays.items()}
