"""Mistakes that are refused before the work begins, each with what to do instead."""

from __future__ import annotations

import dataclasses
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from demo.__main__ import check_port
from serve.cli import Command, run
from serve.errors import Failure, UserError
from trainer.__main__ import commands
from trainer.data import Examples
from trainer.few_shot import draw_few_shot
from trainer.options import output_file, output_folder, pick_device, result_folder


def test_a_folder_of_other_files_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"other files.*another --out"):
        result_folder(str(tmp_path))
    (tmp_path / "run.json").write_text("{}")  # an earlier result
    assert result_folder(str(tmp_path)) == tmp_path
    assert result_folder(str(tmp_path / "new")) == tmp_path / "new"
    (tmp_path / "empty").mkdir()
    assert result_folder(str(tmp_path / "empty")) == tmp_path / "empty"


def test_an_output_that_cannot_be_written_is_said_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for out in (str(tmp_path / "file" / "new"), str(tmp_path / ("long" * 70))):
        for check in (output_folder, result_folder, output_file):
            with pytest.raises(UserError, match=r"--out .* cannot be written \(.*\): pass another"):
                check(out)
    for out in (".", "..", ""):
        with pytest.raises(UserError, match=r"--out .* is no name of its own"):
            result_folder(out)
    with pytest.raises(UserError, match="a folder, but a file is written"):
        output_file(str(tmp_path))
    with pytest.raises(UserError, match=r"--out a\.csv: the name must end in \.parquet"):
        output_file("a.csv", ".parquet")
    path = tmp_path / "not" / "yet" / "x.parquet"
    assert output_file(str(path), ".parquet") == path
    assert list(path.parent.iterdir()) == []  # what was tried is gone


@pytest.mark.parametrize(
    ("argv", "flag"),
    [
        (["label", "--corpus", "none.txt", "--out", "file/x.parquet"], "--out"),
        (["cluster", "--data", "none.csv", "--out", "file/x.parquet"], "--out"),
        (["evaluate", "none", "--json", "file/x.json"], "--json"),
        (["tune", "--task", "vader-film-2", "--out", "file/x"], "--out"),
        (["finetune", "--data", "none.csv", "--out", "."], "--out"),
        (["meta", "--data", "none.csv", "--out", "file/x"], "--out"),
    ],
)
def test_a_command_asks_for_its_output_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    argv: list[str], flag: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    assert run("python -m trainer", "", commands(argv), argv) == 2
    assert capsys.readouterr().err.startswith(f"error: {flag} {argv[-1]} ")


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mps", "meta", "xla:0", "gpu", "cuda:-1"):
        with pytest.raises(UserError, match=rf"--device {name} is unknown: use auto, cpu or cuda"):
            pick_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no CUDA device is visible here; use --device cpu"):
        pick_device("cuda:9")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="--device cuda:2: the last CUDA device here is cuda:1"):
        pick_device("cuda:2")
    assert pick_device("cuda:1") == torch.device("cuda:1")
    assert pick_device("cpu") == torch.device("cpu")


TUNE = ["tune", "--task", "sst2", "--out", "x"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([*TUNE, "--seed", str(2**32)], "--seed must be at most"),
        (["cluster", "--data", "x", "--out", "x.parquet", "--seed", str(2**64)], "--seed must be"),
        (["label", "--out", "x.parquet", "--seed", str(10**30)], "--seed must be at most"),
        ([*TUNE, "--rate", "1e38"], "--rate must be at most 1000, not 1e38"),
        ([*TUNE, "--weight-decay", "1e38"], "--weight-decay must be at most 1000"),
        (
            ["finetune", "--task", "sst2", "--out", "x", "--rate", "1e38"],
            "--rate must be at most 1",
        ),
        (
            ["meta", "--data", "x", "--out", "x", "--inner-rate", "1e38"],
            "--inner-rate must be at m",
        ),
        (["reproduce", "table1", "--ppt-rate", "1e38"], "--ppt-rate must be at most 1000"),
        (["quickstart", "--seed", str(2**32)], "--seed must be at most"),
        (["reproduce", "table1", "--seeds", "1", str(2**32)], "--seeds must be at most"),
        (["reproduce", "table1", "--modes", "constants"], "--modes takes one of prefix, full, dee"),
        (["reproduce", "table1", "--start", "nonsense"], "--start takes one of vocab, random, not"),
        (
            ["reproduce", "table1", "--device", "mps", "--methods", "ft"],
            "--device mps is unknown: use",
        ),
    ],
)
def test_what_would_end_in_a_traceback_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    argv: list[str], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert run("python -m trainer", "", commands(argv), argv) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_a_port_that_is_taken_is_said_before_the_page_is_built() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(Failure, match=rf"127\.0\.0\.1:{port} .*another --port"):
            check_port("127.0.0.1", port)
    check_port("127.0.0.1", port)


