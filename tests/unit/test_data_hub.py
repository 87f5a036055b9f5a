"""Data sets of the hub, with a stand-in for the `datasets` library."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import pytest

from serve.errors import Failure, UserError
from trainer import hub
from trainer.data import load_task
from trainer.tasks import get_task

Loader = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A `datasets` module whose `load_dataset` the test sets."""
    fake = types.ModuleType("datasets")
    fake.config = types.SimpleNamespace(HF_HUB_OFFLINE=False)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    monkeypatch.setattr(hub, "_reachable", lambda source: True)
    return fake


def test_only_the_split_that_is_needed_is_loaded(library: Any) -> None:
    asked: list[tuple[Any, ...]] = []

    def load(name: str, config: str | None, split: str) -> list[dict[str, Any]]:
        asked.append((name, config, split))
        return [{"title": "Fine", "content": f"a {split} text", "label": 1}] * 3

    library.load_dataset = load
    found = load_task("amazon2", "train")
    # All three: a set that marks its test rows is not cut once more.
    assert found.texts == ["Fine. a train text"] * 3
    assert found.labels.tolist() == [1, 1, 1]
    assert asked == [("fancyzhx/amazon_polarity", None, "train")]
    assert load_task("amazon2", "test").texts[0] == "Fine. a test text"


def test_all_splits_are_read_without_a_split(library: Any) -> None:
    library.load_dataset = lambda name, config, split: [{"text": split, "label": 0}]
    assert load_task("sst2").texts == ["train", "validation", "test"]


def test_nested_opinions_become_rows(library: Any) -> None:
    opinions = [
        {"sentiment": "Negative", "aspect": "transit-location", "target_entity": "LOCATION2"},
        {"sentiment": "Positive", "aspect": "price", "target_entity": "LOCATION1"},
    ]
    library.load_dataset = lambda *_, **__: [
        {"text": "LOCATION1 beats LOCATION2", "opinions": opinions},
        {"text": "nothing said", "opinions": []},
    ]
    found = load_task("sentihood", "train")
    assert found.texts == [
        "LOCATION2 transit location: LOCATION1 beats LOCATION2",
        "LOCATION1 price: LOCATION1 beats LOCATION2",
    ]
    assert found.labels.tolist() == [0, 1]


def test_rows_without_text_and_classes_to_drop_are_left_out(library: Any) -> None:
    rows = [
        {"text": "Nice soup.", "span": "soup", "label": "positive"},
        {"text": None, "span": "soup", "label": "positive"},
        {"text": "  ", "span": "soup", "label": "positive"},
        {"text": "Mixed.", "span": "room", "label": "conflict"},
        {"text": "Fine.", "span": "room", "label": "neutral"},
    ]
    library.load_dataset = lambda *_, **__: rows
    found = load_task("semeval-restaurant", "train")
    assert found.texts == ["soup: Nice soup.", "room: Fine."]
    assert found.labels.tolist() == [2, 1]


def test_an_unknown_label_names_the_set_and_row(library: Any) -> None:
    library.load_dataset = lambda *_, **__: [{"text": "x", "label": 9}]
    with pytest.raises(UserError, match="SetFit/sst5, row 1: label 9 is not one of very negative"):
        load_task("sst5", "train")


@pytest.mark.parametrize("reachable", [True, False])
def test_a_set_that_cannot_be_had_says_what_to_do(
    library: Any, monkeypatch: pytest.MonkeyPatch, reachable: bool
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(hub, "_reachable", lambda source: reachable)
    seen: list[tuple[bool, bool]] = []

    def load(*_: Any, **__: Any) -> list[dict[str, Any]]:
        seen.append((constants.HF_HUB_OFFLINE, library.config.HF_HUB_OFFLINE))
        raise ConnectionError("no route\nto the hub")

    library.load_dataset = load
    before = constants.HF_HUB_OFFLINE
    with pytest.raises(
        Failure, match=r"SetFit/sst2 of task 'sst2' could not .*local files with --data-dir"
    ) as e:
        load_task("sst2", "train")
    assert "\n" not in str(e.value)
    # Unreachable: kept to the cache, or it would be asked again and again for half a minute.
    assert seen == [(before, False) if reachable else (True, True)]
    after = [constants.HF_HUB_OFFLINE, library.config.HF_HUB_OFFLINE]
    assert after == [before, False]


def test_the_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        UserError,
        match=r'pip install "\.\[hub\]" in the checkout, or pass local files with --data-dir',
    ):
        load_task("yelp5", "train")


def test_an_offline_setting_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    source = get_task("sst2").hub
    assert source is not None
    assert hub._reachable(source) is False


@pytest.mark.parametrize(("error", "expected"), [(OSError("no route"), False), (None, True)])
def test_a_hub_that_answers_no_is_reachable(
    monkeypatch: pytest.MonkeyPatch, error: Exception | None, expected: bool
) -> None:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    class Api:
        def dataset_info(self, name: str, timeout: float) -> None:
            assert timeout < 30
            raise error or HfHubHTTPError.__new__(HfHubHTTPError)

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    source = get_task("sst2").hub
    assert source is not None
    assert hub._reachable(source) is expected
