"""The bundle format: what is written is read, what is damaged is named, writers do not collide."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import serve_toy as toy

from serve import bundle, files
from serve.classifier import Classifier
from serve.errors import Failure, UserError


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.make_bundle(tmp_path_factory.mktemp("bundle") / "b")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "b"))


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def test_what_was_written_is_read(folder: Path) -> None:
    found = bundle.load(folder)
    assert (found.mode, found.prompt_tokens, found.size("d_model")) == ("prefix", toy.P, toy.D)
    assert found.graph("fp16") == folder / "model.fp16.onnx"
    food = found.tasks["food"]
    assert food.labels == ["no", "so-so", "yes"]
    assert food.word_ids == [toy.word_id(word) for word in ("awful", "nice", "great")]
    assert food.suffix_ids == [toy.word_id("was"), toy.MASK, 1] and food.temperature == 1.0
    np.testing.assert_array_equal(found.read_prompt(food)["prompt_embeddings"], toy.prompt_of(2, 3))
    assert food.size_bytes == (folder / food.prompt).stat().st_size


NAMES = [
    "bundle.json", "tokenizer.json", "model.onnx", "model.fp16.onnx", "prefix.onnx",
    "weights.data", "film", "food",
]  # fmt: skip


def truncate(path: Path, _: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def empty(path: Path, _: Path) -> None:
    path.write_bytes(b"")


def remove(path: Path, _: Path) -> None:
    path.unlink()


def flip(path: Path, _: Path) -> None:
    data = bytearray(path.read_bytes())
    # In bundle.json a digit, so that it stays valid JSON and only the checksum can tell.
    place = data.index(b'"d_model": 8') + 11 if path.name == "bundle.json" else len(data) // 2
    data[place] ^= 1
    path.write_bytes(bytes(data))


def swap(path: Path, other: Path) -> None:
    data = other.read_bytes()
    path.write_bytes(data[: path.stat().st_size].ljust(path.stat().st_size, b"\0"))


@pytest.mark.parametrize("damage", [truncate, empty, remove, flip, swap])
@pytest.mark.parametrize("name", NAMES)
def test_damage_to_any_file_is_refused_with_its_name(
    folder: Path, name: str, damage: Callable[[Path, Path], None]
) -> None:
    tasks = bundle.list_tasks(folder)
    path = folder / (tasks[name].prompt if name in tasks else name)
    damage(path, folder / ("tokenizer.json" if name != "tokenizer.json" else "weights.data"))
    with pytest.raises((Failure, UserError), match=path.name):
        bundle.load(folder)


def test_two_prompts_swapped_are_noticed(folder: Path) -> None:
    toy.add(folder, "other", ["a", "b"], ["bad", "good"], toy.prompt_of(5))
    tasks = bundle.list_tasks(folder)
    film, other = folder / tasks["film"].prompt, folder / tasks["other"].prompt
    assert film.stat().st_size == other.stat().st_size
    data = film.read_bytes()
    film.write_bytes(other.read_bytes())
    other.write_bytes(data)
    with pytest.raises(Failure, match=r"safetensors does not match its hash"):
        bundle.load(folder)
    with pytest.raises(Failure, match="does not match its hash"):
        found = bundle.load(folder, verify=False)
        found.read_prompt(found.tasks["film"])


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change bundle.json as a hostile or mistaken writer could, with a right checksum."""
    document = json.loads((folder / "bundle.json").read_text())
    change(document)
    document["checksum"] = bundle._checksum(document)
    (folder / "bundle.json").write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(version=2), "format version 2"),
        (lambda d: d.update(format="other"), "not a bundle"),
        (lambda d: d.update(mode="odd"), "'mode'"),
        (lambda d: d.pop("backbone"), "'backbone'"),
        (lambda d: d["backbone"].update(d_model=0), r"backbone\.d_model"),
        (lambda d: d.update(prompt_tokens="5"), "prompt_tokens"),
        (lambda d: d.update(prefix_graph=None), "prefix_graph"),
        (lambda d: d.update(prefix_graph="../prefix.onnx"), "not a path inside"),
        (lambda d: d["precisions"]["fp32"].update(graph="/etc/passwd"), "not a path inside"),
        (lambda d: d["precisions"]["fp32"].update(graph="no.onnx"), r"no\.onnx"),
        (lambda d: d["precisions"].clear(), "'precisions'"),
        (lambda d: d["files"].update({"../x": {"sha256": "", "bytes": 1}}), "not a path inside"),
        (lambda d: d["files"].update({"a//b": {"sha256": "", "bytes": 1}}), "not a path inside"),
        (lambda d: d["files"].pop("tokenizer.json"), r"tokenizer\.json"),
        (lambda d: d["tasks"]["film"].update(prompt="../../secret"), "not a path inside"),
        (lambda d: d["tasks"]["film"].update(prompt="prompts/../../x"), "not a path inside"),
        (lambda d: d["tasks"].update({"../film": d["tasks"]["film"]}), "cannot be a task's name"),
        (lambda d: d["tasks"]["film"].update(sha256=None), "'sha256'"),
        (lambda d: d["tasks"]["film"].update(word_ids=[1, 99]), "ids below"),
        (lambda d: d["tasks"]["film"].update(word_ids=[1]), "word_ids"),
        (lambda d: d["tasks"]["film"].update(labels=["a", "a"]), "twice"),
        (lambda d: d["tasks"]["film"].update(labels=["a"]), "'labels'"),
        (lambda d: d["tasks"]["film"].update(temperature=0), "temperature"),
        (lambda d: d["tasks"]["film"].update(temperature=1e-40), "'temperature' must be a number"),
        (lambda d: d["tasks"]["film"].update(temperature=True), "'temperature' must be a number"),
        (lambda d: d["tasks"]["film"].update(temperature=10**400), "'temperature' must be"),
        (lambda d: d["tasks"]["film"].update(temperature=float("nan")), "'temperature' must be"),
        (lambda d: d["tasks"]["film"].update(template=5), "'template' must be text"),
        (lambda d: d["tasks"]["film"].update(template=float("nan")), "'template' must be text"),
        (lambda d: d["tasks"]["film"].update(labels=["a", "\ud800"]), "'labels'"),
        (lambda d: d["tasks"]["film"].update(info=[]), "'info' must be an object"),
        (lambda d: d["tasks"]["film"].update(suffix_ids=[1] * 64), "no room"),
        (lambda d: d["tasks"]["film"].pop("labels"), "'labels' is missing"),
        (lambda d: d.pop("tasks"), "tasks"),
        (lambda d: d.update(tasks=[]), "not valid"),
    ],
)
def test_a_wrong_description_is_refused(
    folder: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    rewrite(folder, change)
    with pytest.raises(Failure, match=message) as caught:
        bundle.load(folder)
    assert "bundle.json" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["", "A", "a/b", "../a", ".a", "a b", "é", "a" * 65, "-a"])
