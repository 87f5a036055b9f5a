"""Requests and answers as JSON: `POST /classify`, and the Open Inference Protocol v2.

The protocol: https://github.com/kserve/open-inference-protocol, "REST". Texts are BYTES tensors of
shape [n] or [n, 1]; the answer holds label, score, probabilities [n, C] and truncated.

Plain functions over parsed JSON, without a framework: this is the path of every request.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from serve.errors import UserError
from serve.readout import Result
from serve.task import Task
from serve.tokenize import check_text

OUTPUTS = {"label": "BYTES", "score": "FP32", "probabilities": "FP32", "truncated": "BOOL"}


class RequestError(Exception):
    """A request that is answered with an error: its status and one line."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(slots=True)
class Query:
    """A request that has been understood.

    Attributes:
        texts: at least one.
        tasks: one name per text.
        truncate: whether a text that is too long is cut (otherwise the request is refused).
        id: echoed in an Open Inference answer.
        outputs: the outputs that an Open Inference request asks for.
    """

    texts: list[str]
    tasks: list[str]
    truncate: bool = True
    id: str | None = None
    outputs: list[str] = field(default_factory=lambda: list(OUTPUTS))


def parse_json(body: bytes) -> dict[str, Any]:
    """The JSON object in a body.

    Raises:
        RequestError: 400, it is not UTF-8, not JSON, or not an object.
    """
    try:
        value = json.loads(body.decode())
    except UnicodeDecodeError as error:
        raise RequestError(400, f"the body is not UTF-8 (byte {error.start + 1})") from None
    except (ValueError, RecursionError) as error:
        what = "nested too deeply" if isinstance(error, RecursionError) else error
        raise RequestError(400, f"the body is not JSON: {what}") from None
    if not isinstance(value, dict):
        raise RequestError(400, "the body must be a JSON object")
    return value


def _texts(value: Any, where: str) -> list[str]:
    if not isinstance(value, list):
        raise RequestError(400, f"'{where}' must be a list of texts")
    if not value:
        raise RequestError(400, f"'{where}' holds no text")
    try:
        for index, text in enumerate(value):
            check_text(text, f"{where}[{index}]")
    except UserError as error:
        raise RequestError(400, str(error)) from None
    return value


def _truncate(value: Any) -> bool:
    if not isinstance(value, bool):
        raise RequestError(400, "'truncate' must be true or false")
    return value


def parse_classify(body: bytes, known: Mapping[str, Task]) -> Query:
    """The query in the body of `POST /classify`.

    Args:
        body: `{"text": ...}` or `{"texts": [...]}`, with `task` (a name, or one per text; may be
            left out when there is only one task) and `truncate`.
        known: the tasks that are served.

    Raises:
        RequestError: 400, the body is not understood.
    """
    value = parse_json(body)
    if ("text" in value) == ("texts" in value):
        raise RequestError(400, "give either 'text' or 'texts'")
    texts = _texts(value["texts"], "texts") if "texts" in value else _texts([value["text"]], "text")
    task = value.get("task")
    if task is None and len(known) == 1:
        task = next(iter(known))
    if isinstance(task, list):
        if len(task) != len(texts) or not all(isinstance(name, str) for name in task):
            raise RequestError(
                400, f"'task' must be one name, or one for each of {len(texts)} texts"
            )
        tasks = task
    elif isinstance(task, str):
        tasks = [task] * len(texts)
    else:
        raise RequestError(400, "'task' must be the name of a task; GET / lists them")
    return Query(texts, tasks, _truncate(value.get("truncate", True)))


def format_classify(results: Sequence[Result]) -> bytes:
    """The body that answers `POST /classify`."""
    return dump(
        {
            "results": [
                {
                    "task": result.task,
                    "label": result.label,
                    "score": result.score,
                    "probabilities": result.probabilities,
                    "truncated": result.truncated,
                }
                for result in results
            ]
        }
    )


