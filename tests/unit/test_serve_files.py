"""Folders that appear whole or not at all, what may not be replaced, and lines as they come."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from serve.errors import Failure, UserError, explain_os_error
from serve.files import atomic_folder, atomic_write, read_json, text_chunks


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


@pytest.mark.parametrize("text", ["{", "\xff", "[" * 10**5, '{"size": ' + "1" * 5000 + "}"])
def test_what_is_not_json_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(Failure, match=r"a\.json is not valid JSON \(.*\): it is damaged"):
        read_json(tmp_path / "a.json")


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


@pytest.mark.parametrize("there", [True, False])
def test_behind_a_symbolic_link_its_target_is_replaced(tmp_path: Path, there: bool) -> None:
    (tmp_path / "disk").mkdir()
    if there:
        (tmp_path / "disk" / "target").mkdir()
        (tmp_path / "disk" / "target" / "old").write_text("old")
    link = tmp_path / "link"
    link.symlink_to(Path("disk") / "target")
    with atomic_folder(link) as folder:
        (folder / "new").write_text("new")
    assert link.is_symlink() and os.readlink(link) == "disk/target"
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    assert found - {"link/new"} == {"disk", "disk/target", "disk/target/new", "link"}


def test_lines_are_given_when_no_further_one_is_there() -> None:
    reading, writing = os.pipe()
    with open(reading, "rb") as stream, open(writing, "wb", buffering=0) as pipe:
        chunks = text_chunks(stream, "the input", 3)
        pipe.write(b"\xef\xbb\xbfone\r\ntwo\nthr")
        assert next(chunks) == ["one", "two"]
        pipe.write(b"ee\n")
        assert next(chunks) == ["three"]
        pipe.write(b"a\nb\nc\nd\ne\nf\ng\n")
        assert [next(chunks) for _ in range(3)] == [["a", "b", "c"], ["d", "e", "f"], ["g"]]
        pipe.write(b"last")
        pipe.close()
        assert list(chunks) == [["last"]]


def test_lines_that_are_there_are_given_together_and_whole(tmp_path: Path) -> None:
    lines = [f"{n} " + "x" * (n * 37 % 500) for n in range(3000)] + ["y" * 300_000, "", "z"]
    data = "\n".join(lines).encode()
    (tmp_path / "lines").write_bytes(data)
    with open(tmp_path / "lines", "rb") as file:
        for stream in (io.BytesIO(data), file):
            chunks = list(text_chunks(stream, "the input", 512))
            assert [line for chunk in chunks for line in chunk] == lines
            assert [len(chunk) for chunk in chunks] == [512] * 5 + [3003 - 5 * 512]
    assert list(text_chunks(io.BytesIO(b""), "the input", 512)) == []
    assert list(text_chunks(io.BytesIO(b"\n\na\n"), "the input", 512)) == [["", "", "a"]]


def test_a_way_through_a_missing_folder_is_no_way_to_one_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It becomes one once the missing folder is made, after every look at what is replaced."""
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis").write_text("x")
    for name in ("missing/../precious", "precious/no/../../precious", "missing/../new"):
        for write in (atomic_folder, atomic_write):
            with pytest.raises(UserError, match=r"without '\w+/\.\.'"), write(tmp_path / name):
                pytest.fail("something was given")
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    assert found == {"precious", "precious/thesis"}
    monkeypatch.chdir(tmp_path / "precious")
    for name in (tmp_path / "precious" / ".." / "new", Path("../newer/still")):  # ways that are
        with atomic_folder(name) as folder:
            (folder / "a").write_text("x")
        with atomic_write(name / ".." / "file") as file:
            file.write_text("x")
    assert (tmp_path / "new" / "a").is_file() and (tmp_path / "newer" / "still" / "a").is_file()


def test_a_failed_copy_names_what_could_not_be_written(tmp_path: Path) -> None:
    error = OSError(errno.ENOSPC, "No space left on device", "source", None, "target")
    assert explain_os_error(error).startswith("the disk that holds target is full")
    (tmp_path / "source").write_bytes(b"x" * 4096)
    code = "import shutil, sys; shutil.copyfile('source', 'target')"
    limited = f'ulimit -f 1; exec {sys.executable} -c "{code}"'
    done = subprocess.run(["bash", "-c", limited], cwd=tmp_path, capture_output=True, text=True)
    assert "'source' -> 'target'" in done.stderr  # what Python makes of a copy
    error = OSError(errno.EFBIG, "File too large", "source", None, "target")
    assert explain_os_error(error).startswith("target is larger than this user may write")
    assert "ulimit -n" in explain_os_error(OSError(errno.EMFILE, "Too many open files"))


def test_what_is_written_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the name as well, before the block is left."""
    events: list[int | str] = []
    monkeypatch.setattr(os, "fsync", lambda number: events.append(os.fstat(number).st_ino))
    for name in ("replace", "rename"):
        real = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *paths, real=real: (events.append("named"), real(*paths))
        )
    with atomic_write(tmp_path / "file") as temporary:
        temporary.write_text("x")
        own = temporary.stat().st_ino
    here = tmp_path.stat().st_ino
    assert events == [own, "named", here]
    events.clear()
    with atomic_folder(tmp_path / "folder") as folder:
        (folder / "a").mkdir()
        (folder / "a" / "b").write_text("x")
        (folder / "c").write_text("x")
        inside = {(folder / name).stat().st_ino for name in ("a/b", "c")}
    assert set(events[:2]) == inside and events[2:] == ["named", here]
