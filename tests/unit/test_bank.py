"""The bank's slots, where the tests of the classifier do not reach them."""

from __future__ import annotations

import numpy as np
import pytest

from serve.bank import Bank
from serve.task import Task


@pytest.mark.parametrize("kind", [np.float16, np.float32])
def test_numbers_beyond_half_precision_stay_finite_and_others_as_they_are(kind: type) -> None:
    value = np.array([1e6, -1e6, 65504.0, 0.25], np.float32)
    bank = Bank(
        {"bank_states": ((4,), kind)},
        lambda _: {"bank_states": value, "bank_length": np.array(1)},
        memory=1 << 20,
    )
    task = Task(name="film", labels=["n", "p"], words=["bad", "good"], word_ids=[5, 6],
                template="{text} <extra_id_0>", prefix_ids=[], suffix_ids=[3])  # fmt: skip
    with bank.lend([task]) as view:
        kept = view.inputs["bank_states"].numpy()[view.slots[0]]
    assert kept.dtype == kind
    if kind is np.float16:
        assert kept.tolist() == [65504.0, -65504.0, 65504.0, 0.25]
    else:
        assert kept.tolist() == value.tolist()
