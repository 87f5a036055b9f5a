"""`python -m serve http` as a process, and one request to it."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TOKEN = "secret"


class Process:
    """`python -m serve http`, once it is ready."""

    def __init__(self, folder: Path, *flags: str, program: Sequence[str] = ("-m", "serve")) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, *program, "http", str(folder), "--port", "0", "--threads", "1",
             *flags],
            stderr=subprocess.PIPE, text=True, cwd=ROOT,
            env={**os.environ, "METAPT_ADMIN_TOKEN": TOKEN, "OMP_NUM_THREADS": "1",
                 "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
        )  # fmt: skip
        assert self.popen.stderr is not None
        self.port = 0
        self.log: list[str] = []
        for line in self.popen.stderr:
            self.log.append(line)
            if found := re.search(r"ready on http://127.0.0.1:(\d+)", line):
                self.port = int(found[1])
                break
        assert self.port, "".join(self.log)

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)

    def end(self) -> int:
        self.popen.send_signal(signal.SIGTERM)
        return self.popen.wait(30)


@contextmanager
def running(
    folder: Path, *flags: str, program: Sequence[str] = ("-m", "serve")
) -> Iterator[Process]:
    process = Process(folder, *flags, program=program)
    try:
        yield process
    finally:
        if process.popen.poll() is None:
            process.popen.kill()
            process.popen.wait(10)


def ask(
    connection: http.client.HTTPConnection, path: str, body: Any = None, **headers: str
) -> tuple[int, Any, bool]:
    """Status, JSON, and whether the server closes the connection."""
    connection.request("POST" if body is not None else "GET", path,
                       None if body is None else json.dumps(body), headers)  # fmt: skip
    response = connection.getresponse()
    return response.status, json.loads(response.read()), response.will_close
