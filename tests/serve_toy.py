"""A toy bundle for the serving tests: graphs of a few nodes that obey the contract of the real
ones, and the same sums in plain numpy.

    logit[b, c] = (sum of the text's embeddings + part of the row's slot) . embedding[label c]
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, models, pre_tokenizers

from serve import bundle

WORDS = "bad good awful great the film was a bit very long dull nice food service".split()
D, H, K, L, P = 8, 2, 4, 2, 5
VOCABULARY = 3 + len(WORDS) + 1  # pad, </s>, <unk>, words, <extra_id_0>
MASK = VOCABULARY - 1


def embedding() -> np.ndarray:
    """[V, D]; the padding row is not zero, so that a wrong mask shows."""
    return np.random.default_rng(7).normal(0, 0.15, size=(VOCABULARY, D)).astype(np.float32)


def word_id(word: str) -> int:
    return 3 + WORDS.index(word)


def constants(prompt: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """kv [L, 2, H, P, K] and states [P, D] of a prompt [p, D], as the toy `prefix.onnx` has it."""
    padded = np.zeros((P, D), np.float32)
    padded[P - len(prompt) :] = prompt
    heads = padded.reshape(P, H, K).transpose(1, 0, 2)
    return np.broadcast_to(heads, (L, 2, H, P, K)) * 0.5, padded * len(prompt)


def oracle(ids: list[int], prompt: np.ndarray, word_ids: list[int], mode: str) -> np.ndarray:
    """The toy's logits [C] for one row."""
    table = embedding()
    hidden = table[ids].sum(0)
    if mode == "full":
        hidden = hidden + prompt.sum(0)
    else:
        kv, states = constants(prompt)
        hidden = hidden + states.sum(0) + kv.sum() + len(prompt)
    return table[word_ids] @ hidden


def record(labels: list[str], words: list[str], **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "labels": labels,
        "words": words,
        "word_ids": [word_id(word) for word in words],
        "template": "{text} It was <extra_id_0>.",
        "prefix_ids": [],
        "suffix_ids": [word_id("was"), MASK, 1],
        "temperature": 1.0,
    }
    return values | changes


def prompt_of(seed: int, length: int = P) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(length, D)).astype(np.float32)


