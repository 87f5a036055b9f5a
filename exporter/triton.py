"""A bundle as a model repository of Triton, with its tasks baked in. Needs onnx, but no torch.

    NAME         ensemble: TEXT, TASK -> LABEL, SCORE, PROBABILITIES, TRUNCATED
    NAME_text    Python: texts to ids, by the code that `serve` tokenizes with
    NAME_graph   onnxruntime: ids and a task's number to logits; batches across requests and tasks
    NAME_answer  Python: logits to labels

Triton has no input that all requests of a batch share, so the bank of the prompts' constants
cannot be one: it becomes a constant of the graph. To add a task, add it to the bundle and make the
repository again, which takes seconds.

The format of config.pbtxt is `ModelConfig` in Triton's model_config.proto.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from serve.classifier import MIB, Classifier
from serve.engine import CPU, Engine, on_device, physical_cores
from serve.errors import Failure, UserError, install
from serve.files import atomic_folder
from serve.tokenize import Encoded

SHIPPED = ("errors.py", "task.py", "tokenize.py")  # of `serve`, to where the Python models run
PACKAGE = "metapt_text"  # their package there; `serve` might be another version's
# Of a logit, against the bundle's own graph. Constants may be folded, so sums round differently;
# in int8 and fp16 that moves a value by a whole step now and then.
TOLERANCE = {"fp32": 1e-4, "int8": 0.03, "fp16": 0.03}
_NO_CLASS = -5e3  # a score below it is that of a padded class
_EMBEDDED = 1024  # bytes; larger constants go to a file, as a graph itself ends at 2 GiB
_TYPES = {"float32": "TYPE_FP32", "float16": "TYPE_FP16", "int64": "TYPE_INT64"}
_TEXT_INPUTS = ("input_ids", "attention_mask", "task_id")


@dataclass(frozen=True)
class Settings:
    """How Triton is to run the models; see `python -m exporter triton --help`."""

    name: str = "metapt"
    precision: str = "fp32"
    device: str = "cpu"
    instances: int = 1
    threads: int | None = None
    max_batch: int = 32
    max_delay: float = 2.0  # milliseconds
    max_queue: int = 1024
    deadline: float = 10.0  # seconds
    pad_to: int = 16
    ids_only: bool = False


class Word(str):
    """A name of the configuration's schema, which stands there without quotes."""


def export_triton(bundle: Path | str, out: Path | str, settings: Settings) -> list[str]:
    """Write the repository, whole or not at all; one of the same `settings.name` is replaced.

    Returns:
        the names of the models.

    Raises:
        UserError: no such bundle or precision, no task in it, or `out` holds something else.
        Failure: the bundle is damaged, or the graph with the tasks inside answers differently.
    """
    out = Path(out)
    _check_out(out, settings.name)
    # As large as it takes: the bank is written to a file here, and never grows afterwards.
    classifier = Classifier(
        bundle, settings.precision, threads=1, providers=[CPU], bank_memory=2**20 * MIB
    )
    if not classifier.tasks:
        raise UserError(f"{bundle} has no task: add one with python -m exporter add")
    tasks = list(classifier.tasks.values())
    with atomic_folder(out) as folder, classifier.bank.lend(tasks) as view:
        constants = {name: value.numpy()[view.slots] for name, value in view.inputs.items()}
        graph = folder / f"{settings.name}_graph"
        (graph / "1").mkdir(parents=True)
        source = classifier.bundle.graph(settings.precision)
        bake(source, graph / "1" / "model.onnx", constants)
        verify(classifier, graph / "1" / "model.onnx")
        classes = constants["label_ids"].shape[1]
        kind = _output_type(graph / "1" / "model.onnx")
        configs = {f"{settings.name}_graph": graph_config(settings, classes, kind)}
        if not settings.ids_only:
            _python_model(folder, settings, classifier, "text")
            _python_model(folder, settings, classifier, "answer")
            (folder / settings.name / "1").mkdir(parents=True)
            # Triton wants the version's folder of an ensemble, and copying tools drop empty ones.
            (folder / settings.name / "1" / "README").write_text("An ensemble has no file.\n")
            configs |= {
                f"{settings.name}_text": text_config(settings),
                f"{settings.name}_answer": answer_config(settings, classes, kind),
                settings.name: ensemble_config(settings, classes),
            }
        for name, config in configs.items():
            (folder / name / "config.pbtxt").write_text(pbtxt(config), "utf-8")
    return list(configs)


