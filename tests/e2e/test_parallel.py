"""Several processes end with the prompt of one (gloo on the CPU), and resume."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate_runs import launch, toy_clusters
from safetensors.torch import load_file

from serve.errors import UserError
from trainer.parallel import Workers


@pytest.fixture(scope="module")
def clusters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_clusters(tmp_path_factory.mktemp("data") / "clusters.parquet")


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
        assert (f"{count} processes" in done.stderr) == (count > 1)
        stored = load_file(tmp_path / str(count) / "adapter_model.safetensors")
        prompts[count] = stored["prompt_embeddings"]
    # AdamW divides by the root of the squared gradient, so rounding is not scaled down with it.
    torch.testing.assert_close(prompts[processes], prompts[1], atol=1e-5, rtol=1e-5)


def test_a_killed_process_ends_the_run_which_then_resumes(
    tiny_t5: Path, clusters: Path, tmp_path: Path
) -> None:
    script = tmp_path / "killer.py"
    script.write_text(
        "import os, runpy, signal\n"
        "from trainer import loop, parallel, tensors\n"
        "whole, calls = parallel.Workers.sum_gradients, []\n"
        "def sum_gradients(self, params):\n"
        "    calls.append(1)\n"
        "    if self.rank == 1 and len(calls) == 5:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    whole(self, params)\n"
        "parallel.Workers.sum_gradients = sum_gradients\n"
        # The launcher ends the process that is left, at worst while it writes its checkpoint.
        "def write_tensors(*values):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    tensors.write_tensors(*values)\n"
        "loop.write_tensors = write_tensors\n"
        "runpy.run_module('trainer', run_name='__main__', alter_sys=True)\n"
    )
    flags = [
        "meta", "--data", clusters, "--backbone", tiny_t5, "--prompt-tokens", 3, "--steps", 8,
        "--evaluate-every", 4, "--device", "auto", "--out",
    ]  # fmt: skip
    out = tmp_path / "out"
    killed = launch(2, *flags, out, script=script)
    assert killed.returncode != 0
    assert "another process of this run died: start the same command again" in killed.stderr
    assert not out.exists()
    again = launch(2, *flags, out)
    assert again.returncode == 0, again.stderr
    assert "resuming meta at step 4" in again.stderr
    whole = launch(1, *flags, tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    found, expected = (
        load_file(folder / "adapter_model.safetensors")["prompt_embeddings"]
        for folder in (out, tmp_path / "whole")
    )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_bf16_trains_near_fp32(tiny_t5: Path, clusters: Path, tmp_path: Path) -> None:
    flags = [
        "meta", "--data", clusters, "--backbone", tiny_t5, "--prompt-tokens", 3, "--steps", 4,
        "--evaluate-every", 2, "--inner-rate", 0.08, "--device", "auto", "--out",
    ]  # fmt: skip
    prompts = []
    for precision in ("no", "bf16"):
        out = tmp_path / precision
        done = launch(2, *flags, out, precision=precision)
        assert done.returncode == 0, done.stderr
        prompts.append(load_file(out / "adapter_model.safetensors")["prompt_embeddings"])
    gap = (prompts[0] - prompts[1]).abs().max()
    assert 0 < gap < 0.05  # other numbers, but no other run: a step is up to 0.025


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ACCELERATE_USE_FSDP", "true", "accelerate is configured for FSDP"),
        ("ACCELERATE_MIXED_PRECISION", "fp16", "fp16 overflows in a T5"),
    ],
)
def test_what_accelerate_cannot_do_here_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        Workers()
