"""`accelerate launch` on the CPU (gloo), and source data for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd


def toy_clusters(path: Path) -> Path:
    """600 sentences of two classes in five clusters."""
    generator = np.random.default_rng(0)
    nouns, words = ["film", "food", "story"], [["bad", "awful"], ["good", "great"]]
    labels = generator.integers(0, 2, 600)
    texts = [f"the {generator.choice(nouns)} was {generator.choice(words[y])}" for y in labels]
    frame = pd.DataFrame({"text": texts, "label": labels, "cluster": np.arange(600) % 5})
    frame.to_parquet(path)
    return path


def launch(
    processes: int,
    *flags: object,
    precision: str = "no",
    script: Path | None = None,
    divided: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Run `trainer` (or `script`) in one process, or in several through accelerate.

    Args:
        divided: give each process a part of the backbone.
    """
    argv = [sys.executable]
    if processes > 1 or precision != "no":
        argv += [
            # `--cpu` would start a single process, whatever --num_processes says.
            "-m", "accelerate.commands.launch", "--num_processes", str(processes),
            "--num_machines", "1", "--mixed_precision", precision, "--dynamo_backend", "no",
            "--main_process_port", "0",
        ]  # fmt: skip
        argv += ["--multi_gpu"] if not divided else [
            "--use_fsdp", "--fsdp_version", "2", "--use_parallelism_config",
            "--parallelism_config_tp_size", str(processes),
        ]  # fmt: skip
    argv += [str(script)] if script else ["-m", "trainer"]
    argv += map(str, flags)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, [os.getcwd(), environment.get("PYTHONPATH")])
    )
    return subprocess.run(
        argv, capture_output=True, text=True, timeout=600, check=False, env=environment
    )