def test_a_missing_package_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def commands(argv: list[str]) -> dict[str, Command]:
        import torch_of_another_name.nn  # type: ignore[import-not-found]  # noqa: F401

        return {}

    assert run("python -m trainer", "", commands, ["tune"]) == 2
    assert capsys.readouterr().err == (
        'error: torch_of_another_name is not installed: pip install ".[all]" in the checkout\n'
    )


def test_ctrl_c_while_packages_are_imported_is_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def commands(argv: list[str]) -> dict[str, Command]:
        raise KeyboardInterrupt

    assert run("python -m trainer", "", commands, ["tune"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_too_few_rows_say_where_the_others_are_and_which_flags_to_pass() -> None:
    examples = Examples(["a"] * 35, np.arange(35) % 2, ("no", "yes"), "forty.csv")
    with pytest.raises(UserError) as caught:
        draw_few_shot(examples, 1, 40, 40, 2)
    assert str(caught.value) == (
        "forty.csv has 35 rows to learn from (a fifth of a file without a column `split` is kept "
        "for testing), but 40 + 40 are to be drawn: pass --train and --validation that add up to "
        "35 at most"
    )


def test_flags_are_known_without_torch() -> None:
    code = (
        "import sys; from trainer import __main__ as m\n"
        "for name in m.commands([]): m.commands([name])[name].config\n"
        "print(sorted({'torch', 'transformers', 'sklearn'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["cluster", "--data", "marks.csv", "--out", "o.parquet"], "name them in words"),
        (["pretrain", "--data", "rows.csv", "--out", "o", "--template", "{a} {text} <extra_id_0>"],
         "cluster or label the texts again"),
        (["reproduce", "table1", "--methods", "pt", "--tasks", "nowhere"],
         "--tasks nowhere: no such task"),
        (["reproduce", "table1", "--methods", "pt", "--data-dir", "."], "--data-dir . has no"),
        (["reproduce", "table1", "--methods", "metapt-y", "--source-y", "none.parquet",
          "--data-dir", "sets", "--tasks", "sst2"], "--source-y none.parquet does not exist"),
        (["reproduce", "table1", "--methods", "pt", "--data-dir", "torn", "--tasks", "sst2"],
         "label 'maybe' is not one of"),
        (["tune", "--data", "marks.csv", "--out", "o"], "pass --labels -1 0 1"),
    ],
)  # fmt: skip
def test_advice_names_no_flag_that_the_command_lacks(
    argv: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "marks.csv").write_text("text,label\n" + "a,-1\nb,0\nc,1\n" * 9)
    (tmp_path / "rows.csv").write_text("text,label\n" + "a,bad\nb,good\n" * 9)
    for folder, label in (("sets", "positive"), ("torn", "maybe")):
        (tmp_path / folder).mkdir()
        rows = "".join(f"text {i},{('negative', label)[i % 2]}\n" for i in range(200))
        (tmp_path / folder / "sst2.csv").write_text("text,label\n" + rows)
    assert run("x", "d", commands, argv) in (1, 2)
    said = capsys.readouterr().err.partition("error: ")[2]
    assert says in said
    own = {
        "--" + field.name.replace("_", "-")
        for field in dataclasses.fields(commands(argv)[argv[0]].config)
    }
    # A flag of a command named for it, as in `cluster ... --text-column`, is no advice for this.
    said = said.replace("cluster or label the texts again with --text-column", "")
    assert set(re.findall(r"(?<!\S)--[a-z][a-z-]+", said)) <= own
