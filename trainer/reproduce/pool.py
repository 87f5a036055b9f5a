"""Runs in parallel processes, starts before the runs that need them."""

from __future__ import annotations

import logging
import multiprocessing
import multiprocessing.connection
import os
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from threading import Thread
from typing import Any

import torch

from serve.errors import Failure, UserError
from trainer.options import pick_device
from trainer.reproduce.store import Settings, settings_hash
from trainer.reproduce.work import Surroundings, execute


@dataclass
class Job:
    """A run or a start, and the hash of the start it waits for (None for none)."""

    settings: Settings
    after: str | None = None


_where: Surroundings | None = None


def devices(device: str) -> list[str]:
    """The devices that jobs are dealt out to: with `auto` every GPU, or the CPU.

    Raises:
        UserError: the device is not there.
    """
    if device != "auto":
        return [str(pick_device(device))]
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [f"cuda:{index}" for index in range(count)] or ["cpu"]


def _begin(where: Surroundings, names: Sequence[str], threads: int, turn: Any) -> None:
    """What a worker does first: takes a device in turn and its share of the cores."""
    global _where
    Thread(target=_end_with_parent, daemon=True).start()
    logging.disable(logging.INFO)  # the parent alone talks
    torch.set_num_threads(threads)
    with turn.get_lock():
        mine, turn.value = turn.value, turn.value + 1
    _where = replace(where, device=names[mine % len(names)])


def _end_with_parent() -> None:
    # A parent that is killed cannot tell its workers, who would train on for minutes.
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _work(settings: Settings) -> str | None:
    """Do a job; a known error comes back as its message, which any process can be sent."""
    assert _where is not None
    return attempt(settings, _where)


def attempt(settings: Settings, where: Surroundings) -> str | None:
    """Execute a job and return the message of a known error, None when all is well."""
    try:
        execute(settings, where)
    except (UserError, Failure) as error:
        return str(error)
    return None


def run_jobs(
    jobs: Sequence[Job],
    where: Surroundings,
    *,
    count: int,
    threads: int,
    done: Callable[[Settings, str | None], None],
) -> None:
    """Run all jobs, `count` at a time; one at a time stays in this process.

    Args:
        jobs: starts come before what waits for them.
        threads: CPU threads of a job, 0 for an even share of the cores.
        done: told of every job that ended, with the message of its error or None. What waits for a
            start that failed is told with the same message.
    """
    names = devices(where.device)
    threads = threads or max(1, (os.cpu_count() or 1) // count)
    if count == 1:
        torch.set_num_threads(threads)
        here, failed = replace(where, device=names[0]), dict[str, str]()
        for job in jobs:
            message = failed.get(job.after or "") or attempt(job.settings, here)
            if message:
                failed[settings_hash(job.settings)] = message
            done(job.settings, message)
        return
    # A forked torch deadlocks in its own thread pool; spawned workers start clean.
    context = multiprocessing.get_context("spawn")
    begin = (where, names, threads, context.Value("i", 0))
    executor = ProcessPoolExecutor(count, context, initializer=_begin, initargs=begin)
    try:
        _dispatch(executor, jobs, done)
    except BrokenProcessPool:
        raise Failure(
            "a worker process died, perhaps for want of memory: the same command goes on where it "
            "was; with fewer --jobs it takes less"
        ) from None
    except (SystemExit, KeyboardInterrupt):  # a start may have hours to go, and has its checkpoint
        for worker in multiprocessing.active_children():
            worker.terminate()
        raise
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _dispatch(
    executor: ProcessPoolExecutor,
    jobs: Sequence[Job],
    done: Callable[[Settings, str | None], None],
) -> None:
    pending = {settings_hash(job.settings) for job in jobs}
    waiting = [job for job in jobs if job.after in pending]
    running: dict[Future[str | None], Job] = {}
    for job in jobs:
        if job.after not in pending:
            running[executor.submit(_work, job.settings)] = job
    while running:
        finished, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in finished:
            ended = [(running.pop(future), future.result())]
            while ended:  # what waits for something that failed fails with it, and so on
                job, message = ended.pop()
                done(job.settings, message)
                name = settings_hash(job.settings)
                ready = [other for other in waiting if other.after == name]
                waiting = [other for other in waiting if other.after != name]
                for other in ready:
                    if message:
                        ended.append((other, message))
                    else:
                        running[executor.submit(_work, other.settings)] = other
