"""`python -m serve classify` and `info`, in process, on a toy bundle."""

from __future__ import annotations

import io
import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import serve_toy as toy

from serve import bundle, cli, latency
from serve.__main__ import COMMANDS
from serve.classifier import Classifier
from serve.errors import UserError

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


def test_a_line_that_comes_alone_is_answered_at_once(folder: Path) -> None:
    command = [sys.executable, "-m", "serve", "classify", str(folder), "--task", "film"]
    texts = ["good", "bad awful"]
    wanted = Classifier(folder, threads=1).classify(texts, "film")
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        for text, result in zip(texts, wanted, strict=True):
            process.stdin.write(text.encode() + b"\n")
            process.stdin.flush()
            assert select.select([process.stdout], [], [], 30)[0], "no answer"
            answer = json.loads(process.stdout.readline())
            assert answer["score"] == pytest.approx(result.score, abs=1e-5)
        process.stdin.close()
        assert process.wait(30) == 0


def test_no_input_gives_no_output(folder: Path, call) -> None:
    outcome = call("classify", folder, "--task", "film")
    assert (outcome.code, outcome.out) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "nothing"], "no task 'nothing': there are film, food"),
        ([], "pass a task (--task): there are film, food"),
        (["--task", "film", "--precision", "int8"], "it has fp32, fp16"),
        (["--task", "film", "--threads", "0"], "--threads must be at least 1"),
        (["--task", "film", "--bank-memory", "inf"], "--bank-memory takes a finite number"),
        (["--task", "film", "--bank-memory", "nan"], "--bank-memory takes a finite number"),
        (["--task", "film", "--bank-memory", "1e300"], "--bank-memory must be at most 1000000000"),
        (["--task", "film", "--providers", "Nothing"], "no provider 'Nothing'"),
    ],
)
def test_mistakes_exit_with_2_and_one_line(folder: Path, call, arguments, message: str) -> None:
    outcome = call("classify", folder, *arguments, stdin=b"good\n")
    assert outcome.code == 2 and outcome.out == ""
    assert message in outcome.err and outcome.err.count("\n") == 1


def test_a_label_that_the_output_has_no_letter_for_is_spelt_out(tmp_path: Path) -> None:
    folder = toy.make_bundle(tmp_path / "b")
    toy.add(folder, "sun", ["\u2600", "\u2601"], ["bad", "good"], toy.prompt_of(1))
    done = subprocess.run(
        [sys.executable, "-m", "serve", "classify", str(folder), "--task", "sun"],
        input=b"good\n", capture_output=True, timeout=120,
        env={**os.environ, "PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert b"\\u260" in done.stdout


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


@pytest.mark.parametrize("command", ["classify", "http", "latency", "info"])
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


def test_calls_are_timed_with_the_texts_in_turn() -> None:
    now, taken = [0.0], [0.010, 0.030, 0.020, 0.050]
    calls: list[list[str]] = []

    def answer(texts: list[str]) -> None:
        calls.append(texts)
        now[0] += taken[len(calls) % 4]

    times = latency.call_times(answer, ["a", "b", "c"], 2, 0.325, lambda: now[0])
    assert calls[:4] == [["a", "b"], ["c", "a"], ["b", "c"], ["a", "b"]]
    assert len(calls) == 12  # the twelfth begins at 0.32, a thirteenth would at 0.33
    assert times.tolist() == pytest.approx([0.03, 0.02, 0.05, 0.01] * 3)
    found = latency.summary(times, 2)
    assert found["p50_ms"] == pytest.approx(20) and found["p95_ms"] == pytest.approx(50)
    assert found["texts_per_second"] == pytest.approx(24 / 0.33)
    assert len(latency.call_times(answer, ["a"], 1, 0.0, lambda: now[0])) == 10


def test_percentiles_are_of_the_nearest_rank() -> None:
    times = np.random.default_rng(0).permutation(np.arange(1, 201)) / 1000  # 1 to 200 ms
    found = latency.summary(times, 3)
    assert (found["texts"], found["calls"]) == (3, 200)
    for name, wanted in (("p50_ms", 100), ("p95_ms", 190), ("p99_ms", 198)):
        assert found[name] == pytest.approx(wanted)
    assert found["texts_per_second"] == pytest.approx(3 * 200 / 20.1)  # 1 + ... + 200 ms


def test_latency_leaves_the_first_calls_of_a_size_out(
    folder: Path, call, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, float]] = []

    def timed(answer: object, texts: object, size: int, seconds: float) -> np.ndarray:
        asked.append((size, seconds))
        return np.array([9.0 if len(asked) % 2 else 0.002])

    monkeypatch.setattr(latency, "call_times", timed)
    found = json.loads(call("latency", folder, "--sizes", 1, 4, "--seconds", 2, "--json").out)
    assert asked == [(1, 0.5), (1, 2.0), (4, 0.5), (4, 2.0)]
    assert [row["p50_ms"] for row in found["sizes"]] == pytest.approx([2, 2])


def test_latency_times_the_users_texts(folder: Path, call, tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("good\n\nthe film was bad\n", "utf-8")
    common = ["latency", folder, "--task", "food", "--texts", texts, "--seconds", 0.05]
    found = json.loads(call(*common, "--sizes", 1, 3, "--json").out)
    classifier = Classifier(folder, threads=1)
    task = classifier.task("food")
    rows = classifier.encoder.encode(["good", "the film was bad"], [task, task])
    assert found["tokens"] == [len(row.ids) for row in rows]
    assert [row["texts"] for row in found["sizes"]] == [1, 3]
    assert all(0 < row["p50_ms"] <= row["p95_ms"] <= row["p99_ms"] for row in found["sizes"])
    table = call(*common).out
    assert "2 texts of" in table and len(table.splitlines()) == 5


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "is no file"), (b"caf\xe9", "is not UTF-8 (byte 4)"), (b" \n\n", "is empty")],
)
def test_latency_refuses_files_without_texts(
    folder: Path, call, tmp_path: Path, content: bytes | None, message: str
) -> None:
    texts = tmp_path / "texts.txt"
    if content is not None:
        texts.write_bytes(content)
    outcome = call("latency", folder, "--texts", texts)
    assert outcome.code == 2 and message in outcome.err


