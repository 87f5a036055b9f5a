"""Reading prompts without torch, and what is kept of them: as the trainer itself has it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch
from tokenizers import Tokenizer

from exporter.measure import refuse
from exporter.precision import int8_onnx, this_machine, weight_products
from exporter.record import WEIGHTS, read_folder, task_name, task_record, template_ids, word_ids
from exporter.trace import WeightsFile
from exporter.verify import left_padded, session
from serve.errors import Failure, UserError
from trainer import readout


@pytest.fixture(scope="module")
def pair(tiny_t5: Path) -> tuple[Tokenizer, object]:
    from transformers import AutoTokenizer

    return (
        Tokenizer.from_file(str(tiny_t5 / "tokenizer.json")),
        AutoTokenizer.from_pretrained(tiny_t5),
    )


@pytest.mark.parametrize(
    "template", ["{text} It was <extra_id_0>.", "film: {text} This is <extra_id_0> !"]
)
def test_templates_are_tokenised_as_the_trainer_does(pair, template: str) -> None:  # type: ignore[no-untyped-def]
    ours, theirs = pair
    want = readout.compile_template(theirs, template)
    assert template_ids(template, ours, "p") == (list(want.before), list(want.after))


def test_words_are_tokenised_as_the_trainer_does(pair) -> None:  # type: ignore[no-untyped-def]
    ours, theirs = pair
    words = ["terrible", "okay", "great"]
    assert word_ids(words, ours, "p") == readout.word_ids(theirs, words)


@pytest.mark.parametrize(
    ("words", "message"),
    [(["great", "abysmal"], "'abysmal' is 7 tokens"), (["good", "good"], "are the same token")],
)
def test_words_that_cannot_be_told_apart_are_named(pair, words, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match=message):
        word_ids(words, pair[0], "p")


def test_records_name_what_is_missing(pair) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match="2 labels and 1 label words"):
        task_record({"labels": ["a", "b"], "words": ["good"]}, pair[0], "p")
    task = {"labels": ["a", "b"], "words": ["good", "bad"], "template": "{text} It was good."}
    with pytest.raises(UserError, match="must contain <extra_id_0> exactly once"):
        task_record(task, pair[0], "p")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", "hot"), ("temperature", 1e-40), ("temperature", 10**400),
        ("temperature", True), ("max_tokens", "x"), ("max_tokens", -1), ("max_tokens", 2.5),
        ("words", [1, 2]), ("words", "ab"), ("words", {"a": 1}), ("labels", 5),
        ("labels", ["a", None]), ("labels", ["a", "\ud800"]), ("template", ["{text}"]),
        ("template", 5),
    ],
)  # fmt: skip
def test_a_field_of_another_type_is_named(pair, field: str, value: object) -> None:  # type: ignore[no-untyped-def]
    task = {"labels": ["a", "b"], "words": ["good", "great"],
            "template": "{text} It was <extra_id_0>."}  # fmt: skip
    assert task_record(task, pair[0], "p")["temperature"] == 1.0
    with pytest.raises(UserError, match=f"^p: '{field}' in its task.json must be") as caught:
        task_record({**task, field: value}, pair[0], "p")
    assert len(str(caught.value)) < 150


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ([], "must hold a JSON object"),
        ({"num_virtual_tokens": "x"}, "'num_virtual_tokens' must be"),
    ],
)
def test_a_wrong_adapter_config_is_named(tmp_path: Path, config: object, message: str) -> None:
    save_file({"prompt_embeddings": np.ones((6, 4), np.float32)}, tmp_path / WEIGHTS)
    (tmp_path / "task.json").write_text("{}")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises((UserError, Failure), match=rf"adapter_config\.json.*{message}"):
        read_folder(tmp_path)


def test_names_become_fit_for_urls() -> None:
    assert task_name("Yelp Reviews (5)") == "yelp-reviews-5"
    assert task_name("Café-Prüfung №3") == "cafe-prufung-no3"
    with pytest.raises(UserError, match=r"cannot be made a task's name: pass another as --names$"):
        task_name("***")
    with pytest.raises(UserError, match=r"pass another as --name$"):  # the flag that `add` has
        task_name("***", "--name")


def test_prompts_are_read_in_every_float_type(tmp_path: Path) -> None:
    """bfloat16 too, which numpy has no type for; torch is the judge."""
    prompt = torch.tensor([[1.0, -2.5, 3.14159], [1e-30, -7e20, 0.0]])
    (tmp_path / "task.json").write_text("{}")
    for kind in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        save_torch({"prompt_embeddings": prompt.to(kind)}, tmp_path / WEIGHTS)
        found = read_folder(tmp_path)[1]["prompt_embeddings"]
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, prompt.to(kind).float().numpy())
    assert found[0].tolist() == [1.0, -2.5, 3.140625]  # eight bits of the mantissa are left
    save_torch({"prompt_embeddings": prompt.to(torch.int32)}, tmp_path / WEIGHTS)
    with pytest.raises(UserError, match="'prompt_embeddings' is of type I32: save it as F32"):
        read_folder(tmp_path)


def test_pefts_double_prompt_keeps_its_encoder_half(tmp_path: Path) -> None:
    rows = np.arange(24, dtype=np.float32).reshape(6, 4)
    save_file({"prompt_embeddings": rows}, tmp_path / WEIGHTS)
    (tmp_path / "task.json").write_text("{}")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"num_virtual_tokens": 3}))
    assert (read_folder(tmp_path)[1]["prompt_embeddings"] == rows[:3]).all()
    (tmp_path / "adapter_config.json").write_text(json.dumps({"num_virtual_tokens": 5}))
    with pytest.raises(Failure, match=r"holds 6 rows, but adapter_config\.json says 5"):
        read_folder(tmp_path)  # as `tune --init` has it


def test_damaged_and_missing_prompts_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_folder(tmp_path / "none")
    with pytest.raises(UserError, match=f"holds no {WEIGHTS}"):
        read_folder(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(b"\x00" * 40)
    (tmp_path / "task.json").write_text("{}")
    with pytest.raises(Failure, match="is damaged or cut short"):
        read_folder(tmp_path)
    (tmp_path / "task.json").write_text("[]")
    with pytest.raises(Failure, match=r"task\.json must hold a JSON object"):
        read_folder(tmp_path)


def test_padding_stands_before() -> None:
    assert left_padded(np.ones((2, 1)), 0, 3)[:, 0].tolist() == [0, 1, 1]


def product(weights: np.ndarray, name: str = "w") -> onnx.ModelProto:
    """x [B, K] @ w."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", weights.shape[0]])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["B", weights.shape[1]])
    node = helper.make_node("MatMul", ["x", name], ["y"], name="product")
    constant = numpy_helper.from_array(weights, name)
    graph = helper.make_graph([node], "g", [x], [y], [constant])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_graphs_share_equal_constants_in_one_file(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    first, second = (random.normal(size=(40, 30)).astype(np.float32) for _ in range(2))
    models = [product(first), product(first, "again"), product(second)]
    with WeightsFile(tmp_path / "weights.data") as weights:
        for index, model in enumerate(models):
            (tmp_path / f"{index}.onnx").write_bytes(weights.place(model).SerializeToString())
    # Two matrices of 4800 bytes: the second starts at the next page of 4096.
    assert (tmp_path / "weights.data").stat().st_size == 2 * 4096 + 4800
    x = random.normal(size=(3, 40)).astype(np.float32)
    for index, matrix in enumerate((first, first, second)):
        got = session(tmp_path / f"{index}.onnx").run(None, {"x": x})[0]
        np.testing.assert_allclose(got, x @ matrix, rtol=1e-4, atol=1e-4)


def test_int8_counts_its_products_and_stays_near(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    matrix = random.normal(size=(64, 48)).astype(np.float32)
    matrix[:, 0] *= 100  # a loud column: per-channel scales keep the others exact
    path = tmp_path / "model.onnx"
    onnx.save(product(matrix), str(path))
    model, figures = int8_onnx(path)
    assert figures == {
        "quantized_products": 1, "weight_bits": 7, "signed_weights": True, "target": "any",
        "per_channel": True,
    }  # fmt: skip
    x = random.normal(size=(5, 64)).astype(np.float32)
    got = session(model.SerializeToString()).run(None, {"x": x})[0]
    # 7 bits: the step of a column's weights is its largest / 64, of the inputs the range / 255.
    error = np.abs(got - x @ matrix)[:, 1:]
    assert error.max() < 0.5 and error.max() > 0


@pytest.mark.parametrize("target", ["any", "avx2"])
def test_int8_does_not_saturate_where_two_large_products_meet(tmp_path: Path, target: str) -> None:
    """255 x 127, twice, is beyond 16 bits: kernels without VNNI would cut it to half."""
    matrix = np.ones((64, 16), np.float32)
    onnx.save(product(matrix), str(tmp_path / "model.onnx"))
    model, figures = int8_onnx(tmp_path / "model.onnx", target)
    assert figures["target"] == target
    x = np.ones((3, 64), np.float32)
    got = session(model.SerializeToString()).run(None, {"x": x})[0]
    np.testing.assert_allclose(got, 64.0, rtol=0.01)


@pytest.mark.parametrize(
    ("machine", "flags", "target"),
    [
        ("x86_64", "sse avx2 avx512f avx512_vnni", "avx512_vnni"),
        ("x86_64", "avx2 avx_vnni", "avx512_vnni"),
        ("x86_64", "sse avx2 avx512f", "avx2"),
        ("x86_64", "sse", "any"),
        ("x86_64", None, "any"),
        ("aarch64", None, "arm64"),
    ],
)
def test_the_instruction_set_is_read_from_the_machine(
    tmp_path: Path, machine: str, flags: str | None, target: str
) -> None:
    path = tmp_path / "cpuinfo"
    if flags is not None:
        path.write_text(f"processor : 0\nflags : {flags}\n")
    assert this_machine(path, machine) == target


def test_int8_refuses_a_graph_without_products(tmp_path: Path) -> None:
    model = product(np.ones((4, 4), np.float32))
    model.graph.node[0].op_type = "Add"
    assert weight_products(model) == []
    onnx.save(model, str(tmp_path / "model.onnx"))
    with pytest.raises(Failure, match="only 0 of 0 products became int8"):
        int8_onnx(tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("rows", "lost", "refused"),
    [(100, 1, False), (100, 2, True), (40, 1, False), (1000, 5, False), (1000, 6, True)],
)
def test_a_variant_may_lose_half_a_point_or_one_row(rows: int, lost: int, refused: bool) -> None:
    found = {"accuracy_change": -lost / rows, "texts": rows, "task": "film"}
    if refused:
        with pytest.raises(Failure, match="--force"):
            refuse("int8", found)
    else:
        refuse("int8", found)
