"""Folders that appear whole or not at all: what may not be replaced."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from serve.errors import UserError
from serve.files import atomic_folder, atomic_write


@pytest.mark.parametrize("name", [".", "..", "a/.."])
def test_a_folder_without_a_name_of_its_own_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "here" / "a").mkdir(parents=True)
    (tmp_path / "here" / "kept").write_text("x")
    monkeypatch.chdir(tmp_path / "here")
    with (
        pytest.raises(UserError, match="cannot be replaced: pass a name as --out"),
        atomic_folder(name),
    ):
        pytest.fail("a folder was given")
    with pytest.raises(UserError, match="cannot be replaced"), atomic_write(name):
        pytest.fail("a file was given")
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    assert found == {"here", "here/a", "here/kept"}


def test_a_relative_folder_is_replaced_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for text in ("old", "new"):
        with atomic_folder("out") as folder:
            (folder / text).write_text(text)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("step", [1, 2])
def test_a_signal_right_after_a_step_leaves_a_whole_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """The handler of SIGTERM raises as soon as the call that was under way has returned."""
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "old").write_text("old")
    rename, calls = os.rename, []

    def renamed(source: Path, target: Path) -> None:
        rename(source, target)
        calls.append(target)
        if len(calls) == step:
            raise SystemExit(143)

    monkeypatch.setattr(os, "rename", renamed)
    with pytest.raises(SystemExit), atomic_folder(tmp_path / "out") as folder:
        (folder / "new").write_text("new")
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    assert found == {"out", "out/old" if step == 1 else "out/new"}
