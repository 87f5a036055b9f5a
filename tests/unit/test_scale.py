"""The arithmetic of docs/scale.md, against plain counterparts."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import serve_toy as toy

from benchmarks import scale


def plain_lru(numbers: list[int], capacity: int, warm: int) -> float:
    """An LRU as a list, the newest last."""
    cache: list[int] = []
    hits = 0
    for place, number in enumerate(numbers):
        if number in cache:
            cache.remove(number)
            hits += place >= warm
        elif len(cache) == capacity:
            del cache[0]
        cache.append(number)
    return hits / (len(numbers) - warm)


@pytest.mark.parametrize("exponent", [0.0, 0.8, 1.2])
@pytest.mark.parametrize("capacity", [1, 7, 60])
def test_the_bank_hits_exactly_as_a_plain_lru(capacity: int, exponent: float) -> None:
    numbers = scale.requests(scale.zipf(200, exponent), 3000, seed=capacity)
    wanted = plain_lru(numbers.tolist(), capacity, 500)
    assert scale.simulate(numbers, capacity, 500) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("exponent", [0.6, 1.0, 1.2])
@pytest.mark.parametrize("capacity", [20, 200])
def test_ches_approximation_is_near_the_simulation(capacity: int, exponent: float) -> None:
    shares = scale.zipf(1000, exponent)
    hit = scale.simulate(scale.requests(shares, 40_000), capacity, 5000)
    assert scale.che(shares, capacity) == pytest.approx(hit, abs=0.015)


def test_ches_approximation_where_the_answer_is_known() -> None:
    # When all tasks are alike, the hit rate is the share that fits.
    assert scale.che(scale.zipf(1000, 0.0), 300) == pytest.approx(0.3, abs=1e-9)
    assert scale.che(scale.zipf(10, 1.0), 10) == 1.0


def test_shares_follow_zipf_and_requests_follow_them() -> None:
    shares = scale.zipf(50, 1.0)
    assert shares.sum() == pytest.approx(1) and shares[0] / shares[9] == pytest.approx(10)
    counts = np.bincount(scale.requests(shares, 200_000), minlength=50) / 200_000
    assert np.abs(counts - shares).max() < 0.005


def test_tasks_divided_over_nodes_hit_as_one_large_cache() -> None:
    shares = scale.zipf(5000, 0.8)
    loads, hits = scale.divided(shares, 1, 250)
    assert loads == pytest.approx([1.0])
    assert hits == pytest.approx([scale.che(shares, 250)])
    loads, hits = scale.divided(shares, 10, 250)
    assert loads.sum() == pytest.approx(1)
    # A little less: what is dealt over several nodes stands in the bank of each.
    assert loads @ hits == pytest.approx(scale.che(shares, 2500), abs=0.03)


def test_no_node_is_sent_a_popular_task_alone() -> None:
    shares = np.array([0.7, *[0.3 / 3000] * 3000])
    loads, hits = scale.divided(shares, 4, 10_000)
    assert loads.min() > 0.7 / 4 and loads.max() < 0.7 / 4 + 0.3 / 4 * 1.2
    assert hits.tolist() == [1.0] * 4


GEOMETRY = {"layers": 6, "heads": 8, "head_width": 64, "width": 512, "prompt_tokens": 100,
            "text_ms": {"int8": 10.0}, "miss_ms": 30.0}  # fmt: skip


def test_sizes_are_those_of_docs_serving() -> None:
    assert scale.slot_bytes(GEOMETRY, "fp32") / 2**20 == pytest.approx(2.54, abs=0.005)
    assert scale.slot_bytes(GEOMETRY, "int8") / 2**20 == pytest.approx(1.27, abs=0.005)
    assert scale.prompt_bytes(GEOMETRY) == 100 * 512 * 4
    small = GEOMETRY | {"heads": 12, "head_width": 32, "width": 384, "prompt_tokens": 20}
    assert scale.slot_bytes(small, "fp32") / 2**20 == pytest.approx(0.38, abs=0.005)


def test_the_slot_is_what_the_bank_takes(tmp_path: Path) -> None:
    from serve.classifier import Classifier

    bank = Classifier(toy.make_bundle(tmp_path / "b"), threads=1).bank
    geometry = {"layers": toy.L, "heads": toy.H, "head_width": toy.K, "width": toy.D,
                "prompt_tokens": toy.P}  # fmt: skip
    assert scale.slot_bytes(geometry, "fp32") == bank.slot_bytes


def overloaded(shares: np.ndarray, nodes: int) -> int:
    """Nodes that are asked for more than their processors can do."""
    count = 0
    for load, hit in zip(*scale.divided(shares, nodes, 300), strict=True):
        seconds = load * scale.REQUESTS * (0.010 + (1 - hit) * 0.030)
        count += seconds > 16 * 0.7
    return count


@pytest.mark.parametrize("exponent", [0.8, 1.2])
def test_the_fewest_nodes_are_enough_and_one_less_is_not(exponent: float) -> None:
    shares = scale.zipf(5000, exponent)
    nodes, hit = scale.fewest(shares, 300, 10.0, 30.0)
    loads, hits = scale.divided(shares, nodes, 300)
    assert hit == pytest.approx(sum(a * b for a, b in zip(loads, hits, strict=True)))
    assert overloaded(shares, nodes) == 0 < overloaded(shares, nodes - 1)


def test_an_lru_has_filled_after_the_time_that_is_computed() -> None:
    shares = scale.zipf(1000, 0.8)
    time = scale.filling(shares, 200)
    seen = len(set(scale.requests(shares, round(time)).tolist()))
    assert seen == pytest.approx(200, rel=0.05)


def test_a_miss_is_paid_by_its_share() -> None:
    # 16 processors at 70 % have 11,200 ms a second.
    assert scale.per_node(10, 30, 1.0) == pytest.approx(1120)
    assert scale.per_node(10, 30, 0.5) == pytest.approx(11_200 / 25)


def test_one_command_measures_and_writes_the_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scale, "TASKS", 300)
    monkeypatch.setattr(scale, "CAPACITIES", (10, 50))
    monkeypatch.setattr(scale, "INDEX_SIZES", (3, 30))
    # A simulation of its own size, as the real one takes half a minute.
    monkeypatch.setattr(
        scale, "simulated",
        lambda: {(c, e): 0.125 for c in scale.CAPACITIES for e in scale.EXPONENTS},
    )  # fmt: skip
    folder = toy.make_bundle(tmp_path / "b")
    document = tmp_path / "scale.md"
    names = ("unit", "memory", "hits", "nodes", "index")
    document.write_text(
        "# T\n" + "".join(f"<!-- figures: {name} -->\nold\n<!-- end -->\n" for name in names)
    )
    argv = ["scale", "--figures", str(tmp_path / "f.json"), "--document", str(document)]
    monkeypatch.setattr(sys, "argv", [*argv, "--measure", f"toy={folder}"])
    scale.main()
    text = document.read_text()
    assert "old" not in text and "12.5 (" in text
    figures = json.loads((tmp_path / "f.json").read_text())
    assert [row["tasks"] for row in figures["index"]] == [3, 30]
    assert set(figures["geometries"]["toy"]["text_ms"]) == {"fp32"}
    monkeypatch.setattr(sys, "argv", argv)
    scale.main()  # from the figures of before: the same tables
    assert document.read_text() == text


def test_the_document_has_a_place_for_every_table() -> None:
    text = scale.DOCUMENT.read_text("utf-8")
    names = ("unit", "memory", "hits", "nodes", "index")
    filled = scale.fill(text, {name: f"[{name}]" for name in names})
    assert all(f"[{name}]" in filled for name in names)
    with pytest.raises(SystemExit, match="has places for"):
        scale.fill(text, {"unit": ""})
