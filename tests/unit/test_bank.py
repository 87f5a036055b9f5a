"""The bank's slots, where the tests of the classifier do not reach them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from serve import bank as module
from serve.bank import Bank
from serve.task import Task


def film(**changes: Any) -> Task:
    values: dict[str, Any] = {
        "name": "film", "labels": ["n", "p"], "words": ["bad", "good"], "word_ids": [5, 6],
        "template": "{text} <extra_id_0>", "prefix_ids": [], "suffix_ids": [3],
    }  # fmt: skip
    return Task(**values | changes)


def bank_of_lengths(memory: int = 1 << 20, **settings: Any) -> Bank:
    """Of constants that are a task's name in numbers, and a prompt of 4; a task takes 8 bytes."""
    return Bank(
        {"bank_states": ((2,), np.float32)},
        lambda task: {"bank_states": np.full(2, len(task.name)), "bank_length": np.array(4)},
        memory=memory,
        **settings,
    )


def states_of(bank: Bank, task: Task) -> float:
    with bank.lend([task]) as view:
        return float(view.inputs["bank_states"].numpy()[view.slots[0], 0])


@pytest.mark.parametrize("kind", [np.float16, np.float32])
def test_numbers_beyond_half_precision_stay_finite_and_others_as_they_are(kind: type) -> None:
    value = np.array([1e6, -1e6, 65504.0, 0.25], np.float32)
    bank = Bank(
        {"bank_states": ((4,), kind)},
        lambda _: {"bank_states": value, "bank_length": np.array(1)},
        memory=1 << 20,
    )
    with bank.lend([film()]) as view:
        kept = view.inputs["bank_states"].numpy()[view.slots[0]]
    assert kept.dtype == kind
    if kind is np.float16:
        assert kept.tolist() == [65504.0, -65504.0, 65504.0, 0.25]
    else:
        assert kept.tolist() == value.tolist()


def test_a_slot_that_nobody_has_filled_is_one_of_length_1_without_labels() -> None:
    """From the start, and after the bank has grown from 2 slots to 4."""
    bank = bank_of_lengths(first_slots=2)
    for count, slots in ((1, 2), (2, 2), (3, 4)):
        with bank.lend([film(name="x" * n) for n in range(1, count + 1)]) as view:
            found = {name: value.numpy() for name, value in view.inputs.items()}
        empty = sorted(set(range(slots)) - set(view.slots))
        assert found["bank_length"].shape == (slots,)
        assert found["bank_length"][view.slots].tolist() == [4] * count
        assert found["bank_length"][empty].tolist() == [1] * len(empty)
        assert found["bank_states"][view.slots, 0].tolist() == list(range(1, count + 1))
        assert found["label_ids"][view.slots].tolist() == [[5, 6]] * count
        assert found["label_ids"][empty].tolist() == [[-1, -1]] * len(empty)


def test_a_slot_used_again_keeps_no_label_of_the_task_before() -> None:
    """A third column left there would be a class more, with a share of the probabilities."""
    bank = bank_of_lengths(memory=8)
    three = film(name="tone", labels=["n", "o", "p"], words=["a", "b", "c"], word_ids=[7, 8, 9])
    with bank.lend([three]) as view:
        assert view.inputs["label_ids"].numpy()[view.slots].tolist() == [[7, 8, 9]]
    with bank.lend([film()]):
        assert bank.capacity == 1 and bank.evictions == 1
        assert bank._arrays["label_ids"].tolist() == [[5, 6, -1]]


@pytest.mark.parametrize("back", [False, True])
def test_a_dropped_task_stays_where_it_came_back_before_its_last_batch_ended(back: bool) -> None:
    bank = bank_of_lengths()
    with bank.lend([film()]):
        bank.drop(film())
        if back:
            with bank.lend([film()]):
                pass
    assert len(bank) == int(back)
    with bank.lend([film()]):
        assert bank.misses == (1 if back else 2)


def test_a_copy_to_the_device_that_fails_leaves_nobody_anothers_prompt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A GPU's copies are new memory, of which there may be none while batches hold the old."""
    copy, failures = module.on_device, [False]

    def on_gpu(array: np.ndarray, device: str) -> Any:
        if failures[0]:
            raise RuntimeError("out of memory")
        return copy(array.copy(), "cpu")

    monkeypatch.setattr(module, "on_device", on_gpu)
    bank = bank_of_lengths(memory=8)
    assert bank.capacity == 1 and states_of(bank, film()) == 4
    failures[0] = True
    for _ in range(2):
        with pytest.raises(RuntimeError, match="out of memory"):
            states_of(bank, film(name="food with salt"))
    failures[0] = False
    assert states_of(bank, film(name="food with salt")) == 14
    assert states_of(bank, film()) == 4 and len(bank) == 1


def test_a_bank_that_cannot_grow_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    bank = bank_of_lengths(first_slots=1)
    assert states_of(bank, film()) == 4
    with monkeypatch.context() as patch:
        zeros, calls = np.zeros, []

        def zeros_until_memory_ends(*given: Any, **named: Any) -> np.ndarray:
            calls.append(1)
            if len(calls) == 2:
                raise MemoryError
            return zeros(*given, **named)

        patch.setattr(np, "zeros", zeros_until_memory_ends)
        with pytest.raises(MemoryError):
            states_of(bank, film(name="food with salt"))
    assert [states_of(bank, film(name=name)) for name in ("food with salt", "film")] == [14, 4]
