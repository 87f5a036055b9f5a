"""The server at full load for minutes, while a task comes and goes: errors, wrong answers, memory.

    python -m benchmarks.soak BUNDLE --minutes 10 --admin-every 5

64 clients send texts of mixed lengths for all tasks, one request after another each; every answer
is compared with the classifier's own in process (within 1e-3). One task is unloaded and loaded
again every few seconds; only its requests may get 404. Memory is read from the server's own
`/metrics` once a second, after the largest batches have run once. Ends with SIGTERM under load, and
expects exit code 0.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import statistics
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

from benchmarks.http_client import Connection, prepare
from benchmarks.http_load import fill, make_texts, server
from serve.classifier import Classifier
from serve.cli import guarded
from serve.files import write_json

TOKEN = "soak"


class Soak:
    """One run's load and what came of it."""

    def __init__(
        self, port: int, pid: int, requests: list[bytes], wanted: list[Any], spare: str
    ) -> None:
        self.port, self.pid, self.requests = port, pid, requests
        self.wanted, self.spare = wanted, spare
        self.end = 0.0
        self.ending = False  # the server was asked to end: it may close connections
        self.counts: dict[str, int] = {}
        self.memory: list[float] = []
        self.swaps = 0

    def count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1

    async def client(self, number: int, clients: int) -> None:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(Connection, "127.0.0.1", self.port)
        index = number
        while time.perf_counter() < self.end:
            index = (index + clients) % len(self.requests)
            task, probabilities = self.wanted[index]
            try:
                status, body = await connection.ask(self.requests[index])
            except ConnectionError:
                if self.ending:
                    return
                self.count("lost")
                _, connection = await loop.create_connection(Connection, "127.0.0.1", self.port)
                continue
            if status == 404 and task == self.spare:
                self.count("404 of the task that goes")
            elif status == 503 and self.ending:
                return
            elif status != 200:
                self.count(str(status))
            else:
                got = json.loads(body)["results"][0]["probabilities"]
                worst = max(abs(got[key] - value) for key, value in probabilities.items())
                self.count("200" if worst < 1e-3 else "wrong")
        connection.close()

    async def administer(self, every: float) -> None:
        while time.perf_counter() < self.end:
            for action in ("unload", "load"):
                url = f"http://127.0.0.1:{self.port}/v2/repository/models/{self.spare}/{action}"
                request = urllib.request.Request(
                    url, b"{}", {"authorization": f"Bearer {TOKEN}"}, method="POST"
                )
                await asyncio.to_thread(lambda r=request: urllib.request.urlopen(r).read())
                self.swaps += 1
                await asyncio.sleep(every / 2)

    async def watch(self) -> None:
        url = f"http://127.0.0.1:{self.port}/metrics"
        while time.perf_counter() < self.end:
            page = await asyncio.to_thread(lambda: urllib.request.urlopen(url).read().decode())
            found = re.search(r"^process_resident_memory_bytes (\S+)", page, re.M)
            assert found is not None
            self.memory.append(float(found[1]) / 2**20)
            await asyncio.sleep(1)

    async def run(self, seconds: float, clients: int, every: float) -> None:
        self.end = time.perf_counter() + seconds
        await asyncio.gather(
            self.administer(every), self.watch(),
            *(self.client(number, clients) for number in range(clients)),
        )  # fmt: skip
        self.end = time.perf_counter() + 30
        load = asyncio.gather(*(self.client(number, clients) for number in range(clients)))
        await asyncio.sleep(2)
        self.ending = True
        os.kill(self.pid, signal.SIGTERM)
        await load


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("bundle")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--admin-every", type=float, default=5.0, help="seconds between two loads")
    parser.add_argument("--flags", default="", help="further flags of the server")
    parser.add_argument("--out", default="", help="JSON file for the figures")
    args = parser.parse_args()

    classifier = Classifier(args.bundle)
    names = list(classifier.tasks)
    texts = [*make_texts(600, 18), "", "x " * 700, "\U0001f600 " * 40]
    tasks = [names[index % len(names)] for index in range(len(texts))]
    results = classifier.classify(texts, tasks)
    wanted = [(result.task, result.probabilities) for result in results]
    bodies = [{"text": a, "task": b} for a, b in zip(texts, tasks, strict=True)]
    os.environ["METAPT_ADMIN_TOKEN"] = TOKEN
    flags = ["--deadline", "60", *args.flags.split()]
    with server(args.bundle, flags) as (port, pid):
        fill(port)
        soak = Soak(port, pid, prepare("/classify", bodies), wanted, names[-1])
        asyncio.run(soak.run(args.minutes * 60, args.clients, args.admin_every))
    quarter = max(1, len(soak.memory) // 4)
    report = {
        "bundle": Path(args.bundle).name,
        "minutes": args.minutes,
        "answers": soak.counts,
        "loads_and_unloads": soak.swaps,
        "memory_mib_first_quarter": round(statistics.median(soak.memory[:quarter]), 1),
        "memory_mib_last_quarter": round(statistics.median(soak.memory[-quarter:]), 1),
        "memory_mib_highest": round(max(soak.memory), 1),
    }
    sys.stdout.write(json.dumps(report, indent=2) + "\n")
    if args.out:
        write_json(args.out, report)
    if set(soak.counts) - {"200", "404 of the task that goes"}:
        raise SystemExit("there were failed or wrong answers")


if __name__ == "__main__":
    sys.exit(guarded(main))