def parse_infer(body: bytes, task: str) -> Query:
    """The query in the body of `POST /v2/models/{task}/infer`.

    Raises:
        RequestError: 400, the body is not an inference request over one BYTES tensor.
    """
    value = parse_json(body)
    inputs = value.get("inputs")
    if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
        raise RequestError(400, "'inputs' must be a list of one tensor, the texts")
    tensor = inputs[0]
    if tensor.get("datatype") != "BYTES":
        raise RequestError(400, "'inputs[0].datatype' must be BYTES")
    shape = tensor.get("shape")
    if (
        not isinstance(shape, list)
        or not all(type(size) is int and size >= 0 for size in shape)  # a bool is no size
        or not (len(shape) == 1 or (len(shape) == 2 and shape[1] == 1))
    ):
        raise RequestError(400, "'inputs[0].shape' must be [n] or [n, 1]")
    data = tensor.get("data")
    if isinstance(data, list) and data and all(isinstance(item, list) for item in data):
        data = [text for item in data for text in item]  # nested by row is allowed too
    texts = _texts(data, "inputs[0].data")
    if len(texts) != shape[0]:
        raise RequestError(
            400, f"'inputs[0].data' holds {len(texts)} texts, its shape says {shape[0]}"
        )
    truncate = parameters_in(value).get("truncate", True)
    query = Query(texts, [task] * len(texts), _truncate(truncate))
    query.id = value.get("id")
    if query.id is not None and not isinstance(query.id, str):
        raise RequestError(400, "'id' must be a string")
    if value.get("outputs"):
        query.outputs = _outputs(value["outputs"])
    return query


def parameters_in(value: Mapping[str, Any]) -> dict[str, Any]:
    """The `parameters` of a request; null, as some clients write, is none.

    Raises:
        RequestError: 400, they are not an object.
    """
    parameters = value.get("parameters")
    if parameters is not None and not isinstance(parameters, dict):
        raise RequestError(400, "'parameters' must be an object")
    return parameters or {}


def _outputs(value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise RequestError(400, "'outputs' must be a list of objects with a name")
    names = [item.get("name") for item in value]
    for name in names:
        if not isinstance(name, str) or name not in OUTPUTS:
            raise RequestError(400, f"no output {name!r}: there are {', '.join(OUTPUTS)}")
    return names


def format_infer(results: Sequence[Result], query: Query, version: str) -> bytes:
    """The body that answers an inference request."""
    rows = len(results)
    columns: dict[str, list[Any]] = {
        "label": [result.label for result in results],
        "score": [result.score for result in results],
        "probabilities": [p for result in results for p in result.probabilities.values()],
        "truncated": [result.truncated for result in results],
    }
    answer: dict[str, Any] = {"model_name": results[0].task, "model_version": version}
    if query.id is not None:
        answer["id"] = query.id
    answer["outputs"] = [
        {
            "name": name,
            "datatype": OUTPUTS[name],
            "shape": [rows, len(columns[name]) // rows] if name == "probabilities" else [rows],
            "data": columns[name],
        }
        for name in query.outputs
    ]
    return dump(answer)


def version_of(task: Task) -> str:
    """What tells two versions of a task apart."""
    return task.sha256[:12]


def metadata(task: Task) -> dict[str, Any]:
    """The answer of `GET /v2/models/{task}`. Only one version is served, and no route takes one, so
    there is no `versions`, which clients would ask for by `/versions/{version}`."""
    shapes = {name: [-1] for name in OUTPUTS} | {"probabilities": [-1, len(task.labels)]}
    return {
        "name": task.name,
        "platform": "onnxruntime_prompt_bundle",
        "inputs": [{"name": "text", "datatype": "BYTES", "shape": [-1]}],
        "outputs": [
            {"name": name, "datatype": kind, "shape": shapes[name]}
            for name, kind in OUTPUTS.items()
        ],
        "parameters": {
            "labels": task.labels,
            "template": task.template,
            "version": version_of(task),
        },
    }


def dump(value: Any) -> bytes:
    """Compact UTF-8 JSON; a number that JSON has no word for is an error, not a NaN. Half of a
    surrogate pair, which a request's task or id may hold, becomes a question mark."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "replace")
