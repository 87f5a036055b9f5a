"""From nothing to the first answer: time, memory and installed size, beside PEFT and torch.

    python -m benchmarks.serving --geometry mini --work runs/mini --out runs/mini.json
    python -m benchmarks.cold_start --geometry mini --work runs/mini --rounds 5

Every start is a process of its own; the sides take turns, the median counts. Both of ours must give
the same probabilities in every round, or nothing is reported; that PEFT computes what mode `full`
does is proved by benchmarks.serving, a script of it here has the same text and prompt. Files are in
the page cache after the first round, as on a machine that has served before. Memory is what the
process holds at its first answer; size is that of the installed packages that a side needs, found
from their own metadata, without Python itself and without the model.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement

from benchmarks.http_load import server
from benchmarks.serving import prepare
from serve.cli import guarded

WEB = ["fastapi", "uvicorn[standard]"]
NEEDS = {
    "serve, onnxruntime": ["onnxruntime", "tokenizers", "numpy", "safetensors", "prometheus-client",
                           *WEB],
    "PEFT, torch": ["torch", "transformers", "peft", *WEB],
}  # fmt: skip

TEXT = "A quiet film that stays with you."
OURS = """
import json
from serve.classifier import Classifier
classifier = Classifier({bundle!r}, threads={threads})
answer, = classifier.classify([{text!r}], next(iter(classifier.tasks)))
print(json.dumps(answer.probabilities))
"""
PEFTS = """
import torch
torch.set_num_threads({threads})
from peft import PeftModel
from transformers import AutoTokenizer, T5ForConditionalGeneration
model = T5ForConditionalGeneration.from_pretrained({backbone!r}, dtype=torch.float32)
tuned = PeftModel.from_pretrained(model, {prompt!r}).eval()
tokenizer = AutoTokenizer.from_pretrained({backbone!r})
ids = tokenizer({text!r} + " It was <extra_id_0>.", return_tensors="pt")
with torch.inference_mode():
    print(tuned.generate(**ids, max_new_tokens=1, do_sample=False))
"""
MEMORY = """
import re
print("MIB", int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024)
"""


class Start(NamedTuple):
    """Seconds to the first answer, MiB in memory then, and the answer itself."""

    seconds: float
    mib: float
    answer: str


def start(script: str) -> Start:
    """Run a script; its first line of output is the answer."""
    begun = time.perf_counter()
    with tempfile.TemporaryFile("w+") as errors, subprocess.Popen(
        [sys.executable, "-c", script + MEMORY], stdout=subprocess.PIPE, stderr=errors, text=True
    ) as process:  # fmt: skip
        assert process.stdout is not None
        first = process.stdout.readline()
        seconds = time.perf_counter() - begun
        found = re.search(r"^MIB (\S+)", process.stdout.read(), re.M)
        if not first or found is None:
            errors.seek(0)
            raise SystemExit(f"the script ended without an answer\n{errors.read()}")
    return Start(seconds, float(found[1]), first)


def start_server(bundle: str, threads: int) -> Start:
    """The same for the HTTP server and its first answer."""
    from urllib.request import urlopen

    begun = time.perf_counter()
    with server(bundle, ["--threads", str(threads)]) as (port, pid):
        task = next(iter(json.loads(urlopen(f"http://127.0.0.1:{port}/").read())["tasks"]))
        body = json.dumps({"text": TEXT, "task": task}).encode()
        answer = json.loads(urlopen(f"http://127.0.0.1:{port}/classify", body).read())
        seconds = time.perf_counter() - begun
        status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+)", status)
    assert found is not None
    return Start(seconds, int(found[1]) / 1024, json.dumps(answer["results"][0]["probabilities"]))


def check(answers: list[str]) -> None:
    """Refuse unless all hold the same probabilities, to 1e-4.

    Raises:
        SystemExit: they do not.
    """
    first, *others = map(json.loads, answers)
    for other in others:
        if other.keys() != first.keys() or any(abs(other[k] - first[k]) > 1e-4 for k in first):
            raise SystemExit(f"unequal answers, nothing is reported: {first} and {other}")


def installed(needs: list[str]) -> tuple[int, float]:
    """Packages that `needs` bring along, themselves included, and their MiB on disk."""
    queue, done = [Requirement(need) for need in needs], set[tuple[str, str]]()
    names: dict[str, metadata.Distribution] = {}
    while queue:
        need = queue.pop()
        for extra in ["", *need.extras]:
            key = need.name.lower().replace("_", "-"), extra
            if key in done:
                continue
            done.add(key)
            try:
                names[key[0]] = found = metadata.distribution(need.name)
            except metadata.PackageNotFoundError:
                break  # of another platform, or optional in fact
            for text in found.requires or []:
                further = Requirement(text)
                if further.marker is None or further.marker.evaluate({"extra": extra}):
                    queue.append(further)
    total = 0
    for found in names.values():
        paths = (Path(str(found.locate_file(file))) for file in found.files or [])
        total += sum(path.stat().st_size for path in paths if path.is_file())
    return len(names), total / 2**20


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--geometry", default="mini")
    parser.add_argument("--work", required=True, help="of benchmarks.serving, same geometry")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", default="", help="JSON file for the figures")
    given = parser.parse_args()
    work = Path(given.work)
    backbone = prepare(given.geometry, work)
    bundle = str(work / "prefix")
    ours = OURS.format(bundle=bundle, threads=given.threads, text=TEXT)
    pefts = PEFTS.format(
        backbone=str(backbone.folder), prompt=str(work / "prompt"), threads=given.threads, text=TEXT
    )
    classifier, http = "serve.Classifier", "python -m serve http"
    starts: dict[str, Callable[[], Start]] = {
        classifier: lambda: start(ours),
        http: lambda: start_server(bundle, given.threads),
        "PEFT in a script": lambda: start(pefts),
    }
    samples: dict[str, list[Start]] = {name: [] for name in starts}
    for _ in range(given.rounds):
        for name, side in starts.items():
            samples[name].append(side())
    check([run.answer for name in (classifier, http) for run in samples[name]])
    print("| from a cold process | seconds to the first answer | MiB in memory |\n|---|---|---|")
    for name, values in samples.items():
        seconds = statistics.median(run.seconds for run in values)
        mib = statistics.median(run.mib for run in values)
        print(f"| {name} | {seconds:.2f} | {mib:.0f} |")
    sizes = {name: installed(needs) for name, needs in NEEDS.items()}
    print("\n| installed for a server | packages | MiB |\n|---|---|---|")
    for name, (count, mib) in sizes.items():
        print(f"| {name} | {count} | {mib:.0f} |")
    if given.out:
        report = {"geometry": given.geometry, "starts": samples, "installed": sizes}
        Path(given.out).write_text(json.dumps(report, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    sys.exit(guarded(main))
