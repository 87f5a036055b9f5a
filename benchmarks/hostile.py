"""Thousands of hostile requests against a server process: no 5xx but 503 and 504, no growth.

    python -m benchmarks.hostile BUNDLE --requests 10000

The bundle's tasks should be called `film` and `food`, for the requests name them.

Requests come from the strategies of the tests (`tests/serve_requests.py`): random bytes, JSON of
any shape, texts of every Unicode plane, empty and huge, odd paths, methods and headers. Every
tenth is not even HTTP: random bytes on a bare connection.

The server's memory is its own figure in `/metrics`, read after every tenth. The largest batches
that it can run come first, so that what onnxruntime takes at most is taken; from then on memory may
not grow by more than `--growth` MiB.
"""

from __future__ import annotations

import argparse
import json
import re
import socket
import sys
from pathlib import Path
from typing import Any

import httpx
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from benchmarks.http_load import fill, server
from serve.cli import guarded
from serve.files import write_json

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from serve_requests import ALLOWED, bodies, headers, methods, paths


class Attack:
    """Sends what it is given and keeps count.

    Attributes:
        counts: how often each status came; memory: MiB of the server, once every tenth.
    """

    def __init__(self, port: int, total: int) -> None:
        self.port, self.total, self.sent = port, total, 0
        self.counts: dict[str, int] = {}
        self.memory: list[float] = []
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)

    def send(self, method: str, path: str, body: bytes, given_headers: dict[str, str]) -> None:
        """One request; raises AssertionError for an answer that may not be."""
        self._mark()
        try:
            response = self.client.request(method, path, content=body, headers=given_headers)
        except httpx.HTTPError as error:
            # The server may close a connection on which a 413 came before the body was sent.
            self._count(f"closed ({type(error).__name__})")
            return
        self._count(str(response.status_code))
        assert response.status_code in ALLOWED, (method, path, body, response.text)
        if method != "HEAD":
            value = response.json()
            assert ("error" in value) == (response.status_code != 200), response.text

    def babble(self, data: bytes) -> None:
        """Bytes that are no HTTP; the server may answer 400 or hang up, and goes on."""
        self._mark()
        with socket.create_connection(("127.0.0.1", self.port), timeout=10) as connection:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            try:
                answer = connection.recv(100)
            except ConnectionResetError:
                answer = b""
        self._count("no HTTP: " + (answer[9:12].decode("latin1") or "closed"))

    def _count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1

    def _mark(self) -> None:
        if self.sent % max(1, self.total // 10) == 0:
            self.memory.append(resident(self.client))
        self.sent += 1


def resident(client: httpx.Client) -> float:
    """The server's memory in MiB."""
    found = re.search(r"^process_resident_memory_bytes (\S+)", client.get("/metrics").text, re.M)
    assert found is not None
    return float(found[1]) / 2**20


def many(count: int) -> Any:
    """Settings for a run of so many examples, without shrinking."""
    checks = list(HealthCheck)
    return settings(max_examples=count, deadline=None, database=None, phases=[Phase.generate],
                    suppress_health_check=checks)  # fmt: skip


def attack(attacker: Attack, requests: int) -> None:
    """Send `requests` requests, in ten rounds so that both kinds are mixed over time."""
    for _ in range(10):

        @many(requests * 9 // 100)
        @given(method=methods, path=paths, body=bodies, given_headers=headers)
        def proper(method: str, path: str, body: Any, given_headers: dict[str, str]) -> None:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            attacker.send(method, path, content, given_headers)

        @many(requests // 100)
        @given(data=st.binary(min_size=1, max_size=500))
        def bare(data: bytes) -> None:
            attacker.babble(data)

        proper()
        bare()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("bundle")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--growth", type=float, default=16.0, help="MiB that are allowed")
    parser.add_argument("--flags", default="", help="further flags of the server")
    parser.add_argument("--out", default="", help="JSON file for the figures")
    args = parser.parse_args()
    flags = ["--max-queue", "30", "--deadline", "60", *args.flags.split()]
    with server(args.bundle, flags) as (port, _):
        attacker = Attack(port, args.requests)
        start = resident(attacker.client)
        for _ in range(2):
            fill(port)
        attack(attacker, args.requests)
        attacker.memory.append(resident(attacker.client))
        alive = attacker.client.get("/v2/health/ready").status_code
    report = {
        "bundle": Path(args.bundle).name,
        "requests": attacker.sent,
        "statuses": dict(sorted(attacker.counts.items())),
        "ready_at_the_end": alive == 200,
        "memory_mib_at_the_start": round(start, 1),
        "memory_mib": [round(value, 1) for value in attacker.memory],
    }
    sys.stdout.write(json.dumps(report, indent=2) + "\n")
    if args.out:
        write_json(args.out, report)
    if alive != 200:
        raise SystemExit("the server was not ready at the end")
    grown = attacker.memory[-1] - attacker.memory[0]
    if grown > args.growth:
        raise SystemExit(f"memory grew by {grown:.1f} MiB")


if __name__ == "__main__":
    sys.exit(guarded(main))
