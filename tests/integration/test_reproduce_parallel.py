"""Two processes end with the figures of one."""

from __future__ import annotations

import csv
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from reproduce_toy import write_source, write_task

from serve.errors import Failure
from trainer.reproduce.command import run_reproduce
from trainer.reproduce.config import ReproduceConfig
from trainer.reproduce.pool import Job, run_jobs
from trainer.reproduce.work import Surroundings


def accuracies(path: Path) -> dict[tuple[str, str], str]:
    with path.open() as file:
        return {(row["row"], row["seed"]): row["accuracy"] for row in csv.DictReader(file)}


def test_jobs_do_not_change_the_table(tmp_path: Path, tiny_t5: Path) -> None:
    (tmp_path / "data").mkdir()
    write_task(tmp_path / "data")
    source = write_source(tmp_path / "source.csv")
    for jobs in (1, 2):
        run_reproduce(
            ReproduceConfig(
                what="table1", backbone=str(tiny_t5), tasks=["sst2"], seeds=[1, 2],
                methods=["pt", "pt-vocab", "metapt", "metapt-ppt"], data_dir=str(tmp_path / "data"),
                source=str(source), out=str(tmp_path / f"jobs{jobs}"), train=20, validation=20,
                prompt_tokens=4,
                meta_steps=4, meta_evaluate_every=2, epochs=4, rate=0.05, modes=["prefix"],
                device="cpu", jobs=jobs, threads=1,
            )
        )  # fmt: skip
    one, two = (accuracies(tmp_path / f"jobs{jobs}/table1.csv") for jobs in (1, 2))
    assert len(one) == 8 and one == two


def test_what_waits_for_a_failed_start_is_told_so(tmp_path: Path, tiny_t5: Path) -> None:
    """PPT's start is refused; MetaPT's start would go on from it, and the cell from MetaPT's."""
    (tmp_path / "data").mkdir()
    write_task(tmp_path / "data")
    with pytest.raises(Failure, match=r"3 of 4 runs failed.*--ppt-rate 1e-09"):
        run_reproduce(
            ReproduceConfig(
                what="table1", backbone=str(tiny_t5), tasks=["sst2"], seeds=[1],
                methods=["words", "metapt-ppt"], data_dir=str(tmp_path / "data"),
                source=str(write_source(tmp_path / "source.csv")), out=str(tmp_path / "out"),
                train=20, validation=20, prompt_tokens=4, meta_steps=4, modes=["prefix"],
                ppt_rate=1e-9, device="cpu", jobs=2, threads=1,
            )
        )  # fmt: skip


def fail_or_write(settings: dict[str, str]) -> None:
    """A job: the one without a file fails as no job is meant to, the other takes longer."""
    if "file" not in settings:
        raise RuntimeError("out of memory")
    time.sleep(2)
    Path(settings["file"]).write_text("done")


def test_a_job_that_breaks_leaves_the_others_to_their_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.reproduce.pool._work", fail_or_write)
    jobs = [Job({}), Job({"file": str(tmp_path / "other")})]
    where = Surroundings(str(tmp_path), "mini", "cpu", None, {}, None)
    with pytest.raises(RuntimeError, match="out of memory"):
        run_jobs(jobs, where, count=2, threads=1, done=lambda *_: None)
    assert (tmp_path / "other").read_text() == "done"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_their_parent(
    tmp_path: Path, tiny_t5: Path, number: signal.Signals
) -> None:
    (tmp_path / "data").mkdir()
    write_task(tmp_path / "data")
    flags = [
        "reproduce", "table1", "--backbone", tiny_t5, "--tasks", "sst2", "--methods", "metapt",
        "ppt", "--data-dir", tmp_path / "data", "--source", write_source(tmp_path / "source.csv"),
        "--out", tmp_path / "out", "--train", 20, "--validation", 20, "--prompt-tokens", 4,
        "--meta-steps", 10**6, "--modes", "prefix", "--device", "cpu", "--jobs", 2, "--threads", 1,
    ]  # fmt: skip
    parent = subprocess.Popen(
        [sys.executable, "-m", "trainer", *map(str, flags)], stderr=subprocess.DEVNULL
    )
    try:
        deadline, workers = time.monotonic() + 90, []
        while sum(worker.cpu_times().user > 1 for worker in workers) < 2:
            assert parent.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
            workers = [
                child
                for child in psutil.Process(parent.pid).children()
                if "spawn_main" in " ".join(child.cmdline())
            ]
        parent.send_signal(number)
        code = parent.wait(30)  # jobs of a million steps are not waited for
        assert code == (-number if number == signal.SIGKILL else 128 + number)
    finally:
        parent.kill()
        parent.wait()
    # On a busy machine a worker may still be importing, and looks after its parent afterwards.
    assert psutil.wait_procs(workers, timeout=60)[1] == []
