"""What a prompt costs when it is served: PEFT, a seq2seq ONNX export, and this project's graphs.

    python -m benchmarks.serving --geometry small --work runs/serving --out runs/serving.json

Fairness: all sides run in one process on the same threads, in turn, round after round; a figure is
the median over rounds, a ratio the median of the rounds' own ratios, so that what else the machine
does meanwhile falls on both sides. Before anything is timed, each side's answers are proved:

- `peft` (prompt tuning, 100 virtual tokens, one `generate` step after `[pad, <extra_id_0>]`, the
  fewest it can take) against the bundle in mode `full`, which computes the same function;
- `seq2seq` (with `--seq2seq`: optimum's onnxruntime model, one `generate` step on ids of the same
  total length, prompt positions included) against torch;
- the bundle in mode `prefix` against the trainer's torch forward pass, row by row: in fp32 within
  1e-3, in int8 within three quarters of the deviation of a class's logit over texts (rounding, not
  another function).

With `--cpu` everything runs on one thread and its CPU time counts: on a machine that does other
work the ratios then still hold, where wall time would measure the neighbours.

Text is given as token ids on every side, cut from VADER's film sentences: to random pieces a
backbone that knows words says nothing (`mini`'s answers to them differ by a hundredth of what they
differ by on sentences), so that rounding would be measured against silence. The floor is the
multiply-adds of the encoder on the text alone, divided by the rate of a 2048^3 fp32 product in the
same round (the faster of torch's and onnxruntime's).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from onnx import TensorProto, helper, numpy_helper

from benchmarks.meta_training import GEOMETRIES
from benchmarks.random_t5 import write_random_t5
from exporter.export import export_bundle
from exporter.verify import Slot, reference
from serve import bundle as bundles
from serve.classifier import Classifier
from serve.cli import guarded
from serve.files import atomic_folder
from serve.tokenize import Encoded
from trainer import vader
from trainer.backbone import Backbone, backbone_folder, load_backbone
from trainer.prompt import Prompt, TaskRecord, save_prompt

TOKENS = 100  # of the prompt
TASKS = 32
WORDS = ["good", "bad"]
SHAPES = [(32, 24), (1, 24), (8, 128)]
BESIDE = "workers"
SQUARE = 2048
ROUNDED = 0.75  # deviations of a logit over texts by which int8 may be off, at most

Side = Callable[[], Any]


def make_backbone(geometry: str, work: Path) -> Backbone:
    """`mini`, or random weights in a geometry, which are kept under `work`."""
    work.mkdir(parents=True, exist_ok=True)
    if geometry != "mini" and not (work / "t5").is_dir():
        write_random_t5(work / "t5", geometry, backbone_folder("mini"))
    return load_backbone("mini" if geometry == "mini" else str(work / "t5"))


def prompt_vectors(backbone: Backbone) -> torch.Tensor:
    """Every task's prompt, [T, P, D]: embeddings of random pieces, always the same."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 16000, (TASKS, TOKENS), generator=generator)
    return backbone.t5.model.shared.weight.detach().cpu()[rows]


def make_prompts(backbone: Backbone, mode: str, count: int) -> list[Prompt]:
    """The prompts of the first `count` tasks."""
    return [
        Prompt({"prompt_embeddings": vectors.clone()},
               TaskRecord(f"task{i}", ["p", "n"], WORDS, mode=mode))
        for i, vectors in enumerate(prompt_vectors(backbone)[:count])
    ]  # fmt: skip


def prepare(geometry: str, work: Path, peft: bool = True) -> Backbone:
    """The backbone, its prompts and the two bundles under `work`, made where they are missing;
    without `peft` only what mode `prefix` needs."""
    backbone = make_backbone(geometry, work)
    kinds = [("prefix", TASKS, ("fp32", "int8")), ("full", 1, ("fp32",))]
    for mode, count, precisions in kinds if peft else kinds[:1]:
        prompts = make_prompts(backbone, mode, count)
        if mode == "full" and not (work / "prompt").is_dir():
            save_prompt(prompts[0], work / "prompt", backbone)
        if not (work / mode).is_dir():
            export_bundle(prompts, backbone, work / mode, precisions=precisions)
        elif (
            bundles.load(work / mode, verify=False).header["backbone"]["sha256"] != backbone.sha256
        ):
            raise SystemExit(
                f"{work / mode} is of other weights: name another --work, or remove it"
            )
    return backbone


