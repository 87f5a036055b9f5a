"""Where a batch's time goes, per operator, from onnxruntime's own profile.

    python -m benchmarks.operators BUNDLE --precision int8 --rows 32 --length 24

One thread, and per node the fastest of the runs: what other processes take does not count.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import onnxruntime as ort

from serve import bundle as bundles
from serve.cli import guarded
from serve.engine import DTYPES


def profile(
    bundle: bundles.Bundle, precision: str, rows: int, length: int, tasks: int, runs: int
) -> dict[str, tuple[int, float]]:
    """Per operator, the number of its nodes and their milliseconds."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = ort.InferenceSession(
            str(bundle.graph(precision)), options, providers=["CPUExecutionProvider"]
        )
        feed = inputs(session, rows, length, tasks)
        for _ in range(runs):
            session.run(None, feed)
        events = json.loads(Path(session.end_profiling()).read_text())
    nodes: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            nodes[event["args"]["op_name"], event["name"]].append(event["dur"] / 1e3)
    time: Counter[str] = Counter()
    count: Counter[str] = Counter()
    for (operator, _), values in nodes.items():
        time[operator] += min(values)
        count[operator] += 1
    return {name: (count[name], value) for name, value in time.most_common()}


def inputs(
    session: ort.InferenceSession, rows: int, length: int, tasks: int
) -> dict[str, np.ndarray]:
    """Random ids, and a bank with a slot for each task, which is that of rows / tasks rows."""
    random = np.random.default_rng(0)
    feed: dict[str, np.ndarray] = {}
    for item in session.get_inputs():
        sizes = {"B": rows, "S": length, "N": tasks, "G": tasks, "C": 2}
        shape = [sizes.get(size, size) for size in item.shape]
        kind = DTYPES[item.type]
        ones = kind == np.int64
        feed[item.name] = (
            np.ones(shape, kind) if ones else random.standard_normal(shape).astype(kind)
        )
    feed["input_ids"] = random.integers(3, 1000, (rows, length))
    feed["task_id"] = np.arange(tasks)
    prompt = next(value.shape[1] for name, value in feed.items() if name == "bank_states")
    feed["bank_length"][:] = prompt
    return feed


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", help="a bundle of mode prefix or deep")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=24)
    parser.add_argument("--tasks", type=int, default=1, help="in the batch; divides --rows")
    parser.add_argument("--runs", type=int, default=10)
    given = parser.parse_args()
    if given.rows % given.tasks:
        parser.error("--tasks must divide --rows")
    table = profile(
        bundles.load(given.bundle), given.precision, given.rows, given.length, given.tasks,
        given.runs,
    )  # fmt: skip
    total = sum(time for _, time in table.values())
    print(
        f"{given.precision}, {given.rows} x {given.length}, {given.tasks} task(s): "
        f"{total:.1f} ms on one thread\n"
    )
    print("| operator | nodes | ms | share |\n|---|---|---|---|")
    for name, (count, time) in table.items():
        if time > total / 200:
            print(f"| {name} | {count} | {time:.2f} | {100 * time / total:.1f} % |")


if __name__ == "__main__":
    sys.exit(guarded(main))
