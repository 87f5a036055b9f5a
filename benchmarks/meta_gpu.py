"""MetaPT's outer step on a GPU: loop over tasks, batched, and batched as CUDA graphs.

    python -m benchmarks.meta_gpu --seconds 60 --out runs/meta_gpu

The sides are those of `benchmarks.meta_training`, on the same rows. In fp32 (without TF32, torch's
default) and in bf16: frozen weights in bf16, prompt, inner step and optimizer in fp32. `autocast`
is what `accelerate launch --mixed_precision bf16` gives the trainer: weights in fp32, cast at each
use. Each figure goes into OUT.json as soon as it is known, and one that fails leaves its error.

- floor: a step's operations over the rate of an 8192^3 product in bf16, measured in the same run;
- memory: the most that was allocated at once, weights and the recording of a graph included;
- training: steps as the trainer takes them, rows drawn, padded and copied, the loss read in every
  step, AdamW, through as many graphs as the lengths need.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.meta_training import (
    Batched,
    Loop,
    Setting,
    as_leaf,
    equal,
    make_model,
    make_prompt,
    make_rows,
    operations,
    parity,
    relative_difference,
)
from serve.cli import guarded
from serve.files import atomic_write, write_json
from trainer.graphs import OuterGraphs
from trainer.meta import Outcome, TaskSampler
from trainer.readout import Batch, collate
from trainer.t5 import unpacked

PAPER_STEPS = 20_000
WEIGHTS = {"fp32": torch.float32, "bf16": torch.bfloat16, "autocast": torch.float32}


class Bench:
    """Measures, and writes down at once what it has measured."""

    def __init__(self, given: argparse.Namespace):
        self.given, self.device = given, given.device
        self.cuda = self.device.startswith("cuda")
        self.setting = Setting(given.tasks, given.samples, given.prompt_tokens)
        self.started = time.monotonic()
        self.results: list[dict[str, Any]] = []
        self.work: dict[tuple[str, str], dict[str, int]] = {}
        self.facts: dict[str, Any] = {**vars(given), "torch": torch.__version__}
        if self.cuda:
            self.facts["gpu"] = torch.cuda.get_device_name()

    # -- bookkeeping -----------------------------------------------------------------------------

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def clean(self) -> None:
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def memory(self) -> float:
        """GiB, the most allocated since `clean`."""
        return torch.cuda.max_memory_allocated() / 2**30 if self.cuda else 0.0

    def write(self) -> None:
        self.facts["seconds_taken"] = time.monotonic() - self.started
        found = {"facts": self.facts, "results": self.results}
        write_json(Path(self.given.out).with_suffix(".json"), found)

    def attempt(self, what: dict[str, Any], work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `work` measured beside `what`; its error where it has one, so that others go on."""
        name = " ".join(str(value) for value in what.values())
        if time.monotonic() - self.started > self.given.seconds:
            found: dict[str, Any] = {"error": "no time left"}
        else:
            self.clean()
            began = time.monotonic()
            try:
                found = work()
            except Exception as error:
                traceback.print_exc()
                found = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
            found["took"] = round(time.monotonic() - began, 2)
        self.results.append({**what, **found})
        shown = {key: short(value) for key, value in found.items() if key != "all_seconds"}
        print(f"[{time.monotonic() - self.started:5.1f} s] {name}: {shown}", flush=True)
        self.write()
        return found

    # -- parts -----------------------------------------------------------------------------------

    def product_rate(self) -> None:
        """Operations a second of a square product in bf16, the best of some."""
        size = self.given.product
        a = torch.randn(size, size, device=self.device, dtype=torch.bfloat16)
        rates = []
        for _ in range(8):
            self.wait()
            started = time.perf_counter()
            for _ in range(4):
                a @ a
            self.wait()
            rates.append(4 * 2 * size**3 / (time.perf_counter() - started))
        self.facts["product_rate"] = max(rates)
        print(f"bf16 product: {max(rates) / 1e12:.0f} TFLOP/s", flush=True)

    def parity(self, name: str, mode: str) -> dict[str, Any]:
        setting = Setting(2, self.setting.samples, self.setting.prompt_tokens)
        found = parity(name, mode, setting, self.device)
        if not equal(found):
            raise SystemExit(f"{name}, {mode}: the sides' gradients differ: {found}")
        return {"differences": found}

    def times(self, name: str, mode: str) -> None:
        """All sides of a geometry and mode, one precision after another."""
        reference: Tensor | None = None
        for precision in WEIGHTS:
            if precision == "autocast" and name != self.given.train:
                continue
            what = {"part": "step", "geometry": name, "mode": mode, "precision": precision}
            found: dict[str, Any] = {}

            def work(precision: str = precision, found: dict[str, Any] = found) -> dict[str, Any]:
                found.update(self._sides(name, mode, precision))
                return {key: value for key, value in found.items() if key != "gradient"}

            result = self.attempt(what, work)
            gradient = found.get("gradient")
            if gradient is None:
                continue
            if precision == "fp32":
                reference = gradient.cpu()
            elif reference is not None:
                result["to_fp32"] = self.results[-1]["to_fp32"] = relative_difference(
                    gradient.cpu(), reference
                )
                print(f"        gradient differs from fp32 by {result['to_fp32']:.3g}", flush=True)
                self.write()

    def _sides(self, name: str, mode: str, precision: str) -> dict[str, Any]:
        model = make_model(name, WEIGHTS[precision], self.device)
        prompt = make_prompt(model, self.setting.prompt_tokens)
        batched = Batched(model, mode, self.setting)
        on_cpu = batched.support, batched.query
        batched.to(self.device)
        loop = Loop(model, mode, self.setting).to(self.device)
        leaf = as_leaf(prompt)
        graphs = OuterGraphs(leaf)
        kind = torch.device(self.device).type

        def replay() -> Tensor:
            graphs.step(lambda s, q: batched.losses(leaf, s, q), *on_cpu)
            gradient = leaf["prompt_embeddings"].grad
            assert gradient is not None
            return gradient

        sides: dict[str, tuple[Callable[[], Tensor], int]] = {
            "loop": (lambda: loop.step(prompt), 1),
            "batched": (lambda: batched.step(prompt), 2),
            "graphs": (replay, 3 if precision == "fp32" else 10),
        }
        if precision == "autocast":
            sides.pop("loop")
        found: dict[str, Any] = {"memory": {}, "gradient": None}
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        gradients = {}
        with torch.autocast(kind, torch.bfloat16, enabled=precision == "autocast"):
            for side, (run, _) in sides.items():  # the first run, which allocates
                self.clean()
                gradients[side] = run().clone()
                self.wait()
                found["memory"][side] = self.memory()
            for _ in range(self.given.rounds):
                for side, (run, count) in sides.items():
                    self.wait()
                    started = time.perf_counter()
                    for _ in range(count):
                        run()
                    self.wait()
                    seconds[side].append((time.perf_counter() - started) / count)
            if (name, mode) not in self.work:  # the same in every precision
                work = {"operations": operations(lambda: batched.step(prompt))}
                with unpacked():
                    work["operations_with_padding"] = operations(lambda: batched.step(prompt))
                self.work[name, mode] = work
        middle = {side: statistics.median(values) for side, values in seconds.items()}
        found |= {
            "seconds": middle, "all_seconds": seconds, "plain_because": graphs.reason,
            "steps_minutes": PAPER_STEPS * middle["graphs"] / 60,
            "graphs_to_batched": relative_difference(gradients["graphs"], gradients["batched"]),
            "gradient": gradients["graphs"],
        }  # fmt: skip
        if "loop" in middle:
            found["speedup"] = {k: middle["loop"] / v for k, v in middle.items() if k != "loop"}
            found["batched_to_loop"] = relative_difference(gradients["batched"], gradients["loop"])
        found |= self.work[name, mode]
        found["floor"] = found["operations"] / self.facts["product_rate"]
        return found

    def training(self, name: str, mode: str) -> dict[str, Any]:
        """Steps one after another on rows drawn anew, as the trainer takes them."""
        steps, setting = self.given.steps, self.setting
        model = make_model(name, torch.bfloat16, self.device)
        leaf = as_leaf(make_prompt(model, setting.prompt_tokens))
        batched = Batched(model, mode, setting).to(self.device)
        graphs = OuterGraphs(leaf)
        pool = Setting(setting.tasks, 100, setting.prompt_tokens)  # 200 rows a cluster
        rows, labels = make_rows(pool, model.config.vocab_size)
        sampler = TaskSampler(np.arange(len(rows)) % setting.tasks, labels, setting.samples)
        optimizer = torch.optim.AdamW(list(leaf.values()), lr=1e-4)

        def draw(step: int) -> tuple[Batch, Batch]:
            first, second = (
                collate([rows[i] for i in part], labels[part]) for part in sampler.draw(0, step)
            )
            return first, second

        each, losses, drawing = [], [], 0.0
        for step in range(steps):
            started = time.perf_counter()
            optimizer.zero_grad(set_to_none=True)
            support, query = draw(step)
            drawing += time.perf_counter() - started
            figures = graphs.step(lambda s, q: batched.losses(leaf, s, q), support, query)
            losses.append(Outcome.of(figures).loss)  # waits for the device
            optimizer.step()
            each.append(time.perf_counter() - started)
        self.wait()
        memory, middle = self.memory(), statistics.median(each)
        # A step that recorded a graph stands out; a long run has the same few.
        recorded = sum(value for value in each if value > 5 * middle)
        usual = [value for value in each if value <= 5 * middle]
        rate = len(usual) / sum(usual)
        return {
            "steps": steps, "steps_a_second": rate, "median": middle, "drawing": drawing / steps,
            "recording": recorded, "graphs": len(graphs._known), "plain_because": graphs.reason,
            "steps_minutes": (PAPER_STEPS / rate + recorded) / 60, "memory": memory,
            "kernels": kernels(
                lambda: graphs.step(lambda s, q: batched.losses(leaf, s, q), support, query)
            ),
            "loss": [losses[0], losses[-1]], "finite": bool(np.isfinite(losses).all()),
        }  # fmt: skip

    def shape(self, name: str, mode: str) -> dict[str, Any]:
        """A large geometry in bf16: a few steps, time and memory; fewer tasks at once where all do
        not fit, their gradients summed."""
        model = make_model(name, torch.bfloat16, self.device)
        prompt = make_prompt(model, self.setting.prompt_tokens)
        tasks = self.setting.tasks
        while True:
            setting = Setting(tasks, self.setting.samples, self.setting.prompt_tokens)
            batched = Batched(model, mode, setting).to(self.device)
            self.clean()
            weights = self.memory()
            try:
                batched.step(prompt)
                break
            except torch.OutOfMemoryError:
                if tasks == 1:
                    raise
            tasks = (tasks + 1) // 2
        memory, seconds = self.memory(), []
        for _ in range(3):
            self.wait()
            started = time.perf_counter()
            gradient = batched.step(prompt)
            self.wait()
            seconds.append(time.perf_counter() - started)
        work = operations(lambda: batched.step(prompt))
        return {
            "tasks_at_once": tasks, "seconds": min(seconds), "memory": memory, "weights": weights,
            "seconds_of_all_tasks": min(seconds) * self.setting.tasks / tasks,
            "operations": work, "floor": work / self.facts["product_rate"],
            "finite": bool(gradient.isfinite().all()),
        }  # fmt: skip

    def run(self) -> None:
        given = self.given
        for name in given.parity:
            for mode in given.modes:
                what = {"part": "parity", "geometry": name, "mode": mode}
                self.attempt(what, lambda n=name, m=mode: self.parity(n, m))  # type: ignore[misc]
        self.product_rate()
        for mode in given.modes:
            what = {"part": "training", "geometry": given.train, "mode": mode}
            self.attempt(what, lambda mode=mode: self.training(given.train, mode))  # type: ignore[misc]
        for name in given.geometry[:2]:
            for mode in given.modes:
                self.times(name, mode)
        for name in given.shapes:
            for mode in given.modes:
                what = {"part": "shape", "geometry": name, "mode": mode}
                self.attempt(what, lambda n=name, m=mode: self.shape(n, m))  # type: ignore[misc]
        for name in given.geometry[2:]:  # what a run that gets late may leave out
            for mode in given.modes:
                self.times(name, mode)


def kernels(run: Callable[[], object], most: int = 12) -> dict[str, float]:
    """Milliseconds of a step by kernel, the longest ones: they say what to do next."""
    try:
        with torch.profiler.profile() as profile:
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        spent = {
            event.key[:70]: event.self_device_time_total / 1e3
            for event in profile.key_averages()
            if event.device_type == torch.autograd.DeviceType.CUDA  # not the call that started it
        }
    except Exception as error:  # it is not what was asked for
        print(f"no profile: {error}", flush=True)
        return {}
    longest = sorted(spent, key=lambda name: -spent[name])[:most]
    return {"all": sum(spent.values()), **{name: spent[name] for name in longest}}


def short(value: Any) -> Any:
    """Four digits are enough to look at."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: short(inner) for key, inner in value.items()}
    return [short(inner) for inner in value] if isinstance(value, list) else value


def as_table(results: list[dict[str, Any]]) -> str:
    """The results as Markdown, a table for each part."""
    lines = []
    for part in ("step", "training", "shape", "parity"):
        rows = [
            {k: v for k, v in row.items() if k not in ("part", "all_seconds", "took", "kernels")}
            for row in results
            if row["part"] == part
        ]
        heads = list(dict.fromkeys(key for row in rows for key in row))
        if not rows:
            continue
        lines += ["", f"{part}:", "", "| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
        for row in rows:
            cells = (short(row.get(head, "")) for head in heads)
            shown = (
                ", ".join(f"{k} {v}" for k, v in cell.items()) if isinstance(cell, dict) else cell
                for cell in cells
            )
            lines.append("| " + " | ".join(str(cell).replace("|", "/") for cell in shown) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--geometry", nargs="*", default=["base", "small", "mini"])
    parser.add_argument("--train", default="base", help="the geometry of the training")
    parser.add_argument("--shapes", nargs="*", default=["large", "xl"])
    parser.add_argument("--parity", nargs="*", default=["small", "mini"])
    parser.add_argument("--modes", nargs="+", default=["full", "prefix"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=300, help="of the training")
    parser.add_argument("--tasks", type=int, default=10)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=100)
    parser.add_argument("--product", type=int, default=8192, help="side of the product")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=60.0, help="nothing is begun after that")
    parser.add_argument("--out", default="runs/meta_gpu", help="writes OUT.json and OUT.md")
    bench = Bench(parser.parse_args())
    bench.run()
    table = as_table(bench.results)
    with atomic_write(Path(bench.given.out).with_suffix(".md")) as temporary:
        temporary.write_text(table)
    print(table)


if __name__ == "__main__":
    sys.exit(guarded(main))
