"""The Triton repository: Triton's schema, the graph's inputs, and the classifier's answers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import serve_toy as toy
from triton_stand import Triton, TritonError, assert_answers, column, read_config, schema

from exporter import triton
from exporter.triton import Settings, export_triton
from serve import bundle as bundles
from serve.cli import run
from serve.errors import Failure, UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = toy.make_bundle(tmp_path_factory.mktemp("triton") / "b")
    toy.add(made, "warm", ["a", "b"], ["dull", "nice"], toy.prompt_of(5), temperature=2.5)
    return made


@pytest.fixture(scope="module")
def repository(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("models") / "r"
    assert export_triton(folder, out, Settings(threads=1)) == [
        "metapt_graph", "metapt_text", "metapt_answer", "metapt"
    ]  # fmt: skip
    return out


def test_the_ensemble_answers_as_the_classifier(repository: Path, folder: Path) -> None:
    assert_answers(Triton(repository), folder)


@pytest.mark.parametrize("mode", ["full", "deep"])
def test_other_modes(mode: str, tmp_path: Path) -> None:
    made = toy.make_bundle(tmp_path / "b", mode)
    export_triton(made, tmp_path / "r", Settings(threads=1))
    assert_answers(Triton(tmp_path / "r"), made)


def test_half_precision(folder: Path, tmp_path: Path) -> None:
    export_triton(folder, tmp_path / "r", Settings(precision="fp16", threads=1))
    assert_answers(Triton(tmp_path / "r"), folder, "fp16")
    kinds = schema().DataType
    assert read_config(tmp_path / "r/metapt_graph").output[0].data_type == kinds.TYPE_FP16
    assert read_config(tmp_path / "r/metapt_answer").input[0].data_type == kinds.TYPE_FP16


def test_configured_tensors_are_the_graphs(repository: Path) -> None:
    config = read_config(repository / "metapt_graph")
    model = onnx.load(repository / "metapt_graph/1/model.onnx", load_external_data=False)
    types = {onnx.TensorProto.INT64: "TYPE_INT64", onnx.TensorProto.FLOAT: "TYPE_FP32"}
    for declared, real in ((config.input, model.graph.input), (config.output, model.graph.output)):
        assert [item.name for item in declared] == [item.name for item in real]
        for item, entry in zip(declared, real, strict=True):
            tensor = entry.type.tensor_type
            assert schema().DataType.Name(item.data_type) == types[tensor.elem_type]
            shape = item.reshape.shape if item.HasField("reshape") else item.dims
            assert len(tensor.shape.dim) == 1 + len(shape)  # the batch is not in `dims`
            for size, dim in zip(tensor.shape.dim[1:], shape, strict=True):
                # A size without a number in the graph may be fixed for Triton, not the other way.
                assert not size.HasField("dim_value") or size.dim_value == dim
    assert not {item.name for item in model.graph.input} & {"bank_kv", "bank_states", "label_ids"}
    assert config.output[0].dims == [3]  # the labels of `food`, which has most


def test_settings_reach_the_configuration(folder: Path, tmp_path: Path) -> None:
    settings = Settings(name="film", device="gpu", instances=2, max_batch=64, max_delay=1.5,
                        max_queue=9, deadline=0.5)  # fmt: skip
    export_triton(folder, tmp_path / "r", settings)
    config = read_config(tmp_path / "r/film_graph")
    group = schema().ModelInstanceGroup
    assert (config.instance_group[0].kind, config.instance_group[0].count) == (group.KIND_GPU, 2)
    assert config.max_batch_size == 64 and not config.parameters
    batching = config.dynamic_batching
    assert batching.max_queue_delay_microseconds == 1500
    assert batching.default_queue_policy.max_queue_size == 9
    assert batching.default_queue_policy.default_timeout_microseconds == 500_000
    assert batching.default_queue_policy.timeout_action == schema().ModelQueuePolicy.REJECT
    for name in ("film", "film_text", "film_answer"):
        assert read_config(tmp_path / "r" / name).max_batch_size == 64
    for name in ("film_text", "film_answer"):
        assert read_config(tmp_path / "r" / name).instance_group[0].kind == group.KIND_CPU


def test_on_a_cpu_the_threads_are_set(folder: Path, tmp_path: Path) -> None:
    export_triton(folder, tmp_path / "r", Settings(threads=3, ids_only=True))
    config = read_config(tmp_path / "r/metapt_graph")
    assert config.instance_group[0].kind == schema().ModelInstanceGroup.KIND_CPU
    assert config.parameters["intra_op_thread_count"].string_value == "3"
    assert [item.name for item in (tmp_path / "r").iterdir()] == ["metapt_graph"]


def test_lengths_are_padded_so_that_requests_have_one_shape(repository: Path) -> None:
    server = Triton(repository)
    shapes = set()
    for text in ("bad", "good film", "a bit very long"):
        got = server.infer("metapt_text", TEXT=column([text]), TASK=column(["film"]))
        shapes.add(got["input_ids"].shape)
        count = len(text.split()) + 3
        assert got["attention_mask"].tolist() == [[1] * count + [0] * (16 - count)]
        assert not got["input_ids"][0, count:].any()
    assert shapes == {(1, 16)}


def test_a_request_that_is_not_understood_fails_alone(repository: Path) -> None:
    server = Triton(repository)
    good = {"TEXT": column(["good"]), "TASK": column(["film"])}
    requests = [
        good,
        {"TEXT": column(["good"]), "TASK": column(["none"])},
        {"TEXT": column([b"\xff"]), "TASK": column(["film"])},
        {"TEXT": column(["bad", "good"]), "TASK": column(["food", "warm"])},
    ]
    responses = server.models["metapt_text"].execute(requests)
    assert "no task 'none': there are film, food, warm" in str(responses[1].error)
    assert "utf-8" in str(responses[2].error)
    for index in (0, 3):
        assert responses[index].error is None
        alone = server.infer("metapt_text", **requests[index])
        for tensor in responses[index].tensors:
            assert np.array_equal(tensor.as_numpy(), alone[tensor.name])
    with pytest.raises(TritonError, match="not finite"):
        server.infer("metapt_answer", logits=np.full((1, 3), np.nan, np.float32),
                     task_id=np.zeros((1, 1), np.int64))  # fmt: skip


def test_the_python_models_need_nothing_of_this_project(repository: Path) -> None:
    code = f"""
