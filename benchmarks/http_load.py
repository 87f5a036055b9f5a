"""The HTTP server under concurrent clients, against the same classifier in process.

    python -m benchmarks.http_load BUNDLE --seconds 10 --rounds 3

1. Equal answers first: every text's probabilities over HTTP and in process, in fp32 within 1e-3.
2. Throughput, both sides in turn, `--rounds` times; the median of each counts. In process:
   `Classifier.classify` over the texts in one call after another, its best case (length-sorted
   batches), with as many batches side by side as the server runs. HTTP: `--clients` connections,
   one text a request, each sends when it has its answer.
3. Latency at half load: requests arrive by chance at half of the measured HTTP throughput.
4. A single client, one request after another.

Client and server share the machine; the client's own CPU time is reported beside the figures. On a
machine that does other work as well, CPU time per text tells more than texts per second.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np

from benchmarks.http_client import Sample, closed_loop, open_loop, prepare
from serve.classifier import Classifier
from serve.cli import guarded
from serve.files import write_json

WORDS = (
    "the a film food room was is not very and but it this story service place good bad great slow "
    "long dull nice never again would recommend everyone loved hated waiting hours friendly cold"
).split()


def make_texts(count: int, words: int, seed: int = 0) -> list[str]:
    """Texts of about `words` words, half to one and a half times as long."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(max(1, words // 2), words + words // 2 + 1, size=count)
    return [" ".join(rng.choice(WORDS, size=size)) for size in sizes]


@contextmanager
def server(bundle: str, flags: list[str]) -> Iterator[tuple[int, int]]:
    """A server process; its port and process id. It gets SIGTERM at the end, if not before.

    Raises:
        SystemExit: it does not start, or does not end with code 0.
    """
    command = [sys.executable, "-m", "serve", "http", bundle, "--port", "0", *flags]
    # A file, not a pipe: one that nobody reads is full after some thousand lines.
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stderr=log)
        try:
            found = None
            while found is None:
                ended = process.poll() is not None
                log.seek(0)
                text = log.read()
                found = re.search(r"ready on http://127.0.0.1:(\d+)", text)
                if ended:
                    raise SystemExit(text)
                time.sleep(0.1)
            yield int(found[1]), process.pid
        except BaseException:
            process.kill()
            process.wait()
            raise
        process.send_signal(signal.SIGTERM)
        if code := process.wait(60):
            log.seek(0)
            raise SystemExit(f"the server ended with code {code}: {log.read()[-2000:]}")


