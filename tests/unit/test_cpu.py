"""What the trainer asks of a CPU: bf16 only where it is multiplied, and pages that stay."""

import subprocess
import sys

import pytest
import torch

from trainer.cpu import half_precision, keep_memory

FAULTS = """
import resource, sys
import numpy as np
from trainer.cpu import keep_memory
if sys.argv[1] == "kept":
    keep_memory()
def step():
    for part in [np.ones(500_000) for _ in range(40)]:
        pass
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.parametrize("known", [True, False])
def test_half_precision_where_it_pays(known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: known)
    assert half_precision(torch.device("cpu")) is known
    assert half_precision(torch.device("cuda"))
    assert not half_precision(torch.device("meta"))


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc is Linux's")
def test_freed_memory_is_kept() -> None:
    def faults(how: str) -> int:
        done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    # 160 MB a step, of which the system takes back what is beyond malloc's own threshold.
    assert faults("kept") < faults("given back") / 10


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr("ctypes.CDLL", missing)
    keep_memory()
