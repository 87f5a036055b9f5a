"""Folders that appear whole or not at all: what may not be replaced."""

from __future__ import annotations

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
