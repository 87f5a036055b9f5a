"""`python -m serve classify` and `info`, in process, on a toy bundle."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import serve_toy as toy

from serve import cli
from serve.__main__ import COMMANDS
from serve.classifier import Classifier

ROOT = Path(cli.__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.make_bundle(tmp_path_factory.mktemp("cli") / "b")


class Outcome:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def run(*arguments: object, stdin: bytes = b"") -> Outcome:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        code = cli.run("python -m serve", "", COMMANDS, [str(a) for a in arguments])
        out, err = capsys.readouterr()
        return Outcome(code, out, err)

    return run


def test_classify_answers_every_line_in_order(folder: Path, call) -> None:
    lines = ["the film was good", "", "bad  awful", "caf\u00e9", "good \u2028 bad"] * 300
    outcome = call("classify", folder, "--task", "food", "--threads", 1,
                   stdin="\n".join(lines).encode())  # fmt: skip
    assert outcome.code == 0
    answers = [json.loads(line) for line in outcome.out.splitlines()]
    wanted = Classifier(folder, threads=1).classify(lines, task="food")
    assert [a["label"] for a in answers] == [result.label for result in wanted]
    for a, result in zip(answers, wanted, strict=True):
        assert a["probabilities"] == pytest.approx(result.probabilities, abs=1e-5)
        assert a["truncated"] is False


def test_windows_line_ends_and_a_byte_order_mark_do_not_count(folder: Path, call) -> None:
    plain = call("classify", folder, "--task", "film", stdin=b"good\nbad\n").out
    windows = call("classify", folder, "--task", "film", stdin=b"\xef\xbb\xbfgood\r\nbad\r\n").out
    assert plain == windows and len(plain.splitlines()) == 2


def test_a_line_in_another_encoding_is_named_after_the_lines_before_it(folder: Path, call) -> None:
    outcome = call("classify", folder, "--task", "film", stdin=b"good\nbad\ncaf\xe9\ngood\n")
    assert outcome.code == 2 and len(outcome.out.splitlines()) == 2
    assert outcome.err.startswith("error: line 3 of the input is not UTF-8 (byte 4)")


def test_no_input_gives_no_output(folder: Path, call) -> None:
    outcome = call("classify", folder, "--task", "film")
    assert (outcome.code, outcome.out) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "nothing"], "no task 'nothing': there are film, food"),
        ([], "--task is missing: the bundle has film, food"),
        (["--task", "film", "--precision", "int8"], "it has fp32, fp16"),
        (["--task", "film", "--threads", "0"], "--threads must be at least 1"),
        (["--task", "film", "--bank-memory", "inf"], "--bank-memory takes a finite number"),
        (["--task", "film", "--bank-memory", "nan"], "--bank-memory takes a finite number"),
        (["--task", "film", "--bank-memory", "1e300"], "--bank-memory must be at most 1e+09"),
        (["--task", "film", "--providers", "Nothing"], "no provider 'Nothing'"),
    ],
)
def test_mistakes_exit_with_2_and_one_line(folder: Path, call, arguments, message: str) -> None:
    outcome = call("classify", folder, *arguments, stdin=b"good\n")
    assert outcome.code == 2 and outcome.out == ""
    assert message in outcome.err and outcome.err.count("\n") == 1


def test_a_damaged_bundle_exits_with_1_and_names_the_file(tmp_path: Path, call) -> None:
    folder = toy.make_bundle(tmp_path / "b")
    (folder / "weights.data").write_bytes(b"")
    for command in (["info", folder], ["classify", folder, "--task", "film"]):
        outcome = call(*command)
        assert outcome.code == 1 and "weights.data" in outcome.err


def test_info_describes_the_bundle(folder: Path, call) -> None:
    text = call("info", folder).out
    assert "mode prefix, 5 prompt tokens" in text
    assert "task food: no (awful), so-so (nice), yes (great)" in text
    value = json.loads(call("info", folder, "--json").out)
    assert value["tasks"]["film"]["labels"] == ["negative", "positive"]
    assert value["backbone"]["d_model"] == toy.D


@pytest.mark.parametrize("command", ["classify", "http", "info"])
def test_help_has_examples(call, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        call(command, "--help")
    assert caught.value.code == 0
    assert f"examples:\n  python -m serve {command} bundle" in capsys.readouterr().out


def test_a_command_that_is_ended_leaves_nothing_behind(tmp_path: Path) -> None:
    script = """
import dataclasses, pathlib, sys, time
from serve.cli import Command, main
from serve.files import atomic_folder

@dataclasses.dataclass
class Config:
    "Fill a folder."

def fill(config):
    with atomic_folder(pathlib.Path("made")) as folder:
        (folder / "part").write_text("half")
        print("filling", flush=True)
        time.sleep(60)

main("fill", "", {"fill": Command(Config, fill)})
"""
    process = subprocess.Popen(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{script}", "fill"],
        cwd=tmp_path, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "filling\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []
