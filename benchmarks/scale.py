"""What one node serves, and what ten thousand requests a second over a hundred thousand tasks take.

    python -m benchmarks.scale                      # the tables of docs/scale.md, again
    python -m benchmarks.scale --measure mini=BUNDLE small=BUNDLE    # measured here first

The arithmetic starts from figures in `benchmarks/scale.json`: processor time of a text and of a
miss on one thread, and how long a large bundle takes to read and to change. `--measure` takes them
anew: from bundles in mode prefix (those that `python -m benchmarks.serving` leaves in WORK/prefix),
by processor time, so that a busy machine does not show.

Hit rates come from `serve.bank.Bank` itself, fed with requests whose tasks follow a Zipf
distribution; beside it stands Che's approximation of LRU (Che, Tung and Wang, 2002), which is fast
enough for the tables with many cases.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from serve import bundle as bundles
from serve.bank import Bank
from serve.classifier import MIB, Classifier
from serve.cli import guarded
from serve.files import atomic_write, write_json
from serve.task import Task
from serve.tokenize import Encoded

HERE = Path(__file__).parent
FIGURES, DOCUMENT = HERE / "scale.json", HERE.parent / "docs" / "scale.md"
TASKS = 100_000
EXPONENTS = (0.6, 0.8, 1.0, 1.2)
CAPACITIES = (200, 1000, 5000, 20_000)
REQUESTS = 10_000  # a second
CORES, LOAD = 16, 0.7  # of a node; the share of its processors that requests may take
PIECES = 10  # a task of more than this part of a node's fair share has several nodes
ROWS, LENGTH = 32, 24  # of a measured batch
INDEX_SIZES = (1000, 10_000)


# ---- hit rates -----------------------------------------------------------------------------------


def zipf(tasks: int, exponent: float) -> np.ndarray:
    """Shares [tasks] of requests, the most popular first; they add up to 1."""
    weights = np.arange(1, tasks + 1, dtype=np.float64) ** -exponent
    return weights / weights.sum()


def requests(shares: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """Task numbers [count] drawn by their shares."""
    edges = np.cumsum(shares)
    drawn = np.searchsorted(edges, np.random.default_rng(seed).random(count), side="right")
    return np.minimum(drawn, len(shares) - 1)  # the last edge may be a rounding below 1


def simulate(numbers: np.ndarray, capacity: int, warm: int) -> float:
    """The share of requests after the first `warm` whose task `serve.bank.Bank` had."""
    bank = Bank(
        {"value": ((1,), np.float32)},
        lambda task: {"value": np.zeros(1, np.float32)},
        memory=capacity * 4,
        first_slots=capacity,
    )
    known: dict[int, Task] = {}
    before = 0
    for place, number in enumerate(numbers.tolist()):
        if place == warm:
            before = bank.misses
        task = known.get(number)
        if task is None:
            task = known[number] = Task(str(number), ["a", "b"], ["a", "b"], [0, 1], "", [], [1])
        with bank.lend([task]):
            pass
    return 1 - (bank.misses - before) / (len(numbers) - warm)


def filling(shares: np.ndarray, capacity: int) -> float:
    """After how many requests so many tasks have been asked for, on average; Che's "characteristic
    time" of an LRU: a task that is not asked for so long is gone."""
    low, high = 0.0, 1.0
    while -np.expm1(-shares * high).sum() < capacity:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        if -np.expm1(-shares * middle).sum() < capacity:
            low = middle
        else:
            high = middle
    return high


def che(shares: np.ndarray, capacity: int) -> float:
    """Che's approximation of the hit rate of an LRU of so many tasks."""
    if capacity >= len(shares):
        return 1.0
    return float((shares * -np.expm1(-shares * filling(shares, capacity))).sum())