def _check_out(out: Path, name: str) -> None:
    """Raises: UserError when replacing `out` would take away more than this name's models."""
    found = sorted(entry.name for entry in out.iterdir()) if out.is_dir() else []
    if found and not (out / f"{name}_graph").is_dir():
        raise UserError(f"{out} is not empty and holds no {name}_graph: pass another OUT")
    others = set(found) - {name, *(f"{name}_{part}" for part in ("text", "graph", "answer"))}
    if others:
        raise UserError(
            f"{out} holds {', '.join(sorted(others))} beside the models of {name}, and is written "
            "as a whole: pass an OUT of its own (tritonserver takes --model-repository repeatedly)"
        )


# ---- the graph -----------------------------------------------------------------------------------


def bake(source: Path, target: Path, constants: Mapping[str, np.ndarray]) -> None:
    """Turn inputs of a graph into constants of it, and copy its weights beside it.

    Raises:
        UserError: onnx is not installed.
    """
    try:
        import onnx
        from onnx import TensorProto, external_data_helper, numpy_helper
    except ModuleNotFoundError:
        raise UserError(f"onnx is not installed: {install('exporter')}") from None

    model = onnx.load(source, load_external_data=False)
    weights = {
        entry.value
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    for name in sorted(weights):
        shutil.copyfile(source.parent / name, target.parent / name)
    offset = 0
    with (target.parent / "bank.data").open("wb") as file:
        for entry in [item for item in model.graph.input if item.name in constants]:
            model.graph.input.remove(entry)
            value = np.ascontiguousarray(constants[entry.name])
            tensor = numpy_helper.from_array(value, entry.name)
            if value.nbytes >= _EMBEDDED:
                file.write(tensor.raw_data)
                external_data_helper.set_external_data(tensor, "bank.data", offset, value.nbytes)
                tensor.data_location = TensorProto.EXTERNAL
                tensor.ClearField("raw_data")
                offset += value.nbytes
            model.graph.initializer.append(tensor)
    onnx.save(model, target)
    onnx.checker.check_model(target)


def verify(classifier: Classifier, graph: Path) -> None:
    """Hold the graph with the tasks inside to the bundle's own, over all tasks.

    Raises:
        Failure: a logit differs by more than `TOLERANCE`.
    """
    allowed = TOLERANCE.get(classifier.precision, TOLERANCE["fp32"])
    engine = Engine(graph, threads=1, providers=[CPU])
    random = np.random.default_rng(0)
    vocabulary, longest = classifier.bundle.size("vocab_size"), classifier.encoder.max_tokens
    tasks = list(classifier.tasks.values())
    worst = 0.0
    for start in range(0, len(tasks), classifier.limits.rows):
        batch = []
        for task in tasks[start : start + classifier.limits.rows]:
            size = min(int(random.integers(0, 32)), classifier.encoder.room(task), longest)
            text = random.integers(3, vocabulary, size=size).tolist()
            batch.append(Encoded([*task.prefix_ids, *text, *task.suffix_ids], False, task))
        width = max(len(row.ids) for row in batch)
        ids = np.zeros((len(batch), width), np.int64)
        mask = np.zeros_like(ids)
        for index, row in enumerate(batch):
            ids[index, : len(row.ids)] = row.ids
            mask[index, : len(row.ids)] = 1
        numbers = np.arange(start, start + len(batch), dtype=np.int64)
        feed = dict(zip(_TEXT_INPUTS, (ids, mask, numbers), strict=True))
        got = engine.run({name: on_device(value, "cpu") for name, value in feed.items()})[0]
        wanted = classifier.logits(batch)
        # The bundle scores as many classes as the widest task of a batch has, this graph always
        # as many as the widest of all; what is left over must be no class.
        beyond = got[:, wanted.shape[1] :]
        got = got[:, : wanted.shape[1]].astype(np.float32)
        if got.shape != wanted.shape or not np.isfinite(got).all() or (beyond > _NO_CLASS).any():
            raise Failure(f"the graph for Triton gives {list(got.shape)}, not the bundle's logits")
        worst = max(worst, float(np.abs(got - wanted).max()))
    if not worst <= allowed:
        raise Failure(
            f"the graph for Triton differs from the bundle's by {worst:.2g} in a logit, more than "
            f"{allowed:g}: nothing was written; report the versions of onnx and onnxruntime"
        )


def _output_type(graph: Path) -> str:
    import onnx

    kind = onnx.load(graph, load_external_data=False).graph.output[0].type.tensor_type.elem_type
    return _TYPES[np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind)).name]