def test_a_task_name_that_is_no_file_name_is_refused(folder: Path, name: str) -> None:
    before = contents(folder)
    with pytest.raises(UserError, match="cannot be a task's name"):
        toy.add(folder, name, ["a", "b"], ["bad", "good"], toy.prompt_of(5))
    assert contents(folder) == before


@pytest.mark.parametrize(
    "prompt",
    [
        np.zeros((toy.P, toy.D + 1), np.float32),
        np.zeros((toy.P + 1, toy.D), np.float32),
        np.zeros((0, toy.D), np.float32),
        np.zeros(toy.D, np.float32),
        np.full((toy.P, toy.D), np.nan, np.float32),
        {"weights": np.zeros((toy.P, toy.D), np.float32)},
    ],
)
def test_a_prompt_that_does_not_fit_changes_nothing(folder: Path, prompt: Any) -> None:
    before = contents(folder)
    with pytest.raises(UserError, match="prompt"):
        bundle.add_task(folder, "new", toy.record(["a", "b"], ["bad", "good"]), prompt)
    assert contents(folder) == before


def test_mode_deep_needs_its_constants(tmp_path: Path) -> None:
    folder = toy.make_bundle(tmp_path / "b", "deep")
    with pytest.raises(UserError, match="no 'states'"):
        bundle.add_task(folder, "x", toy.record(["a", "b"], ["bad", "good"]), toy.prompt_of(1))
    arrays = bundle.load(folder).read_prompt(bundle.list_tasks(folder)["food"])
    assert arrays["kv"].shape == (toy.L, 2, toy.H, 3, toy.K)