def test_info_says_what_a_precision_costs(call, tmp_path: Path) -> None:
    made = toy.make_bundle(tmp_path / "b")
    document = json.loads((made / "bundle.json").read_text())
    document["precisions"]["fp32"]["validation"] = {
        "task": "film", "texts": 40, "accuracy": 0.85, "accuracy_change": -0.025,
        "agreement": 0.975,
    }  # fmt: skip
    document["checksum"] = bundle._checksum(document)
    (made / "bundle.json").write_text(json.dumps(document))
    told = "85.0 % of 40 texts of film right (-2.5 points against fp32), 97.5 % answered as in fp32"
    assert told in call("info", made).out


# ---- the streams of a process --------------------------------------------------------------------


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A line of a shell, in which $SERVE is `python -m serve`; output is buffered, as usual."""
    given = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    given |= {"SERVE": f"{sys.executable} -m serve", "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env=given, capture_output=True, text=True, timeout=60
    )


def test_a_reader_that_went_away_is_no_error_of_pythons(folder: Path) -> None:
    for arguments, code in ((f"info {folder}", "1"), ("info --help", "0")):
        done = shell(f"(sleep 0.2; $SERVE {arguments}; echo $? >&2) | true")
        assert done.stderr == f"{code}\n"


def test_a_full_disk_is_said_once(folder: Path) -> None:
    for arguments in (f"info {folder}", f"classify {folder} --task film"):
        done = shell(f"echo good | $SERVE {arguments} > /dev/full", METAPT_LOG="error")
        assert done.returncode == 1
        assert done.stderr.startswith("error: the disk that holds the output is full")
        assert done.stderr.count("\n") == 1


def test_closed_streams_are_empty_ones(folder: Path) -> None:
    for command in (f"$SERVE info {folder} >&-", f"$SERVE classify {folder} --task film <&-"):
        done = shell(command, METAPT_LOG="error")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert shell(f"$SERVE info {folder} 2>&-").returncode == 0


def test_a_level_that_the_log_does_not_have_is_said(folder: Path) -> None:
    done = shell(f"$SERVE info {folder}", METAPT_LOG="verbose")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: METAPT_LOG is 'verbose': set it to one of DEBUG, INFO")
    assert done.stderr.count("\n") == 1
    for level in ("debug", ""):
        assert shell(f"$SERVE info {folder}", METAPT_LOG=level).returncode == 0


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ('"task": null', "--task takes text, not null"),
        ('"task": ["film"]', "--task takes text, not ['film']"),
        ('"precision": null', "--precision takes text, not null"),
        ('"bank_memory": null', "--bank-memory takes a number, not null"),
        ('"verify": null', "--verify takes true or false, not null"),
        ('"threads": 3000000000', "--threads must be at most 1024"),
    ],
)
def test_a_file_of_settings_is_checked(
    folder: Path, call, tmp_path: Path, setting: str, message: str
) -> None:
    (tmp_path / "c.json").write_text(f"{{{setting}}}")
    outcome = call("classify", folder, "--config", tmp_path / "c.json", stdin=b"good\n")
    assert outcome.code == 2 and message in outcome.err and outcome.err.count("\n") == 1


def test_null_stands_for_nothing_where_nothing_may_stand(folder: Path, call, tmp_path) -> None:
    (tmp_path / "c.json").write_text('{"threads": null, "task": "film", "providers": null}')
    outcome = call("classify", folder, "--config", tmp_path / "c.json", stdin=b"good\n")
    assert outcome.code == 0


def test_a_bundle_without_tasks_says_how_to_add_one(call, tmp_path: Path) -> None:
    made = toy.make_bundle(tmp_path / "b")
    for name in ("film", "food"):
        bundle.remove_task(made, name)
    for more in ([], ["--task", "film"]):
        outcome = call("classify", made, *more, stdin=b"good\n")
        assert outcome.code == 2 and "none, add one with python -m exporter add" in outcome.err
    with pytest.raises(UserError, match="it has none, add one with"):
        bundle.remove_task(made, "film")


def test_info_leaves_out_what_is_no_figure(call, tmp_path: Path) -> None:
    made = toy.make_bundle(tmp_path / "b")
    document = json.loads((made / "bundle.json").read_text())
    document["precisions"]["fp32"] |= {"weight_bits": 7, "per_channel": True}
    document["checksum"] = bundle._checksum(document)
    (made / "bundle.json").write_text(json.dumps(document))
    assert "precision fp32: weight_bits 7\n" in call("info", made).out