# ---- the Python models ---------------------------------------------------------------------------


def _python_model(folder: Path, settings: Settings, classifier: Classifier, kind: str) -> None:
    """Write the folder of the `text` or the `answer` model, without its configuration."""
    import exporter.triton_models
    import serve

    version = folder / f"{settings.name}_{kind}" / "1"
    (version / PACKAGE).mkdir(parents=True)
    models, own = Path(exporter.triton_models.__file__).parent, Path(serve.__file__).parent
    copies = {version / "model.py": models / f"{kind}.py"}
    copies |= {version / PACKAGE / name: own / name for name in SHIPPED}
    for target, source in copies.items():
        text = source.read_text("utf-8").replace("from serve.", f"from {PACKAGE}.")
        target.write_text(text, "utf-8")
    (version / PACKAGE / "__init__.py").write_text("")
    tasks = []
    for task in classifier.tasks.values():
        record = dataclasses.asdict(dataclasses.replace(task, arrays=None))
        tasks.append({key: record[key] for key in record if key not in ("arrays", "info")})
    value = {
        "max_tokens": classifier.encoder.max_tokens,
        "pad_to": settings.pad_to,
        "tasks": tasks,  # in the order of their numbers
    }
    (version / "tasks.json").write_text(json.dumps(value, ensure_ascii=False, indent=1), "utf-8")
    if kind == "text":
        shutil.copyfile(classifier.bundle.folder / "tokenizer.json", version / "tokenizer.json")


# ---- the configurations --------------------------------------------------------------------------


def _tensor(name: str, kind: str, *dims: int, **more: Any) -> dict[str, Any]:
    return {"name": name, "data_type": Word(kind), "dims": list(dims), **more}


def _batching(settings: Settings) -> dict[str, Any]:
    return {
        "preferred_batch_size": [settings.max_batch],
        "max_queue_delay_microseconds": round(settings.max_delay * 1000),
        "default_queue_policy": {
            "timeout_action": Word("REJECT"),
            "default_timeout_microseconds": round(settings.deadline * 1e6),
            "max_queue_size": settings.max_queue,  # of requests; one past it is refused
        },
    }