def age(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_a_replaced_prompt_stays_for_an_hour_for_the_servers_that_read_it(folder: Path) -> None:
    running = bundle.load(folder)
    film, food = running.tasks["film"], running.tasks["food"]
    age(folder / film.prompt, 7200)  # when it was made does not count
    age(folder / food.prompt, 7200)
    toy.add(folder, "film", ["n", "p"], ["bad", "good"], toy.prompt_of(9))
    found = bundle.load(folder)  # a prompt that nothing refers to does no harm
    assert found.tasks["film"].labels == ["n", "p"] and list(found.tasks) == ["film", "food"]
    toy.add(folder, "other", ["n", "p"], ["bad", "good"], toy.prompt_of(8))
    np.testing.assert_array_equal(running.read_prompt(film)["prompt_embeddings"], toy.prompt_of(1))

    age(folder / film.prompt, 3590)
    toy.add(folder, "other", ["n", "p"], ["bad", "good"], toy.prompt_of(7))
    assert (folder / film.prompt).exists()
    age(folder / film.prompt, 3610)
    toy.add(folder, "other", ["n", "p"], ["bad", "good"], toy.prompt_of(6))
    with pytest.raises(Failure, match="task 'film' was replaced in the folder: load it"):
        running.read_prompt(film)
    assert set(running.read_prompt(food)) == {"prompt_embeddings"}  # old, but in use
    (folder / food.prompt).unlink()
    with pytest.raises(Failure, match="missing from the bundle: export the bundle again"):
        running.read_prompt(food)


def test_a_bundle_that_changes_while_it_is_read_is_read_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[object] = []

    def read(path: Path) -> object:
        document = files.read_json(path)
        reads.append(document)
        if len(reads) == 1:  # between reading bundle.json and looking at the files
            old = document["tasks"]["film"]["prompt"]
            monkeypatch.setattr(bundle, "read_json", files.read_json)
            toy.add(folder, "film", ["n", "p"], ["bad", "good"], toy.prompt_of(9))
            (folder / old).unlink()
            monkeypatch.setattr(bundle, "read_json", read)
        return document

    monkeypatch.setattr(bundle, "read_json", read)
    assert bundle.load(folder).tasks["film"].labels == ["n", "p"]
    assert len(reads) == 2


@pytest.mark.parametrize("function", ["read_json", "sha256"])
def test_what_the_system_does_not_let_us_read_is_a_failure(
    folder: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    found = bundle.load(folder)

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(bundle, function, refuse)
    with pytest.raises(Failure, match=r"no permission for .*: check its owner"):
        bundle.load(folder)
    if function == "sha256":
        with pytest.raises(Failure, match=r"no permission for .*film.*safetensors"):
            found.read_prompt(found.tasks["film"])


def test_adding_the_same_prompt_again_keeps_its_file(folder: Path) -> None:
    toy.add(folder, "film", ["n", "p"], ["bad", "good"], toy.prompt_of(1))
    assert bundle.load(folder).tasks["film"].labels == ["n", "p"]


def test_removing_a_task(folder: Path) -> None:
    prompt = folder / bundle.list_tasks(folder)["film"].prompt
    age(prompt, 7200)
    bundle.remove_task(folder, "film")
    assert list(bundle.load(folder).tasks) == ["food"] and prompt.exists()
    age(prompt, 7200)
    toy.add(folder, "other", ["n", "p"], ["bad", "good"], toy.prompt_of(8))
    assert not prompt.exists()
    with pytest.raises(UserError, match="has no task 'film': it has food"):
        bundle.remove_task(folder, "film")


def test_a_bundle_that_was_exported_again_is_not_overwritten(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = bundle.check_prompt

    def meanwhile(*given: Any) -> Any:
        """The exporter's rename falls between the writer's reading and its writing."""
        monkeypatch.setattr(bundle, "check_prompt", check)
        fresh = toy.make_bundle(tmp_path / "fresh", max_tokens=32)
        folder.rename(tmp_path / "old")
        fresh.rename(folder)
        return check(*given)

    monkeypatch.setattr(bundle, "check_prompt", meanwhile)
    with pytest.raises(Failure, match="was exported again meanwhile"):
        toy.add(folder, "new", ["n", "p"], ["bad", "good"], toy.prompt_of(9))
    assert sorted(bundle.load(folder).tasks) == ["film", "food"]
    toy.add(folder, "new", ["n", "p"], ["bad", "good"], toy.prompt_of(9))
    assert sorted(bundle.load(folder).tasks) == ["film", "food", "new"]


@pytest.mark.parametrize("stage", ["atomic_write", "write_json"])
def test_a_writer_that_dies_leaves_the_bundle_as_it_was(
    folder: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    before = {name: task.prompt for name, task in bundle.load(folder).tasks.items()}

    def die(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bundle, stage, die)
    with pytest.raises(OSError):
        toy.add(folder, "film", ["n", "p"], ["bad", "good"], toy.prompt_of(9))
    monkeypatch.undo()
    after = bundle.load(folder)
    assert {name: task.prompt for name, task in after.tasks.items()} == before


def test_writers_at_the_same_time_lose_no_update(folder: Path) -> None:
    def work(number: int) -> None:
        for step in range(5):
            name = f"t{number}-{step}"
            toy.add(folder, name, ["a", "b"], ["bad", "good"], toy.prompt_of(number * 10 + step))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wanted = {"film", "food"} | {f"t{n}-{s}" for n in range(4) for s in range(5)}
    assert set(bundle.load(folder).tasks) == wanted


def test_what_is_no_bundle_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        bundle.load(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"has no bundle\.json"):
        bundle.load(tmp_path)
    with pytest.raises(UserError, match=r"has no bundle\.json"):
        bundle.add_task(tmp_path, "a", {}, toy.prompt_of(1))
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_precision_lists_the_known(folder: Path) -> None:
    with pytest.raises(UserError, match="it has fp32, fp16"):
        bundle.load(folder).graph("int8")


def test_create_names_the_file_that_is_missing(tmp_path: Path, whole: Path) -> None:
    header = bundle.load(whole).header
    (tmp_path / "model.onnx").write_bytes(b"x")
    with pytest.raises(UserError, match=r"model\.fp16\.onnx does not exist"):
        bundle.create(tmp_path, header)


def test_a_bundle_written_into_an_atomic_folder_is_whole(tmp_path: Path, whole: Path) -> None:
    with files.atomic_folder(tmp_path / "b") as temporary:
        for name in ("model.onnx", "model.fp16.onnx", "prefix.onnx", "weights.data"):
            shutil.copy(whole / name, temporary)
        shutil.copy(whole / "tokenizer.json", temporary)
        bundle.create(temporary, bundle.load(whole).header)
        toy.add(temporary, "film", ["a", "b"], ["bad", "good"], toy.prompt_of(1))
    assert list(bundle.load(tmp_path / "b").tasks) == ["film"]


def test_a_folder_that_went_away_is_no_unknown_task(tmp_path: Path) -> None:
    folder = toy.make_bundle(tmp_path / "b")
    classifier = Classifier(folder, threads=1)
    before = classifier.classify(["good film"], "film")
    folder.rename(tmp_path / "aside")
    with pytest.raises(Failure, match="cannot be read any more"):
        classifier.add_task("film")
    assert classifier.classify(["good film"], "film") == before
