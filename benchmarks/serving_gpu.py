"""What a prompt costs when it is served on a GPU: PEFT against this project's graphs.

    python -m benchmarks.serving_gpu --geometry small mini --work runs/gpu --out runs/gpu.json

As `benchmarks.serving`: all sides in one process, in turn, round after round; a figure is the
median over rounds, a ratio the median of the rounds' own ratios. Every side is given token ids on
the host and ends with the label words' logits on the host, so that copies and the wait for the
device are in its time. PEFT is timed as it is used (one step of `generate`) and without what
`generate` does around it (`forward`). Before anything is timed the answers are compared:

- each side with the trainer's torch forward pass on the same device, in mode `full` for PEFT: in
  fp32 (no TF32 on either side) within 1e-3;
- fp16 in standard deviations of a class's logit over texts: within a quarter, a third of what int8
  is allowed. It rounds weights and what flows between products to 2^-11, where int8 has 2^-7 and
  2^-8; what PEFT's own half precision is off by is printed beside it, and not bounded.

A side that fails or disagrees is told of (its traceback goes to OUT.log) and left out, and the
others go on. The report is written after each part, and past `--seconds` no further part begins.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from transformers import T5ForConditionalGeneration

from benchmarks.meta_training import GEOMETRIES
from benchmarks.onnx_cuda import graphed, placement
from benchmarks.serving import (
    TASKS,
    WORDS,
    Side,
    make_backbone,
    make_prompts,
    prompt_vectors,
    rows_of,
    timed,
)
from exporter.export import export_bundle
from serve.classifier import Classifier
from serve.cli import guarded
from serve.engine import CPU, CUDA
from trainer import vader
from trainer.backbone import Backbone
from trainer.prompt import save_prompt
from trainer.readout import Batch, class_scores

SHAPES = [(32, 24), (1, 24), (8, 128), (256, 24)]
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
OURS = ("fp32", "fp16")  # the exporter has no bf16: docs/speed.md says why
EXACT, ROUNDED = 1e-3, 0.25  # see the module's text
TEXTS = 4000
# Token budget, rows of a batch, workers.
BATCHES = [(2048, 32, 1), (16384, 256, 1), (16384, 256, 2)]
ONE, MANY = "one task", f"{TASKS} tasks"


class Report:
    """Figures as they come, in a file; failures told and passed over."""

    def __init__(self, out: Path, seconds: float) -> None:
        self.out, self.end = out, time.monotonic() + seconds
        self.values: dict[str, Any] = {"failures": []}
        self.log = out.with_suffix(".log")
        self.log.write_text("", "utf-8")

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A part of the work that may fail without ending the rest."""
        start = time.monotonic()
        try:
            if start > self.end:
                raise TimeoutError("--seconds are over")
            yield
        except Exception as error:  # a benchmark of one call goes on, whatever failed
            first = str(error).strip().splitlines()[0] if str(error).strip() else ""
            print(f"\nFAILED {name}: {type(error).__name__}: {first[:300]}", flush=True)
            self.values["failures"].append({"part": name, "error": repr(error)[:2000]})
            with self.log.open("a", encoding="utf-8") as file:
                file.write(f"== {name}\n{traceback.format_exc()}\n")
        if (seconds := time.monotonic() - start) > 1:
            print(f"({name}: {seconds:.1f} s)", flush=True)
        self.out.write_text(json.dumps(self.values, indent=1) + "\n", "utf-8")


def prepare(geometry: str, work: Path, modes: list[str], report: Report) -> Backbone:
    """The backbone and the bundles `prefix` (32 tasks) and `full` (one) under `work`, those that
    are there already as they are."""
    backbone = make_backbone(geometry, work)
    for mode in ("full", "prefix"):
        with report.part(f"{geometry}: mode {mode}"):
            prompts = make_prompts(backbone, mode, TASKS if mode == "prefix" else 1)
            if mode == "full" and not (work / "prompt").is_dir():
                save_prompt(prompts[0], work / "prompt", backbone)
            for precisions in (
                (OURS, OURS[:1]) if mode in modes else ()
            ):  # without half precision where that fails
                with report.part(f"{geometry}: export of mode {mode}, {', '.join(precisions)}"):
                    if not (work / mode).is_dir():
                        export_bundle(prompts, backbone, work / mode, precisions=precisions)
    return backbone