def fill(port: int) -> None:
    """Run batches of every length up to the longest, so that the server has taken the memory that
    it takes at most."""
    address = f"http://127.0.0.1:{port}"
    task = next(iter(json.loads(urlopen(address).read())["tasks"]))
    for words in (4, 16, 60, 250, 1000):
        for rows in (30, 8, 3, 1):
            body = {"texts": ["good food " * (words // 2)] * rows, "task": task}
            urlopen(f"{address}/classify", json.dumps(body).encode()).read()


def cpu_seconds(pid: int) -> float:
    """CPU time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def in_process(
    classifier: Classifier, texts: list[str], task: str, seconds: float
) -> tuple[float, float]:
    """Texts per second, and CPU seconds per text."""
    done, begun, cpu = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - begun < seconds:
        classifier.classify(texts, task)
        done += len(texts)
    return done / (time.perf_counter() - begun), (time.process_time() - cpu) / done


def worst_difference(sample: Sample, classifier: Classifier, texts: list[str], task: str) -> float:
    """The largest difference of a probability over HTTP from the same in process. In int8 the
    activations of a whole batch share one scale, so an answer depends a little on its company, and
    the difference is reported only; in fp32 it must be rounding."""
    wanted = classifier.classify(texts, task)
    worst = 0.0
    for index, body in sample.bodies.items():
        result = json.loads(body)["results"][0]
        for label, value in wanted[index].probabilities.items():
            worst = max(worst, abs(result["probabilities"][label] - value))
    if len(sample.bodies) < len(texts) or (classifier.precision == "fp32" and worst > 1e-3):
        raise SystemExit(f"answers differ: {len(sample.bodies)} texts, difference {worst}")
    return worst


def figures(sample: Sample) -> dict[str, Any]:
    return {
        "requests_per_second": round(len(sample.latencies) / sample.seconds, 1),
        "p50_ms": round(sample.percentile(0.50), 2),
        "p95_ms": round(sample.percentile(0.95), 2),
        "p99_ms": round(sample.percentile(0.99), 2),
        "statuses": sample.statuses,
        "lost": sample.lost,
    }


def print_tables(report: dict[str, Any]) -> None:
    """The report as Markdown."""
    print(
        f"{report['precision']}, {report['workers']} batches at a time of {report['threads']} "
        f"threads, texts of {report['mean_tokens']} "
        f"tokens, {report['clients']} clients; largest difference of a probability "
        f"{report['worst_difference']:.1e}\n"
    )
    print("| | texts a second | CPU ms a text |\n|---|---|---|")
    local, remote = report["in_process_texts_per_second"], report["http_texts_per_second"]
    print(f"| in process | {local} | {report['in_process_cpu_ms_per_text']} |")
    print(f"| over HTTP | {remote} ({100 * report['share']:.0f} %) "
          f"| {report['server_cpu_ms_per_request']} |")  # fmt: skip
    print(f"| the clients, on the same machine | | {report['client_cpu_ms_per_request']} |\n")
    print("| load | requests a second | p50 ms | p95 ms | p99 ms | not 200 | lost |")
    print("|---|---|---|---|---|---|---|")
    for name in ("full_load", "half_load", "one_client"):
        row = report[name]
        other = sum(count for status, count in row["statuses"].items() if status != 200)
        cells = [row["requests_per_second"], row["p50_ms"], row["p95_ms"], row["p99_ms"]]
        print(f"| {name.replace('_', ' ')} | {' | '.join(map(str, cells))} | {other} "
              f"| {row['lost']} |")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("bundle")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--threads", type=int, help="of a batch, as --workers on both sides")
    parser.add_argument("--workers", type=int, help="batches at a time; default: the server's")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--words", type=int, default=18, help="words of a text, on average")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--flags", default="", help="further flags of the server")
    parser.add_argument("--out", default="", help="JSON file for the figures")
    args = parser.parse_args()

    texts = make_texts(512, args.words)
    layout = {"threads": args.threads, "workers": args.workers}
    classifier = Classifier(args.bundle, args.precision, **layout)
    task = next(iter(classifier.tasks))
    requests = prepare("/classify", [{"text": text, "task": task} for text in texts])
    encoded = classifier.encoder.encode(texts, [classifier.tasks[task]] * len(texts))
    report: dict[str, Any] = {
        "bundle": Path(args.bundle).name,
        "precision": args.precision,
        "threads": classifier.threads,
        "workers": classifier.workers,
        "clients": args.clients,
        "mean_tokens": round(statistics.mean(len(item.ids) for item in encoded), 1),
    }
    given = [f"--{name}={value}" for name, value in layout.items() if value is not None]
    flags = ["--precision", args.precision, *given, *args.flags.split()]
    with server(args.bundle, flags) as (port, pid):
        # Texts are sent in order, so that 512 answers cover them all, however slow the model.
        probe = Sample()
        while len(probe.bodies) < len(texts):
            if set(probe.statuses) - {200}:
                raise SystemExit(f"not every request was answered: {probe.statuses}")
            probe = asyncio.run(
                closed_loop(port, requests, args.clients, max(args.seconds, probe.seconds * 2))
            )
        report["worst_difference"] = worst_difference(probe, classifier, texts, task)
        local: list[float] = []
        local_cpu: list[float] = []
        remote: list[Sample] = []
        client_cpu = server_cpu = 0.0
        for _ in range(args.rounds):
            rate, cpu = in_process(classifier, texts, task, args.seconds)
            local.append(rate)
            local_cpu.append(cpu)
            before, own = cpu_seconds(pid), time.process_time()
            remote.append(asyncio.run(closed_loop(port, requests, args.clients, args.seconds)))
            server_cpu += cpu_seconds(pid) - before
            client_cpu += time.process_time() - own
        answered = sum(len(sample.latencies) for sample in remote)
        rates = [len(sample.latencies) / sample.seconds for sample in remote]
        report["in_process_texts_per_second"] = round(statistics.median(local), 1)
        report["http_texts_per_second"] = round(statistics.median(rates), 1)
        report["share"] = round(statistics.median(rates) / statistics.median(local), 3)
        report["rounds"] = [[round(a, 1), round(b, 1)] for a, b in zip(local, rates, strict=True)]
        report["in_process_cpu_ms_per_text"] = round(1000 * statistics.median(local_cpu), 3)
        report["server_cpu_ms_per_request"] = round(1000 * server_cpu / answered, 3)
        report["client_cpu_ms_per_request"] = round(1000 * client_cpu / answered, 3)
        report["client_share_of_cpu"] = round(client_cpu / (client_cpu + server_cpu), 3)
        report["full_load"] = figures(remote[-1])
        half = statistics.median(rates) / 2
        report["half_load"] = figures(asyncio.run(open_loop(port, requests, half, args.seconds)))
        report["one_client"] = figures(asyncio.run(closed_loop(port, requests, 1, args.seconds)))
    print_tables(report)
    if args.out:
        write_json(args.out, report)


if __name__ == "__main__":
    sys.exit(guarded(main))