def divided(
    shares: np.ndarray, nodes: int, capacity: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Shares of the requests [nodes] and hit rates [nodes] when tasks have nodes of their own.

    A task's node is drawn, as by a hash of its name. One of more than a `PIECES`-th of a node's
    fair share is dealt over several nodes, the next ones, in as many equal parts.
    """
    copies = np.clip(np.ceil(shares * nodes * PIECES), 1, nodes).astype(int)
    first = np.random.default_rng(seed).integers(0, nodes, len(shares))
    place = np.arange(copies.sum()) - np.repeat(np.cumsum(copies) - copies, copies)
    owner = (np.repeat(first, copies) + place) % nodes
    parts = np.repeat(shares / copies, copies)
    loads = np.bincount(owner, parts, nodes)
    hits = [
        che(parts[owner == node] / loads[node], capacity) if loads[node] else 1.0
        for node in range(nodes)
    ]
    return loads, np.array(hits)


# ---- figures -------------------------------------------------------------------------------------


def slot_bytes(g: dict[str, Any], precision: str) -> int:
    """What a task takes in the bank, as docs/serving.md has it."""
    width = 2 * g["layers"] * g["heads"] * g["head_width"] + g["width"]
    return (4 if precision == "fp32" else 2) * g["prompt_tokens"] * width


def prompt_bytes(g: dict[str, Any]) -> int:
    """What a task takes on the disk."""
    return 4 * g["prompt_tokens"] * g["width"]


def measure(folder: str) -> dict[str, Any]:
    """Geometry and processor milliseconds of a bundle in mode prefix, on one thread."""
    found = bundles.load(folder, verify=False)
    if found.mode != "prefix":
        raise SystemExit(f"error: {folder} is in mode {found.mode}: give one in mode prefix")
    keys = {"layers": "num_layers", "heads": "num_heads", "head_width": "d_kv", "width": "d_model"}
    figures: dict[str, Any] = {key: found.size(name) for key, name in keys.items()}
    figures["prompt_tokens"] = found.prompt_tokens
    known = found.header["precisions"]
    figures["text_ms"] = {
        precision: text_ms(folder, precision)
        for precision in ("fp32", "int8")
        if precision in known
    }
    figures["miss_ms"] = miss_ms(folder)
    return figures


def text_ms(folder: str, precision: str) -> float:
    """Milliseconds of a text of `LENGTH` tokens in a batch of `ROWS`."""
    classifier = Classifier(folder, precision, threads=1, spin=False, verify=False)
    task = next(iter(classifier.tasks.values()))
    vocabulary = classifier.bundle.size("vocab_size")
    ids = np.random.default_rng(0).integers(3, vocabulary, (ROWS, LENGTH)).tolist()
    batch = [Encoded(row, False, task) for row in ids]
    return _fastest(lambda: classifier.run(batch)) / ROWS


def miss_ms(folder: str) -> float:
    """Milliseconds from a task that is not in the bank to one that is."""
    classifier = Classifier(folder, threads=1, spin=False, verify=False)
    task = next(iter(classifier.tasks.values()))
    held = dataclasses.replace(task, arrays=classifier.bundle.read_prompt(task), prompt="")
    numbers = iter(range(10**6))

    def miss() -> None:
        with classifier.bank.lend([dataclasses.replace(held, sha256=str(next(numbers)))]):
            pass

    return _fastest(miss)


def _fastest(work: Callable[[], Any], times: int = 15) -> float:
    """Processor milliseconds of the fastest run: what else the machine does can only add."""
    work()
    spent = []
    for _ in range(times):
        begun = time.process_time()
        work()
        spent.append(time.process_time() - begun)
    return 1000 * min(spent)


def measure_index(source: str) -> list[dict[str, Any]]:
    """How a bundle of many tasks is read and changed; processor seconds, and MiB of bundle.json."""
    found = bundles.load(source, verify=False)
    task = next(iter(found.tasks.values()))
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for count in INDEX_SIZES:
            folder = Path(scratch) / str(count)
            (folder / "prompts").mkdir(parents=True)
            for name in found.files:
                (folder / name).symlink_to((found.folder / name).resolve())
            tasks = {}
            for number in range(count):
                path = f"prompts/t{number}.safetensors"
                (folder / path).write_bytes(b"x")  # only its size is looked at
                name = f"task-{number}"
                tasks[name] = dataclasses.replace(task, name=name, prompt=path, size_bytes=1)
            bundles._write(bundles.Bundle(folder, found.header, tasks, found.files))
            begun = time.process_time()
            loaded = bundles.load(folder, verify=False)
            read = time.process_time() - begun
            begun = time.process_time()
            bundles._write(loaded)
            written = time.process_time() - begun
            size = (folder / "bundle.json").stat().st_size
            rows.append({"tasks": count, "mib": size / MIB, "read_s": read, "write_s": written})
    return rows


# ---- tables --------------------------------------------------------------------------------------


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def size(number: float) -> str:
    """Bytes for people."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= scale:
            return f"{number / scale:.3g} {unit}"
    return f"{number:.0f} B"


def per_node(text_ms: float, miss_ms: float, hit: float) -> float:
    """Texts a second of a node, each of them a request of its own task."""
    return LOAD * CORES * 1000 / (text_ms + (1 - hit) * miss_ms)


def unit_table(figures: dict[str, Any]) -> str:
    """What a text, a miss and a task take."""
    rows = []
    for name, g in figures["geometries"].items():
        for precision, text in g["text_ms"].items():
            rows.append(
                [f"{name}, {g['prompt_tokens']} prompt tokens, {precision}", f"{text:.2f}",
                 f"{per_node(text, 0, 1):,.0f}", f"{g['miss_ms']:.1f}",
                 f"{g['miss_ms'] / text:.1f}", size(slot_bytes(g, precision)),
                 size(prompt_bytes(g))]
            )  # fmt: skip
    header = ["", "ms a text", "texts/s a node, all hits", "ms a miss", "a miss in texts",
              "a task in the bank", "on the disk"]  # fmt: skip
    return table(header, rows)


def memory_table(figures: dict[str, Any]) -> str:
    """A hundred thousand tasks, all in memory and on the disk."""
    rows = []
    for name, g in figures["geometries"].items():
        for precision in g["text_ms"]:
            slot = slot_bytes(g, precision)
            rows.append([f"{name}, {precision}", size(TASKS * slot), size(TASKS * prompt_bytes(g)),
                         *[f"{m * MIB // slot:,}" for m in (512, 4096, 32_768)]])  # fmt: skip
    header = ["", "all in the bank", "prompts on the disk", "fit in 512 MiB", "in 4 GiB",
              "in 32 GiB"]  # fmt: skip
    return table(header, rows)


def hit_table(results: dict[tuple[int, float], float]) -> str:
    """Simulated hit rates, with Che's approximation in brackets."""
    rows = []
    for capacity in CAPACITIES:
        cells = [f"{capacity:,}"]
        for exponent in EXPONENTS:
            guess = che(zipf(TASKS, exponent), capacity)
            cells.append(f"{100 * results[capacity, exponent]:.1f} ({100 * guess:.1f})")
        rows.append(cells)
    return table(["tasks in the bank", *[f"s = {e}" for e in EXPONENTS]], rows)


def node_table(figures: dict[str, Any], memory: int = 4096) -> str:
    """Nodes for `REQUESTS` a second, each request of its own task, with `memory` MiB of bank."""
    rows = []
    for name, g in figures["geometries"].items():
        for precision, text in g["text_ms"].items():
            capacity = memory * MIB // slot_bytes(g, precision)
            cells = [f"{name}, {precision}"]
            for exponent in EXPONENTS:
                shares = zipf(TASKS, exponent)
                hit = che(shares, capacity)
                plain = math.ceil(REQUESTS / per_node(text, g["miss_ms"], hit))
                fewer, best = fewest(shares, capacity, text, g["miss_ms"])
                cells.append(f"{plain} ({100 * hit:.0f} %), {fewer} ({100 * best:.0f} %)")
            rows.append(cells)
    return table(["", *[f"s = {e}" for e in EXPONENTS]], rows)


def fewest(shares: np.ndarray, capacity: int, text_ms: float, miss_ms: float) -> tuple[int, float]:
    """Nodes, and their hit rate, when each task is sent to nodes of its own (see `divided`): as
    many as the busiest of them needs."""
    nodes = math.ceil(REQUESTS / per_node(text_ms, 0, 1.0))
    while True:
        loads, hits = divided(shares, nodes, capacity)
        rates = [per_node(text_ms, miss_ms, hit) for hit in hits]
        if (loads * REQUESTS <= rates).all():
            return nodes, float(loads @ hits)
        nodes += 1


def index_table(figures: dict[str, Any]) -> str:
    """Reading and changing `bundle.json`."""
    rows = [
        [f"{row['tasks']:,}", f"{row['mib']:.1f} MiB", f"{row['read_s']:.2f} s",
         f"{row['read_s'] + row['write_s']:.2f} s"]
        for row in figures["index"]
    ]  # fmt: skip
    return table(["tasks", "bundle.json", "reading it", "adding a task"], rows)


def simulated() -> dict[tuple[int, float], float]:
    """The hit rate of every capacity and exponent of the tables."""
    results = {}
    for exponent in EXPONENTS:
        shares = zipf(TASKS, exponent)
        for capacity in CAPACITIES:
            warm = round(1.5 * filling(shares, capacity))  # it is full, and has been renewed
            results[capacity, exponent] = simulate(requests(shares, warm + 50_000), capacity, warm)
    return results


def fill(document: str, blocks: dict[str, str]) -> str:
    """Put each block between its marks, `<!-- figures: NAME -->` and `<!-- end -->`.

    Raises:
        SystemExit: a block has no place in the document, or the other way round.
    """
    found = set(re.findall(r"<!-- figures: (\w+) -->", document))
    if found != set(blocks):
        raise SystemExit(f"error: the document has places for {sorted(found)}, not for exactly "
                         f"{sorted(blocks)}")  # fmt: skip
    for name, text in blocks.items():
        pattern = rf"(<!-- figures: {name} -->\n).*?(<!-- end -->)"
        document = re.sub(
            pattern, lambda m, text=text: f"{m[1]}\n{text}\n\n{m[2]}", document, flags=re.DOTALL
        )
    return document


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--measure", nargs="+", metavar="NAME=BUNDLE", default=[],
                        help="measure these bundles into the figures first")  # fmt: skip
    parser.add_argument("--figures", type=Path, default=FIGURES)
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    given = parser.parse_args()
    figures = json.loads(given.figures.read_text()) if given.figures.is_file() else {}
    for item in given.measure:
        name, equals, folder = item.partition("=")
        if not equals:
            parser.error(f"--measure takes NAME=BUNDLE, not '{item}'")
        figures.setdefault("geometries", {})[name] = measure(folder)
        print(f"{name}: {json.dumps(figures['geometries'][name])}", flush=True)
    if given.measure:
        figures["index"] = measure_index(given.measure[0].partition("=")[2])
        write_json(given.figures, figures)
    if "index" not in figures:
        parser.error(f"{given.figures} has no figures: pass --measure NAME=BUNDLE")
    blocks = {
        "unit": unit_table(figures),
        "memory": memory_table(figures),
        "hits": hit_table(simulated()),
        "nodes": node_table(figures),
        "index": index_table(figures),
    }
    document = fill(given.document.read_text("utf-8"), blocks)
    with atomic_write(given.document) as temporary:
        temporary.write_text(document, "utf-8")
    print(f"{given.document}: {len(blocks)} tables written")


if __name__ == "__main__":
    sys.exit(guarded(main))