import sys, types
sys.modules["triton_python_backend_utils"] = types.ModuleType("triton_python_backend_utils")
for name in ("serve", "exporter", "trainer", "onnxruntime", "torch"):
    sys.modules[name] = None
for kind in ("text", "answer"):
    folder = {str(repository)!r} + "/metapt_" + kind
    sys.path.append(folder + "/1")
    model = types.ModuleType("model")
    exec(open(folder + "/1/model.py").read(), vars(model))
    model.TritonPythonModel().initialize({{"model_repository": folder, "model_version": "1"}})
"""
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_command_and_its_errors(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from exporter.__main__ import COMMANDS

    def command(*argv: str) -> tuple[int, str]:
        return run("x", "", COMMANDS, ["triton", *argv]), capsys.readouterr().err

    out = str(tmp_path / "r")
    assert command(str(folder), out, "--max-batch", "8")[0] == 0
    before = (tmp_path / "r/metapt_graph/config.pbtxt").read_text()
    assert "max_batch_size: 8" in before
    assert command(str(folder), out, "--max-batch", "9")[0] == 0  # its own folder is replaced
    assert "max_batch_size: 9" in (tmp_path / "r/metapt_graph/config.pbtxt").read_text()
    for argv, message in (
        ((str(tmp_path / "none"), out), "is not a folder"),
        ((str(folder), out, "--precision", "int8"), "no precision 'int8'"),
        ((str(folder), out, "--name", "../x"), "--name '../x' cannot be a folder's name"),
        ((str(folder), str(folder)), "is not empty and holds no metapt_graph: pass another OUT"),
        ((str(folder),), "OUT is missing"),
    ):
        code, error = command(*argv)
        assert code == 2 and message in error and error.count("\n") == 1


def test_other_models_beside_ours_are_not_replaced(folder: Path, tmp_path: Path) -> None:
    out, settings = tmp_path / "r", Settings(threads=1, ids_only=True)
    export_triton(folder, out, settings)
    (out / "bert/1").mkdir(parents=True)
    (out / "bert/config.pbtxt").write_text("mine")
    with pytest.raises(UserError, match=r"r holds bert beside the models of metapt.* OUT of its"):
        export_triton(folder, out, settings)
    assert sorted(path.name for path in out.iterdir()) == ["bert", "metapt_graph"]
    assert (out / "bert/config.pbtxt").read_text() == "mine"


def test_behind_a_link_the_repository_is_replaced(folder: Path, tmp_path: Path) -> None:
    out, link, settings = tmp_path / "r", tmp_path / "link", Settings(threads=1, ids_only=True)
    export_triton(folder, out, settings)
    link.symlink_to("r")
    (out / "metapt_graph" / "old").write_text("old")
    export_triton(folder, link, settings)
    assert link.is_symlink() and not (out / "metapt_graph" / "old").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "r"]


def test_a_graph_that_answers_differently_is_not_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = triton.bake

    def swapped(source: Path, target: Path, constants: dict[str, np.ndarray]) -> None:
        real(source, target, {name: value[::-1] for name, value in constants.items()})

    monkeypatch.setattr(triton, "bake", swapped)
    with pytest.raises(Failure, match="differs from the bundle's"):
        export_triton(folder, tmp_path / "r", Settings(threads=1))
    assert list(tmp_path.iterdir()) == []


def test_more_tasks_than_fit_a_batch_of_the_bundles_own(tmp_path: Path) -> None:
    """The last batch has no task as wide as the widest of all, and the bundle's logits are narrower
    there than the repository's."""
    made = toy.make_bundle(tmp_path / "b")
    wide = ["bad", "good", "nice", "dull"]
    toy.add(made, "a", wide, wide, toy.prompt_of(1))
    for number in range(32):
        toy.add(made, f"z{number}", ["n", "p"], ["bad", "good"], toy.prompt_of(number))
    export_triton(made, tmp_path / "r", Settings(threads=1))
    assert_answers(Triton(tmp_path / "r"), made)


def test_a_bundle_without_tasks_is_refused(tmp_path: Path) -> None:
    made = toy.make_bundle(tmp_path / "b")
    for name in ("film", "food"):
        bundles.remove_task(made, name)
    with pytest.raises(UserError, match="has no task"):
        export_triton(made, tmp_path / "r", Settings())


def test_prompts_do_not_leave_with_the_text_model(repository: Path) -> None:
    settings = json.loads((repository / "metapt_text/1/tasks.json").read_text())
    assert all("arrays" not in task and "info" not in task for task in settings["tasks"])
