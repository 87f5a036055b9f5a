"""What the OpenAPI page says about requests and answers, with examples."""

from __future__ import annotations

from typing import Any

DESCRIPTION = (
    "Text classification by soft prompts on one shared model. Texts of all tasks share batches. "
    "`POST /classify` is the plain way; `/v2` is the Open Inference Protocol."
)

_REASONS = {
    400: "Not JSON, not text, or not understood",
    401: "The admin token is missing or wrong",
    404: "No such task",
    408: "The body did not arrive in time",
    413: "The body is too long",
    415: "The body is compressed",
    422: "A text is too long and may not be cut, or there are too many texts",
    429: "The queue is full; Retry-After says when to come back",
    500: "An error of the server's own; its log says more",
    503: "Not ready, or the task cannot be run",
    504: "The deadline passed",
}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {"error": {"type": "string"}},
}


def errors(*codes: int) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that may answer with these errors."""
    return {
        code: {
            "description": _REASONS[code],
            "content": {
                "application/json": {
                    "schema": _ERROR,
                    "example": {"error": _REASONS[code].lower()},
                }
            },
        }
        for code in codes
    }


def _body(schema: dict[str, Any], example: Any, required: bool = True) -> dict[str, Any]:
    content = {"application/json": {"schema": schema, "example": example}}
    return {"required": required, "content": content}


def _answer(example: Any) -> dict[str, Any]:
    content = {"application/json": {"schema": {"type": "object"}, "example": example}}
    return {"200": {"description": "The answer", "content": content}}


_TEXT = {"type": "string"}
_TASK = {
    "description": "A task's name, or one name per text; not needed when there is one task",
    "anyOf": [_TEXT, {"type": "array", "items": _TEXT}],
}

CLASSIFY: dict[str, Any] = {
    "requestBody": _body(
        {
            "type": "object",
            "properties": {
                "texts": {"type": "array", "items": _TEXT, "minItems": 1},
                "text": _TEXT,
                "task": _TASK,
                "truncate": {
                    "type": "boolean",
                    "default": True,
                    "description": "Cut texts that are too long; false: refuse them with 422",
                },
            },
            "oneOf": [{"required": ["texts"]}, {"required": ["text"]}],
        },
        {"texts": ["A quiet film that stays with you."], "task": "film", "truncate": True},
    ),
    "responses": _answer(
        {
            "results": [
                {
                    "task": "film",
                    "label": "positive",
                    "score": 0.97,
                    "probabilities": {"negative": 0.03, "positive": 0.97},
                    "truncated": False,
                }
            ]
        }
    ),
}

INFER: dict[str, Any] = {
    "parameters": [{"name": "task", "in": "path", "required": True, "schema": _TEXT}],
    "requestBody": _body(
        {
            "type": "object",
            "required": ["inputs"],
            "properties": {
                "id": _TEXT,
                "inputs": {
                    "type": "array",
                    "minItems": 1,
                    "maxItems": 1,
                    "items": {
                        "type": "object",
                        "required": ["name", "shape", "datatype", "data"],
                        "properties": {
                            "name": _TEXT,
                            "shape": {"type": "array", "items": {"type": "integer"}},
                            "datatype": {"type": "string", "enum": ["BYTES"]},
                            "data": {"type": "array", "items": _TEXT, "minItems": 1},
                        },
                    },
                },
                "outputs": {"type": "array", "items": {"type": "object"}},
                "parameters": {"type": "object"},
            },
        },
        {
            "id": "42",
            "inputs": [
                {
                    "name": "text",
                    "shape": [1],
                    "datatype": "BYTES",
                    "data": ["A quiet film that stays with you."],
                }
            ],
            "outputs": [{"name": "label"}, {"name": "score"}],
        },
    ),
    "responses": _answer(
        {
            "model_name": "film",
            "model_version": "3f1c0a9be2d4",
            "id": "42",
            "outputs": [
                {"name": "label", "datatype": "BYTES", "shape": [1], "data": ["positive"]},
                {"name": "score", "datatype": "FP32", "shape": [1], "data": [0.97]},
            ],
        }
    ),
}

INDEX: dict[str, Any] = {"requestBody": _body({"type": "object"}, {}, required=False)}
UNLOAD: dict[str, Any] = {"requestBody": _body({"type": "object"}, {}, required=False)}
LOAD: dict[str, Any] = {
    "description": (
        "Without a body the task is read from the bundle's folder as it is now. With the "
        "parameters `config` (the task's record as JSON text) and `file:prompt.safetensors` "
        "(base64) it is kept in memory only, until the server ends."
    ),
    "requestBody": _body(
        {
            "type": "object",
            "properties": {
                "parameters": {
                    "type": "object",
                    "properties": {"config": _TEXT, "file:prompt.safetensors": _TEXT},
                }
            },
        },
        {},
        required=False,
    ),
}