def _save(
    path: Path, nodes: list, inputs: list, outputs: list, extra: dict[str, np.ndarray]
) -> None:
    table = numpy_helper.from_array(embedding(), "table")
    # The weights lie beside the graphs, shared by all, as in a real bundle.
    onnx.external_data_helper.set_external_data(table, "weights.data", 0, embedding().nbytes)
    table.data_location = TensorProto.EXTERNAL
    table.ClearField("raw_data")
    tensors = [table] + [numpy_helper.from_array(value, name) for name, value in extra.items()]
    graph = helper.make_graph(nodes, "toy", inputs, outputs, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    path.write_bytes(model.SerializeToString())


def _model(path: Path, mode: str, half: bool = False) -> None:
    kind = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    node, info = helper.make_node, helper.make_tensor_value_info
    inputs = [
        info("input_ids", TensorProto.INT64, ["B", "S"]),
        info("attention_mask", TensorProto.INT64, ["B", "S"]),
        info("task_id", TensorProto.INT64, ["B"]),
        info("label_ids", TensorProto.INT64, ["N", "C"]),
    ]
    nodes = [
        node("Gather", ["table", "input_ids"], ["embedded"]),
        node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        node("Unsqueeze", ["mask", "two"], ["mask3"]),
        node("Mul", ["embedded", "mask3"], ["masked"]),
        node("ReduceSum", ["masked", "one"], ["text"], keepdims=0),
    ]
    if mode == "full":
        inputs.append(info("bank_prompts", kind, ["N", P, D]))
        nodes += [
            node("Gather", ["bank_prompts", "task_id"], ["prompts"]),
            node("Cast", ["prompts"], ["prompts32"], to=TensorProto.FLOAT),
            node("ReduceSum", ["prompts32", "one"], ["part"], keepdims=0),
            node("Add", ["text", "part"], ["hidden"]),
        ]
    else:
        inputs += [
            info("bank_kv", kind, ["N", L, 2, H, P, K]),
            info("bank_states", kind, ["N", P, D]),
            info("bank_length", TensorProto.INT64, ["N"]),
        ]
        nodes += [
            node("Gather", ["bank_kv", "task_id"], ["kv"]),
            node("Cast", ["kv"], ["kv32"], to=TensorProto.FLOAT),
            node("ReduceSum", ["kv32", "rest"], ["kv_sum"], keepdims=0),
            node("Unsqueeze", ["kv_sum", "one"], ["kv_column"]),
            node("Gather", ["bank_states", "task_id"], ["states"]),
            node("Cast", ["states"], ["states32"], to=TensorProto.FLOAT),
            node("ReduceSum", ["states32", "one"], ["state_sum"], keepdims=0),
            node("Gather", ["bank_length", "task_id"], ["length"]),
            node("Cast", ["length"], ["length32"], to=TensorProto.FLOAT),
            node("Unsqueeze", ["length32", "one"], ["length_column"]),
            node("Sum", ["text", "state_sum", "kv_column", "length_column"], ["hidden"]),
        ]
    nodes += [
        node("Gather", ["label_ids", "task_id"], ["labels"]),
        node("Less", ["labels", "zero"], ["padded"]),
        node("Max", ["labels", "zero"], ["rows"]),
        node("Gather", ["table", "rows"], ["vectors"]),
        node("Unsqueeze", ["hidden", "two"], ["column"]),
        node("MatMul", ["vectors", "column"], ["scores3"]),
        node("Squeeze", ["scores3", "two"], ["scores"]),
        node("Where", ["padded", "never", "scores"], ["out32"]),
        node("Cast", ["out32"], ["logits"], to=kind),
    ]
    never = -6e4 if half else -1e9
    extra = {
        "zero": np.array(0, np.int64),
        "one": np.array([1], np.int64),
        "two": np.array([2], np.int64),
        "rest": np.array([1, 2, 3, 4, 5], np.int64),
        "never": np.array(never, np.float32),
    }
    _save(path, nodes, inputs, [info("logits", kind, ["B", "C"])], extra)


def _prefix(path: Path) -> None:
    node, info = helper.make_node, helper.make_tensor_value_info
    nodes = [
        node("Reshape", ["prompt", "split"], ["split_heads"]),
        node("Transpose", ["split_heads"], ["heads"], perm=[1, 0, 2]),
        node("Expand", ["heads", "layers"], ["repeated"]),
        node("Mul", ["repeated", "half"], ["kv"]),
        node("Cast", ["length"], ["length32"], to=TensorProto.FLOAT),
        node("Mul", ["prompt", "length32"], ["states"]),
    ]
    inputs = [
        info("prompt", TensorProto.FLOAT, [P, D]),
        info("length", TensorProto.INT64, []),
    ]
    outputs = [
        info("kv", TensorProto.FLOAT, [L, 2, H, P, K]),
        info("states", TensorProto.FLOAT, [P, D]),
    ]
    extra = {
        "split": np.array([P, H, K], np.int64),
        "layers": np.array([L, 2, H, P, K], np.int64),
        "half": np.array(0.5, np.float32),
    }
    _save(path, nodes, inputs, outputs, extra)


def make_bundle(folder: Path, mode: str = "prefix", max_tokens: int = 64) -> Path:
    """A bundle of the given mode, its tasks `film` (2 labels) and `food` (3, a short prompt)."""
    folder.mkdir(parents=True)
    (folder / "weights.data").write_bytes(embedding().tobytes())
    _model(folder / "model.onnx", mode)
    _model(folder / "model.fp16.onnx", mode, half=True)
    if mode == "prefix":
        _prefix(folder / "prefix.onnx")
    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2}
    vocabulary |= {word: word_id(word) for word in WORDS} | {"<extra_id_0>": MASK}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["</s>", "<extra_id_0>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    header = {
        "mode": mode,
        "backbone": {"id": "toy", "sha256": "0" * 64, "d_model": D, "num_layers": L,
                     "num_heads": H, "d_kv": K, "vocab_size": VOCABULARY},
        "prompt_tokens": P,
        "max_tokens": max_tokens,
        "precisions": {"fp32": {"graph": "model.onnx"}, "fp16": {"graph": "model.fp16.onnx"}},
        "prefix_graph": "prefix.onnx" if mode == "prefix" else None,
    }  # fmt: skip
    bundle.create(folder, header)
    add(folder, "film", ["negative", "positive"], ["bad", "good"], prompt_of(1))
    add(folder, "food", ["no", "so-so", "yes"], ["awful", "nice", "great"], prompt_of(2, 3))
    return folder


def add(folder: Path, name: str, labels: list[str], words: list[str], prompt: np.ndarray, **changes: Any) -> None:  # fmt: skip  # noqa: E501
    """Add a task to a toy bundle; in mode deep its constants are stored with it."""
    arrays: Any = prompt
    if bundle.load(folder, verify=False).mode == "deep":
        kv, states = constants(prompt)
        gap = P - len(prompt)
        arrays = {"kv": kv[:, :, :, gap:], "states": states[gap:]}
    bundle.add_task(folder, name, record(labels, words, **changes), arrays)
