"""Several processes end with the prompt of one (gloo on the CPU), and resume."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def clusters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = np.random.default_rng(0)
    nouns, words = ["film", "food", "story"], [["bad", "awful"], ["good", "great"]]
    labels = generator.integers(0, 2, 600)
    texts = [f"the {generator.choice(nouns)} was {generator.choice(words[y])}" for y in labels]
    frame = pd.DataFrame({"text": texts, "label": labels, "cluster": np.arange(600) % 5})
    path = tmp_path_factory.mktemp("data") / "clusters.parquet"
    frame.to_parquet(path)
    return path


def launch(processes: int, *flags: object) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m"]
    if processes > 1:
        argv += [
            "accelerate.commands.launch", "--cpu", "--num_processes", str(processes),
            "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
            "--main_process_port", "0", "-m",
        ]  # fmt: skip
    argv += ["trainer", *map(str, flags)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    return subprocess.run(
        argv, capture_output=True, text=True, timeout=300, check=False, env=environment
    )


@pytest.mark.parametrize(("command", "processes"), [("meta", 2), ("meta", 4), ("pretrain", 2)])
def test_processes_end_with_the_prompt_of_one(
    tiny_t5: Path, clusters: Path, tmp_path: Path, command: str, processes: int
) -> None:
    flags = [
        command, "--data", clusters, "--backbone", tiny_t5, "--prompt-tokens", 3, "--steps", 6,
        "--evaluate-every", 3, "--device", "auto",
    ]  # fmt: skip
    prompts = {}
    for count in (1, processes):
        done = launch(count, *flags, "--out", tmp_path / str(count))
        assert done.returncode == 0, done.stderr
        stored = load_file(tmp_path / str(count) / "adapter_model.safetensors")
        prompts[count] = stored["prompt_embeddings"]
    # AdamW divides by the root of the squared gradient, so rounding is not scaled down with it.
    torch.testing.assert_close(prompts[processes], prompts[1], atol=1e-5, rtol=1e-5)