def graph_config(settings: Settings, classes: int, kind: str) -> dict[str, Any]:
    """Of the model that onnxruntime runs."""
    gpu = settings.device == "gpu"
    config: dict[str, Any] = {
        "name": f"{settings.name}_graph",
        "backend": "onnxruntime",
        "max_batch_size": settings.max_batch,
        "input": [
            _tensor("input_ids", "TYPE_INT64", -1),
            _tensor("attention_mask", "TYPE_INT64", -1),
            _tensor("task_id", "TYPE_INT64", 1, reshape={"shape": []}),  # [n] in the graph
        ],
        "output": [_tensor("logits", kind, classes)],
        "instance_group": [
            {"count": settings.instances, "kind": Word("KIND_GPU" if gpu else "KIND_CPU")}
        ],
        "dynamic_batching": _batching(settings),
    }
    if not gpu:
        threads = settings.threads or max(1, physical_cores() // settings.instances)
        config["parameters"] = [
            {"key": "intra_op_thread_count", "value": {"string_value": str(threads)}},
            {"key": "inter_op_thread_count", "value": {"string_value": "1"}},
        ]
    return config


def _python(settings: Settings, kind: str) -> dict[str, Any]:
    return {
        "name": f"{settings.name}_{kind}",
        "backend": "python",
        "max_batch_size": settings.max_batch,
        "instance_group": [{"count": 1, "kind": Word("KIND_CPU")}],
        "dynamic_batching": {},  # what waits is tokenized together; nothing waits for company
    }


def text_config(settings: Settings) -> dict[str, Any]:
    """Of the tokenizing model."""
    return _python(settings, "text") | {
        "input": [_tensor("TEXT", "TYPE_STRING", 1), _tensor("TASK", "TYPE_STRING", 1)],
        "output": [
            _tensor("input_ids", "TYPE_INT64", -1),
            _tensor("attention_mask", "TYPE_INT64", -1),
            _tensor("task_id", "TYPE_INT64", 1),
            _tensor("truncated", "TYPE_BOOL", 1),
        ],
    }


def answer_config(settings: Settings, classes: int, kind: str) -> dict[str, Any]:
    """Of the model that reads labels out of logits."""
    return _python(settings, "answer") | {
        "input": [_tensor("logits", kind, classes), _tensor("task_id", "TYPE_INT64", 1)],
        "output": [
            _tensor("LABEL", "TYPE_STRING", 1),
            _tensor("SCORE", "TYPE_FP32", 1),
            _tensor("PROBABILITIES", "TYPE_FP32", classes),
        ],
    }


def ensemble_config(settings: Settings, classes: int) -> dict[str, Any]:
    """Of the ensemble: which tensor goes where."""

    def step(kind: str, inputs: Sequence[str], outputs: Mapping[str, str]) -> dict[str, Any]:
        return {
            "model_name": f"{settings.name}_{kind}",
            "model_version": -1,
            "input_map": [{"key": name, "value": name} for name in inputs],
            "output_map": [{"key": key, "value": value} for key, value in outputs.items()],
        }

    def same(*names: str) -> dict[str, str]:
        return {name: name for name in names}

    return {
        "name": settings.name,
        "platform": "ensemble",
        "max_batch_size": settings.max_batch,
        "input": [_tensor("TEXT", "TYPE_STRING", 1), _tensor("TASK", "TYPE_STRING", 1)],
        "output": [
            _tensor("LABEL", "TYPE_STRING", 1),
            _tensor("SCORE", "TYPE_FP32", 1),
            _tensor("PROBABILITIES", "TYPE_FP32", classes),
            _tensor("TRUNCATED", "TYPE_BOOL", 1),
        ],
        "ensemble_scheduling": {
            "step": [
                step("text", ("TEXT", "TASK"), same(*_TEXT_INPUTS) | {"truncated": "TRUNCATED"}),
                step("graph", _TEXT_INPUTS, same("logits")),
                step("answer", ("logits", "task_id"), same("LABEL", "SCORE", "PROBABILITIES")),
            ]
        },
    }


def pbtxt(value: Mapping[str, Any], depth: int = 0) -> str:
    """A configuration in protobuf's text format; a list of messages repeats its field."""
    indent = "  " * depth
    lines = []
    for key, item in value.items():
        if isinstance(item, list) and item and isinstance(item[0], Mapping):
            lines += [f"{indent}{key} {{\n{pbtxt(part, depth + 1)}{indent}}}\n" for part in item]
        elif isinstance(item, Mapping):
            lines.append(f"{indent}{key} {{\n{pbtxt(item, depth + 1)}{indent}}}\n")
        else:
            lines.append(f"{indent}{key}: {_scalar(item)}\n")
    return "".join(lines)


def _scalar(item: Any) -> str:
    if isinstance(item, list):
        return "[" + ", ".join(_scalar(part) for part in item) + "]"
    if isinstance(item, Word):
        return str(item)
    return json.dumps(item)  # quotes, escapes, true and false are the same there