def peft_side(backbone: Backbone, work: Path) -> Callable[[torch.Tensor], np.ndarray]:
    """PEFT's prompt tuning: ids [B, S] -> scores [B, C] of the label words."""
    from peft import PeftModel
    from transformers import T5ForConditionalGeneration

    # With the library's own default attention, not the eager one that training needs.
    model = T5ForConditionalGeneration.from_pretrained(backbone.folder, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(model, str(work / "prompt")).eval()
    words = backbone.tokenizer(WORDS, add_special_tokens=False)["input_ids"]
    columns = [pieces[0] for pieces in words]

    return lambda ids: one_step(tuned, backbone, ids)[:, columns]


def one_step(model: Any, backbone: Backbone, ids: torch.Tensor) -> np.ndarray:
    """One step of `generate` after [pad, <extra_id_0>]: ids [B, S] -> logits [B, V]."""
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            decoder_input_ids=backbone.decoder_ids.expand(len(ids), -1),
            max_new_tokens=1,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return out.logits[0].numpy()


def seq2seq_side(backbone: Backbone, work: Path, threads: int) -> Callable[[torch.Tensor], Any]:
    """Optimum's onnxruntime model, one step of `generate`: ids [B, P + S] -> logits [B, V]."""
    try:
        from optimum.onnxruntime import ORTModelForSeq2SeqLM
    except ImportError:
        raise SystemExit(
            "--seq2seq needs optimum-onnx, which does not go with transformers 5: in an "
            'environment of its own, pip install "optimum-onnx[onnxruntime]==0.1.0" '
            '"transformers==4.57.*" and this project'
        ) from None
    folder = work / "optimum"
    plain = {"use_cache": False, "use_merged": False}  # one step has nothing to keep
    if not folder.is_dir():
        exported = ORTModelForSeq2SeqLM.from_pretrained(backbone.folder, export=True, **plain)
        with atomic_folder(folder) as temporary:
            exported.save_pretrained(temporary)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    model = ORTModelForSeq2SeqLM.from_pretrained(folder, session_options=options, **plain)

    return lambda ids: one_step(model, backbone, ids)


def open_session(model: str | bytes, threads: int) -> ort.InferenceSession:
    """A CPU session on so many threads."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def sentences(backbone: Backbone, rows: int, length: int) -> np.ndarray:
    """Token ids [rows, length] of real sentences run together: always the same."""
    texts = vader.sentences()["film"].texts
    found = backbone.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    ids = np.concatenate([np.asarray(row, np.int64) for row in found])
    return ids[: rows * length].reshape(rows, length)


def product_sides(threads: int) -> list[Side]:
    """A large fp32 product in torch and in onnxruntime."""
    values = np.random.default_rng(0).standard_normal((2, SQUARE, SQUARE), np.float32)
    left, right = torch.from_numpy(values)
    info = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [SQUARE, SQUARE]) for name in "xy"
    ]
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = helper.make_graph(
        [node], "g", info[:1], info[1:], [numpy_helper.from_array(values[1], "w")]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    session = open_session(model.SerializeToString(), threads)
    return [lambda: left @ right, lambda: session.run(None, {"x": values[0]})]


def text_flops(backbone: Backbone, rows: int, length: int) -> float:
    """Operations (2 a multiply-add) of the encoder on the text alone: products and attention."""
    config, t5 = backbone.t5.model.config, backbone.t5
    inner = t5.heads * t5.head_width
    wide = config.d_ff * (3 if config.is_gated_act else 2)
    per_token = 2 * t5.width * (4 * inner + wide)
    attention = 2 * 2 * inner * length
    return float(t5.layers * rows * length * (per_token + attention))


def rows_of(classifier: Classifier, ids: np.ndarray, tasks: int) -> list[Encoded]:
    """Ids as the classifier's rows; row i is of task i modulo `tasks`."""
    known = list(classifier.tasks.values())
    return [Encoded(row, False, known[i % tasks]) for i, row in enumerate(ids.tolist())]


def in_batches(classifier: Classifier, rows: list[Encoded], pool: ThreadPoolExecutor) -> np.ndarray:
    """Logits [B, C] of rows in the batches that `classify` makes of them, side by side."""
    batches = classifier.batches(rows)
    found = pool.map(lambda batch: classifier.logits([rows[i] for i in batch]), batches)
    return np.concatenate(list(found))[np.argsort(np.concatenate(batches))]


def timed(side: Side, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of one call."""
    start = clock()
    side()
    return clock() - start


def prove(
    backbone: Backbone,
    sides: dict[str, Side],
    rows: int,
    length: int,
    prompts: list[dict[str, torch.Tensor]],
    columns: list[int],
    threads: int,
) -> dict[str, float]:
    """The largest differences of logits between sides that must agree, those of int8 in standard
    deviations of a class's logit over 32 texts or more; see the module's text."""
    ids = sentences(backbone, max(rows, TASKS), length).tolist()
    proof: dict[str, float] = {}
    for tasks, kind in ((1, "one task"), (TASKS, f"{TASKS} tasks")):
        asked = [Slot(prompts[i % tasks], columns) for i in range(len(ids))]
        answers = np.stack(
            [reference(backbone, "prefix", *row) for row in zip(asked, ids, strict=True)]
        )
        expected, deviation = answers[:rows], float(answers.std(0).mean())
        for name, unit in (("fp32", 1.0), ("int8", deviation)):
            side = f"prefix {name}, {kind}"
            proof[side] = float(np.abs(sides[side]() - expected).max()) / unit
            if (divided := sides.get(f"{side}, {threads} {BESIDE}")) is not None:
                proof[f"{side}, {BESIDE}"] = float(np.abs(divided() - expected).max()) / unit
    if "peft" in sides:
        gap = np.abs(sides["peft"]() - sides["full fp32"]()).max()
        proof["peft against full"] = float(gap)
    return proof


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All shapes; a JSON-ready report."""
    if arguments.cpu:
        arguments.threads = 1  # one thread's clock sees the work of that thread only
    clock = time.thread_time if arguments.cpu else time.perf_counter
    torch.set_num_threads(arguments.threads)
    work = Path(arguments.work)
    backbone = prepare(arguments.geometry, work, arguments.peft)
    threads = arguments.threads
    fp32 = Classifier(work / "prefix", threads=threads)
    int8 = Classifier(work / "prefix", "int8", threads=threads)
    # As `python -m serve http` does: a thread for each batch.
    beside = {
        name: Classifier(work / "prefix", name, threads=1, workers=threads)
        for name in ("fp32", "int8") if threads > 1
    }  # fmt: skip
    pool = ThreadPoolExecutor(threads)
    full = Classifier(work / "full", threads=threads) if arguments.peft else None
    peft = peft_side(backbone, work) if arguments.peft else None
    seq2seq = seq2seq_side(backbone, work, threads) if arguments.seq2seq else None
    products = product_sides(threads)
    columns = next(iter(fp32.tasks.values())).word_ids
    stored = bundles.load(work / "prefix", verify=False)
    prompts = [
        {"prompt_embeddings": torch.from_numpy(
            stored.read_prompt(task)["prompt_embeddings"])}
        for task in stored.tasks.values()
    ]  # fmt: skip
    report: dict[str, Any] = {
        "geometry": arguments.geometry, "threads": threads, "cpu_time": arguments.cpu,
        "repeats": arguments.repeats, "prompt_tokens": TOKENS, "shapes": {},
    }  # fmt: skip
    for shape in arguments.shapes:
        rows, length = map(int, shape.split("x"))
        ids = sentences(backbone, rows, length)
        long = torch.from_numpy(sentences(backbone, rows, TOKENS + length))
        tensor = torch.from_numpy(ids)
        sides: dict[str, Side] = {}
        if peft is not None and full is not None:
            sides["peft"] = lambda tensor=tensor: peft(tensor)
            sides["full fp32"] = lambda ids=ids: full.logits(rows_of(full, ids, 1))
        for name, classifier in (("fp32", fp32), ("int8", int8)):
            for tasks, kind in ((1, "one task"), (TASKS, f"{TASKS} tasks")):
                batch = rows_of(classifier, ids, tasks)
                sides[f"prefix {name}, {kind}"] = lambda c=classifier, b=batch: c.logits(b)
        for name, classifier in beside.items() if rows >= threads else ():
            for tasks, kind in ((1, "one task"), (TASKS, f"{TASKS} tasks")):
                batch = rows_of(classifier, ids, tasks)
                side = f"prefix {name}, {kind}, {threads} {BESIDE}"
                sides[side] = lambda c=classifier, b=batch: in_batches(c, b, pool)
        proof = prove(backbone, sides, rows, length, prompts, columns, threads)
        if seq2seq is not None:
            sides["seq2seq"] = lambda long=long: seq2seq(long)
            decoder = backbone.decoder_ids.expand(rows, -1)
            with torch.inference_mode():
                want = backbone.t5.model(input_ids=long, decoder_input_ids=decoder).logits[:, -1]
            gap = np.abs(sides["seq2seq"]() - want.numpy()).max()
            proof["seq2seq against torch"] = float(gap)
        if not all(gap <= (ROUNDED if "int8" in name else 1e-3) for name, gap in proof.items()):
            raise SystemExit(f"the sides disagree, nothing was timed: {proof}")
        samples: dict[str, list[float]] = {name: [] for name in [*sides, "floor"]}
        for _ in range(arguments.repeats):
            best = min(timed(product, clock) for product in products for _ in range(2))
            rate = 2 * SQUARE**3 / best
            samples["floor"].append(text_flops(backbone, rows, length) / rate)
            for name, side in sides.items():
                # A short call is repeated within its turn; the best call of a turn counts. The
                # first ones find the caches full of the side before.
                calls = 10 if rows == 1 else 3
                samples[name].append(min(timed(side, clock) for _ in range(calls)))
        report["shapes"][shape] = {
            "proof": proof, "seconds": samples, "summary": summary(samples)
        }  # fmt: skip
        print_table(f"{rows} x {length}", report["shapes"][shape])
    return report


def summary(samples: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Per side the median in milliseconds, and medians of the rounds' ratios."""
    result = {}
    for name, values in samples.items():
        ratio = lambda other, mine=values: statistics.median(  # noqa: E731
            a / b for a, b in zip(samples[other], mine, strict=True)
        )
        result[name] = {
            "ms": 1e3 * statistics.median(values),
            "times_the_floor": 1 / ratio("floor"),
        }
        if "peft" in samples:
            result[name]["times_faster_than_peft"] = ratio("peft")
        if "seq2seq" in samples:
            result[name]["times_faster_than_seq2seq"] = ratio("seq2seq")
    for name, many in samples.items():
        if f"{TASKS} tasks" in name:
            one = samples[name.replace(f"{TASKS} tasks", "one task")]
            result[name]["times_one_task"] = statistics.median(
                b / a for a, b in zip(one, many, strict=True)
            )
    return result


def print_table(title: str, shape: dict[str, Any]) -> None:
    """One shape as Markdown."""
    print(f"\n{title}, largest differences: {shape['proof']}\n")
    columns = {"times_the_floor": "times the floor"}
    if "peft" in shape["summary"]:
        columns["times_faster_than_peft"] = "faster than PEFT"
    if "seq2seq" in shape["summary"]:
        columns["times_faster_than_seq2seq"] = "faster than optimum"
    print(f"| side | ms | {' | '.join(columns.values())} |\n|---|---|{'---|' * len(columns)}")
    for name, figures in shape["summary"].items():
        cells = [f"{figures[key]:.2f}" for key in columns]
        print(f"| {name} | {figures['ms']:.1f} | {' | '.join(cells)} |")
    for name, figures in shape["summary"].items():
        if "times_one_task" in figures:
            print(f"\n{name}: {figures['times_one_task']:.2f} times one task")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--geometry", choices=["mini", *sorted(GEOMETRIES)], default="small")
    parser.add_argument("--work", required=True, help="folder for the model and the bundles")
    parser.add_argument("--out", required=True, help="JSON file for all figures")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--cpu", action="store_true", help="CPU time of one thread, see above")
    parser.add_argument("--shapes", nargs="+", default=[f"{b}x{s}" for b, s in SHAPES])
    parser.add_argument("--seq2seq", action="store_true", help="also optimum's model")
    parser.add_argument("--peft", action=argparse.BooleanOptionalAction, default=True,
                        help="PEFT and mode full as well; they take most of the time")  # fmt: skip
    parser.add_argument("--prepare", action="store_true", help="make the bundles and end")
    arguments = parser.parse_args()
    if arguments.prepare:
        prepare(arguments.geometry, Path(arguments.work), arguments.peft)
        return
    report = measure(arguments)
    Path(arguments.out).write_text(json.dumps(report, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    sys.exit(guarded(main))
