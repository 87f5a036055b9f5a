"""From prompts and a frozen backbone to a bundle, verified before it appears."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
from tokenizers import Tokenizer

from exporter.edit import check_out
from exporter.graph import ServedGraph
from exporter.measure import Validation, answer, compare, load_validation, refuse
from exporter.precision import PRECISIONS, fp16_onnx, int8_onnx
from exporter.record import bundle_arrays, task_name, task_record
from exporter.trace import WeightsFile
from exporter.traced import served_graphs
from exporter.verify import Slot, bank, check, difference, run, session
from serve import bundle as bundles
from serve.errors import UserError
from serve.files import atomic_folder
from trainer.backbone import Backbone
from trainer.prompt import Prompt, check_fits, load_prompt

log = logging.getLogger(__name__)

MAX_TOKENS = 512  # longest row of a bundle, template included; T5's positions are relative
WEIGHTS = "weights.data"


@dataclass
class Job:
    """Prompts that are exported together.

    Attributes:
        names: of the tasks; records: for `serve.bundle.add_task`; slots: for verification.
        mode: the one attention mode of all prompts.
        tokens: P, the longest prompt the graph takes.
    """

    names: list[str]
    prompts: list[Prompt]
    records: list[dict[str, Any]]
    slots: list[Slot]
    mode: str
    tokens: int


def prepare(
    prompts: Sequence[Path | str | Prompt],
    backbone: Backbone,
    *,
    names: Sequence[str] = (),
    prompt_tokens: int | None = None,
) -> Job:
    """Read the prompts and check that they go together.

    Raises:
        UserError: none is given, one does not fit the backbone, modes differ, names repeat.
    """
    if not prompts:
        raise UserError("PROMPTS is missing: pass at least one prompt folder")
    if names and len(names) != len(prompts):
        raise UserError(f"--names has {len(names)} names for {len(prompts)} prompts")
    tokenizer = rust_tokenizer(backbone)
    loaded, chosen, records, slots = [], [], [], []
    for index, item in enumerate(prompts):
        prompt = item if isinstance(item, Prompt) else load_prompt(item)
        source = f"prompt '{prompt.task.name}'" if isinstance(item, Prompt) else str(item)
        check_fits(prompt, backbone, source)
        name = task_name(names[index] if names else prompt.task.name)
        if name in chosen:
            raise UserError(f"two prompts are named '{name}': tell them apart with --names")
        record = task_record(vars(prompt.task), tokenizer, source)
        params = {key: value.detach().cpu().float() for key, value in prompt.params.items()}
        slots.append(Slot(params, record["word_ids"], record["prefix_ids"], record["suffix_ids"]))
        loaded.append(prompt)
        chosen.append(name)
        records.append(record)
    modes = {prompt.task.mode for prompt in loaded}
    if len(modes) > 1:
        raise UserError(
            f"the prompts are of modes {', '.join(sorted(modes))}, but a bundle has one: export a "
            "bundle for each mode"
        )
    longest = max(prompt.tokens for prompt in loaded)
    if prompt_tokens is not None and prompt_tokens < longest:
        raise UserError(f"--prompt-tokens {prompt_tokens} is less than a prompt's {longest}")
    return Job(chosen, loaded, records, slots, modes.pop(), prompt_tokens or longest)


def rust_tokenizer(backbone: Backbone) -> Tokenizer:
    """The backbone's tokenizer as the `tokenizers` library has it.

    Raises:
        UserError: it has only a Python form.
    """
    inner = getattr(backbone.tokenizer, "backend_tokenizer", None)
    if not isinstance(inner, Tokenizer):
        raise UserError(f"backbone '{backbone.name}' has no tokenizer.json: save a fast tokenizer")
    plain = Tokenizer.from_str(inner.to_str())
    plain.no_padding()
    plain.no_truncation()
    return plain


def export_bundle(
    prompts: Sequence[Path | str | Prompt],
    backbone: Backbone,
    out: Path | str,
    *,
    names: Sequence[str] = (),
    precisions: Sequence[str] = ("fp32",),
    prompt_tokens: int | None = None,
    max_tokens: int = MAX_TOKENS,
    int8_target: str = "any",
    validation: str | None = None,
    task: str | None = None,
    text_column: str | None = None,
    label_column: str = "label",
    force: bool = False,
) -> bundles.Bundle:
    """Write a bundle of these prompts, whole or not at all.

    Args:
        prompts: prompt folders, or prompts in memory, all of one mode.
        names: of the tasks; by default the names in the prompts' records.
        precisions: of `exporter.precision.PRECISIONS`; fp32 is always in a bundle.
        prompt_tokens: P of the graph, so that longer prompts can be added later.
        max_tokens: longest row that the bundle takes, template included.
        int8_target: see `exporter.precision.int8_onnx`.
        validation: a labelled file on which every other precision is measured; `task` names its
            task, `text_column` (None: the task's own) and `label_column` its columns.
        force: keep a precision that loses more than half a point of accuracy.

    Raises:
        UserError: what was asked for does not fit together.
        Failure: the graph cannot be traced, differs from torch by more than 1e-4, or a precision
            loses too much.
    """
    out = Path(out)
    check_out(out)
    for name in precisions:
        if name not in PRECISIONS:
            raise UserError(f"--precision '{name}' is unknown: use {', '.join(PRECISIONS)}")
    job = prepare(prompts, backbone, names=names, prompt_tokens=prompt_tokens)
    tokenizer = rust_tokenizer(backbone)
    texts = None
    if validation is not None:
        texts = load_validation(
            validation, task, job.names, job.records,
            [prompt.task.as_task() for prompt in job.prompts], tokenizer, max_tokens, text_column,
            label_column,
        )  # fmt: skip
    log.info("exporting %s: mode %s, %d prompt tokens", backbone.name, job.mode, job.tokens)
    served = ServedGraph(backbone.t5, backbone.decoder_ids, job.mode, job.tokens).eval()
    with atomic_folder(out) as folder:
        weights = WeightsFile(folder / WEIGHTS)
        with weights:
            model, prefix = served_graphs(served, backbone)
            _save(folder / "model.onnx", weights.place(model))
            if prefix is not None:
                _save(folder / "prefix.onnx", weights.place(prefix))
        tokenizer.save(str(folder / "tokenizer.json"))
        measured = _measure(
            folder, job, backbone, precisions, weights, max_tokens, int8_target, texts, force
        )
        bundles.create(folder, _header(job, backbone, max_tokens, measured))
        for name, record, slot in zip(job.names, job.records, job.slots, strict=True):
            arrays = {key: value.numpy() for key, value in slot.params.items()}
            bundles.add_task(folder, name, record, bundle_arrays(arrays))
    return bundles.load(out, verify=False)


def _measure(
    folder: Path,
    job: Job,
    backbone: Backbone,
    precisions: Sequence[str],
    weights: WeightsFile,
    max_tokens: int,
    int8_target: str,
    texts: Validation | None,
    force: bool,
) -> dict[str, dict[str, Any]]:
    """Verify the fp32 graph, make and measure the others; the `precisions` of the header."""
    prefix = session(folder / "prefix.onnx") if job.mode == "prefix" else None
    values = bank(job.slots, job.mode, job.tokens, prefix)
    plain = session(folder / "model.onnx")

    def differ(graph: ort.InferenceSession) -> float:
        logits = lambda batch: run(graph, {**values, **batch})  # noqa: E731
        return difference(logits, job.slots, backbone, job.mode, max_tokens)

    worst = differ(plain)
    check(worst, "the exported graph")
    log.info("verified against torch: logits differ by at most %.1e", worst)
    figures: dict[str, Any] = {"graph": "model.onnx", "max_logit_difference": worst}
    expected = None
    if texts is not None:
        expected = answer(plain, values, texts)
        figures["validation"] = compare(expected, expected, texts)
    measured = {"fp32": figures}
    for name in dict.fromkeys(precisions):
        if name == "fp32":
            continue
        source = folder / "model.onnx"
        model, figures = int8_onnx(source, int8_target) if name == "int8" else fp16_onnx(source)
        with WeightsFile(folder / f"weights.{name}.data").known(weights) as own:
            _save(folder / f"model.{name}.onnx", own.place(model))
        graph = session(folder / f"model.{name}.onnx")
        figures = {"graph": f"model.{name}.onnx", **figures, "max_logit_difference": differ(graph)}
        if texts is None or expected is None:
            log.warning(
                "%s: logits differ by up to %.3f; accuracy was not measured, pass --validation",
                name, figures["max_logit_difference"],
            )  # fmt: skip
        else:
            figures["validation"] = compare(expected, answer(graph, values, texts), texts)
            if not force:
                refuse(name, figures["validation"])
            log.info(
                "%s: accuracy %+.2f points, logits differ by up to %.3f",
                name, 100 * figures["validation"]["accuracy_change"],
                figures["validation"]["max_logit_difference"],
            )  # fmt: skip
        measured[name] = figures
    return measured


def _header(
    job: Job, backbone: Backbone, max_tokens: int, precisions: dict[str, Any]
) -> dict[str, Any]:
    t5 = backbone.t5
    return {
        "mode": job.mode,
        "backbone": {
            "id": Path(backbone.name).name if Path(backbone.name).is_dir() else backbone.name,
            "sha256": backbone.sha256,
            "d_model": t5.width,
            "num_layers": t5.layers,
            "num_heads": t5.heads,
            "d_kv": t5.head_width,
            "vocab_size": t5.model.config.vocab_size,
        },
        "prompt_tokens": job.tokens,
        "max_tokens": max_tokens,
        "grouped": True,  # task_id may name groups of rows, see serve.plan.in_groups
        "precisions": precisions,
        "prefix_graph": "prefix.onnx" if job.mode == "prefix" else None,
    }


def _save(path: Path, model: onnx.ModelProto) -> None:
    path.write_bytes(model.SerializeToString())