def film_sentences(path: str | None) -> list[str]:
    """VADER's film sentences, from a file with one in each line where pip cannot fetch them."""
    if path is not None:
        return Path(path).read_text("utf-8").splitlines()
    return vader.sentences()["film"].texts


def peft_sides(
    backbone: Backbone, work: Path, device: str, dtype: torch.dtype
) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """PEFT's prompt tuning, by `generate` and by `forward`: ids [B, S] -> [B, C] on the host."""
    from peft import PeftModel

    model = T5ForConditionalGeneration.from_pretrained(backbone.folder, dtype=dtype)
    tuned = PeftModel.from_pretrained(model, str(work / "prompt")).to(device).eval()
    words = backbone.tokenizer(WORDS, add_special_tokens=False)["input_ids"]
    columns = torch.tensor([pieces[0] for pieces in words], device=device)
    decoder = backbone.decoder_ids.to(device)

    @torch.inference_mode()
    def generate(ids: np.ndarray) -> np.ndarray:
        there = torch.from_numpy(ids).to(device)
        out = tuned.generate(
            input_ids=there, attention_mask=torch.ones_like(there),
            decoder_input_ids=decoder.expand(len(ids), -1), max_new_tokens=1, do_sample=False,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        return out.logits[0][:, columns].float().cpu().numpy()

    @torch.inference_mode()
    def forward(ids: np.ndarray) -> np.ndarray:
        there = torch.from_numpy(ids).to(device)
        out = tuned(
            input_ids=there, attention_mask=torch.ones_like(there),
            decoder_input_ids=decoder.expand(len(ids), -1), use_cache=False,
        )  # fmt: skip
        return out.logits[:, -1, columns].float().cpu().numpy()

    return {"peft generate": generate, "peft forward": forward}


@torch.no_grad()
def reference(
    backbone: Backbone, mode: str, vectors: torch.Tensor, ids: np.ndarray, device: str
) -> np.ndarray:
    """[B, C] by the trainer; row i of `ids` has prompt i modulo T of `vectors` [T, P, D]."""
    result, tasks = np.zeros((len(ids), len(WORDS)), np.float32), len(vectors)
    pieces = backbone.tokenizer(WORDS, add_special_tokens=False)["input_ids"]
    words = torch.tensor([piece[0] for piece in pieces], device=device)
    for number in range(min(tasks, len(ids))):
        rows = torch.from_numpy(ids[number::tasks]).to(device)
        params = {"prompt_embeddings": vectors[number : number + 1].to(device)}
        batch = Batch(rows, torch.ones_like(rows, dtype=torch.bool))
        decoder = backbone.decoder_ids.to(device)
        scores = class_scores(backbone.t5, mode, params, batch, words, decoder)
        result[number::tasks] = scores.float().cpu().numpy()
    return result


class Bench:
    """One geometry on one device."""

    def __init__(self, geometry: str, given: argparse.Namespace, report: Report) -> None:
        self.geometry, self.given, self.report = geometry, given, report
        self.work = Path(given.work) / geometry
        self.device = given.device
        self.backbone = prepare(geometry, self.work, given.modes, report)
        self.figures: dict[str, Any] = {"shapes": {}}
        report.values[geometry] = self.figures
        self.backbone.t5.model.to(self.device)
        self.texts = film_sentences(given.sentences)
        found = self.backbone.tokenizer(self.texts, add_special_tokens=False, verbose=False)
        self.stream = np.concatenate([np.asarray(row, np.int64) for row in found["input_ids"]])
        self.ours: dict[tuple[str, str], Classifier] = {}
        self.peft: dict[tuple[str, str], Callable[[np.ndarray], np.ndarray]] = {}
        for name in OURS:
            for mode in given.modes:
                with report.part(f"{geometry}: session of {mode} {name}"):
                    self.ours[mode, name] = self.classifier(mode, name)
        for name, dtype in PRECISIONS.items():
            with report.part(f"{geometry}: PEFT in {name}"):
                sides = peft_sides(self.backbone, self.work, self.device, dtype)
                self.peft.update({(kind, name): side for kind, side in sides.items()})

    def classifier(self, mode: str, name: str, **more: Any) -> Classifier:
        """A warm classifier on the device, or a failure."""
        provider = [CUDA if self.device == "cuda" else CPU]
        made = Classifier(self.work / mode, name, providers=provider, verify=False, **more)
        made.warm()
        return made

    def ids(self, rows: int, length: int) -> np.ndarray:
        """Token ids [rows, length] of sentences run together: always the same."""
        size = rows * length
        return np.resize(self.stream, size).reshape(rows, length)

    def sides(self, rows: int, length: int) -> dict[str, Side]:
        """Every side for a shape, by name."""
        ids, sides = self.ids(rows, length), dict[str, Side]()
        for (kind, name), call in self.peft.items():
            sides[f"{kind}, {name}"] = lambda call=call: call(ids)
        for (mode, name), made in self.ours.items():
            for tasks, kind in ((1, ONE), (TASKS, MANY)) if mode == "prefix" else ((1, ONE),):
                batch = rows_of(made, ids, tasks)
                sides[f"{mode}, {name}, {kind}"] = lambda made=made, batch=batch: made.logits(batch)
        if rows == 1 and self.device == "cuda":
            for name in OURS:
                with self.report.part(f"{self.geometry}: a CUDA graph in {name}"):
                    made = self.ours["prefix", name]
                    side = graphed(made, rows_of(made, ids, 1))
                    side()
                    sides[f"prefix, {name}, {ONE}, CUDA graph"] = side
        return sides

    def prove(self, sides: dict[str, Side], rows: int, length: int) -> dict[str, float]:
        """The differences of the sides, those of half precision in deviations; who is beyond the
        bound is taken out of `sides`."""
        ids, proof = self.ids(max(rows, TASKS), length), dict[str, float]()
        vectors = prompt_vectors(self.backbone)
        expected = {
            ONE: reference(self.backbone, "prefix", vectors[:1], ids, self.device),
            MANY: reference(self.backbone, "prefix", vectors, ids, self.device),
            "full": reference(self.backbone, "full", vectors[:1], ids, self.device),
        }
        for side in list(sides):
            with self.report.part(f"{self.geometry}, {rows} x {length}: {side}"):
                kind = "full" if "prefix" not in side else ONE if ONE in side else MANY
                wanted, exact = expected[kind], "fp32" in side
                gap = float(np.abs(sides[side]() - wanted[:rows]).max())
                proof[side] = gap = gap if exact else gap / float(wanted.std(0).mean())
                # What PEFT makes of half precision is its own; ours is held to the bound.
                bound = EXACT if exact else math.inf if "peft" in side else ROUNDED
                if not gap <= bound:
                    raise ValueError(f"off by {gap:.2g}, allowed are {bound:g}: not timed")
                for _ in range(2):
                    sides[side]()  # what only the first calls do
                continue
            del sides[side]
        return proof

    def shape(self, rows: int, length: int) -> None:
        """Prove, time and print one shape."""
        sides = self.sides(rows, length)
        proof = self.prove(sides, rows, length)
        samples: dict[str, list[float]] = {name: [] for name in sides}
        calls = 10 if rows == 1 else 3
        for _ in range(self.given.repeats):
            for name, side in sides.items():
                samples[name].append(min(timed(side) for _ in range(calls)))
        self.figures["shapes"][f"{rows}x{length}"] = {"proof": proof, "seconds": samples}
        print(f"\n{self.geometry}, {rows} x {length}, {self.device}\n")
        print("| side | ms | texts/s | times generate | times forward | off by |")
        print("|---|---|---|---|---|---|")
        for name, mine in samples.items():
            precision = next(p for p in PRECISIONS if p in name)
            middle = statistics.median(mine)
            cells = [f"{1e3 * middle:.2f}", f"{rows / middle:.0f}"]
            for other in ("peft generate", "peft forward"):
                theirs = samples.get(f"{other}, {precision}")
                ratio = theirs and statistics.median(
                    a / b for a, b in zip(theirs, mine, strict=True)
                )
                cells.append(f"{ratio:.2f}" if ratio else "")
            print(f"| {name} | {' | '.join(cells)} | {proof[name]:.1e} |")

    def run_cost(self) -> None:
        """What a run costs besides its tokens, in tokens: `serve.classifier._RUN_COST_CUDA`."""
        shapes = self.figures["shapes"]
        for name in OURS:
            side = f"prefix, {name}, {ONE}"
            small, large = (
                statistics.median(shapes[f"{rows}x24"]["seconds"][side]) for rows in (1, 256)
            )
            tokens = 24 * 255 * small / (large - small)
            self.figures.setdefault("run_cost_tokens", {})[name] = tokens
            print(f"\n{self.geometry} {name}: a run costs as much as {tokens:.0f} tokens more")

    def renewal(self) -> None:
        """What a change of the bank costs: the whole of it is copied to the device again."""
        bank = self.ours["prefix", "fp32"].bank
        seconds = statistics.median(timed(bank._publish) for _ in range(5))
        size = len(bank) * bank.slot_bytes / 2**20
        self.figures["bank"] = {"mib": size, "renewal_ms": 1e3 * seconds}
        print(f"\n{self.geometry}: a bank of {size:.0f} MiB is renewed in {1e3 * seconds:.1f} ms")

    def throughput(self) -> None:
        """`classify` on sentences, tokenizing included."""
        texts = (self.texts * (TEXTS // len(self.texts) + 1))[: self.given.texts]
        print(f"\n{self.geometry}: classify, {len(texts)} sentences\n")
        print("| precision | tasks | token budget | rows | workers | texts/s |")
        print("|---|---|---|---|---|---|")
        found = self.figures.setdefault("classify", [])
        for name in OURS:
            for budget, rows, workers in BATCHES:
                made = self.ours["prefix", name]
                if workers != made.workers:
                    made = self.classifier("prefix", name, workers=workers)
                made.limits = replace(made.limits, tokens=budget, rows=rows)
                names = list(made.tasks)
                for tasks in (1, TASKS):
                    asked = [names[i % tasks] for i in range(len(texts))]
                    made.classify(texts, asked)  # the first time memory is taken
                    side = lambda made=made, asked=asked: made.classify(texts, asked)  # noqa: E731
                    row = [
                        name,
                        tasks,
                        budget,
                        rows,
                        workers,
                        len(texts) / min(map(timed, [side] * 2)),
                    ]
                    found.append(row)
                    print(f"| {' | '.join(map(str, row[:-1]))} | {row[-1]:.0f} |", flush=True)
        encode = timed(lambda: made.encoder.encode(texts, [made.tasks[names[0]]] * len(texts)))
        self.figures["tokenize_texts_per_s"] = len(texts) / encode
        print(f"\ntokenizing alone: {len(texts) / encode:.0f} texts/s")

    def all(self) -> None:
        """Every part, each for itself."""
        part = self.report.part
        for shape in self.given.shapes:
            with part(f"{self.geometry}: {shape}"):
                self.shape(*map(int, shape.split("x")))
        for name in OURS:
            for tasks in (1, TASKS):
                with part(f"{self.geometry}: placement of {name}, {tasks} tasks"):
                    made = self.ours["prefix", name]
                    found = placement(made, rows_of(made, self.ids(32, 24), tasks), self.work)
                    self.figures.setdefault("placement", {})[f"{name}, {tasks}"] = found
                    print(f"\n{self.geometry} {name}, {tasks} tasks: {json.dumps(found)}")
        for name, work in (("run cost", self.run_cost), ("bank", self.renewal),
                           ("classify", self.throughput)):  # fmt: skip
            with part(f"{self.geometry}: {name}"):
                work()


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--geometry", nargs="+", choices=["mini", *sorted(GEOMETRIES)],
                        default=["small", "mini"])  # fmt: skip
    parser.add_argument("--work", required=True, help="folder for the models and the bundles")
    parser.add_argument("--out", required=True, help="JSON file for all figures")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--modes", nargs="+", choices=["prefix", "full"],
                        default=["prefix", "full"])  # fmt: skip
    parser.add_argument("--prepare", action="store_true", help="make the bundles and end")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--texts", type=int, default=TEXTS, help="sentences for `classify`")
    parser.add_argument("--shapes", nargs="+", default=[f"{b}x{s}" for b, s in SHAPES])
    parser.add_argument("--sentences", help="a file of VADER's film sentences, one in each line")
    parser.add_argument("--seconds", type=float, default=1e9, help="when no part begins any more")
    given = parser.parse_args()
    out = Path(given.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    report = Report(out, given.seconds)
    if given.prepare:
        for geometry in given.geometry:
            prepare(geometry, Path(given.work) / geometry, given.modes, report)
        return
    card = torch.cuda.get_device_name() if given.device == "cuda" else "CPU"
    report.values |= {"device": card, "torch": torch.__version__, "onnxruntime": ort.__version__}
    print(f"{card}, torch {torch.__version__}, onnxruntime {ort.__version__}")
    for geometry in given.geometry:
        with report.part(geometry):
            Bench(geometry, given, report).all()


if __name__ == "__main__":
    sys.exit(guarded(main))
