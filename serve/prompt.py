"""A prompt's arrays: their names and shapes by the mode of the bundle, and what is refused.

Notation: P prompt tokens of the graph, p of the prompt, D model width, L layers, H heads, K width
of a head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from serve.errors import Failure, UserError

if TYPE_CHECKING:
    from serve.bundle import Bundle

Arrays = Mapping[str, np.ndarray]


_FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}  # safetensors' names, and numpy's


def read_arrays(data: bytes, source: str) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file's bytes, in their own precision.

    As `safetensors.numpy.load`, which fails at bfloat16: numpy has no such type.

    Raises:
        UserError: numbers of a type that is not read. SafetensorError, ValueError: no such file.
    """
    from safetensors import deserialize

    arrays = {}
    for name, entry in deserialize(data):
        kind, raw = entry["dtype"], entry["data"]
        if kind == "BF16":  # the upper half of a float32
            value = (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
        elif kind in _FLOATS:
            value = np.frombuffer(raw, _FLOATS[kind])
        else:
            raise UserError(f"{source}: '{name}' is of type {kind}: save it as F32, F16 or BF16")
        arrays[name] = value.reshape(entry["shape"])
    return arrays


def prompt_rows(rows: int, virtual: int | None, source: object) -> int:
    """How many of an array's rows are the prompt in front of the text.

    Args:
        virtual: PEFT's `num_virtual_tokens`, None where it is not known. By PEFT's default an
            encoder-decoder's prompt has twice as many rows, the decoder's last.

    Raises:
        Failure: it has neither so many nor twice as many.
    """
    if virtual and rows not in (virtual, 2 * virtual):
        raise Failure(
            f"{source} holds {rows} rows, but adapter_config.json says {virtual} virtual tokens: "
            "one of the two files is of another prompt"
        )
    return virtual or rows


def parse_prompt(data: bytes, bundle: Bundle, source: str) -> dict[str, np.ndarray]:
    """The arrays of a prompt file's bytes, as float32, with shapes checked (see `read_prompt`).

    Raises:
        Failure: the bytes are not safetensors, or the shapes are not the backbone's.
    """
    from safetensors import SafetensorError

    try:
        arrays = read_arrays(data, source)
    except UserError as error:
        raise Failure(str(error)) from None
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise Failure(f"{source} is not a safetensors file ({error}): make it again") from None
    try:
        return check_prompt(arrays, bundle)
    except UserError as error:
        raise Failure(f"{source}: {error}") from None


def check_prompt(prompt: np.ndarray | Arrays, bundle: Bundle) -> dict[str, np.ndarray]:
    """The arrays of a prompt as contiguous float32.

    Raises:
        UserError: an array is missing, not of the backbone's shape, or not finite.
    """
    arrays = {"prompt_embeddings": prompt} if isinstance(prompt, np.ndarray) else dict(prompt)
    main = "states" if bundle.mode == "deep" else "prompt_embeddings"  # [p, D] either way
    if main not in arrays:
        raise UserError(f"the prompt has no '{main}', it has {sorted(arrays)}")
    width = bundle.size("d_model")
    shape = arrays[main].shape
    if len(shape) != 2 or shape[1] != width or not 1 <= shape[0] <= bundle.prompt_tokens:
        raise UserError(
            f"the prompt holds {list(shape)}, but the bundle's backbone "
            f"'{bundle.header['backbone'].get('id')}' is {width} wide and its graph takes 1 to "
            f"{bundle.prompt_tokens} prompt tokens: train it on this backbone, or export again"
        )
    expected: dict[str, tuple[int, ...]] = {main: shape}
    if bundle.mode == "deep":
        layers, heads, narrow = (bundle.size(key) for key in ("num_layers", "num_heads", "d_kv"))
        expected["kv"] = (layers, 2, heads, shape[0], narrow)
    result = {}
    for key, wanted in expected.items():
        if key not in arrays or arrays[key].shape != wanted:
            have = list(arrays[key].shape) if key in arrays else "nothing"
            raise UserError(f"the prompt's '{key}' holds {have}, but mode {bundle.mode} needs "
                            f"{list(wanted)}")  # fmt: skip
        result[key] = np.ascontiguousarray(arrays[key], dtype=np.float32)
        if not np.isfinite(result[key]).all():
            raise UserError(f"the prompt's '{key}' holds values that are not finite")
    return result
