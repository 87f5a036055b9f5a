"""What a CPU brings that training can use, and what it should be told."""

from __future__ import annotations

import ctypes
import sys

import torch

_TRIM, _TOP_PAD, _MMAP = -1, -2, -3  # M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD of malloc.h


def half_precision(device: torch.device, wanted: bool | None = None) -> bool:
    """Whether products are in bf16: as wanted, or else where that pays: on a GPU, and on a CPU
    whose matrix unit knows them (AMX).

    Measured on such a CPU: 1,500 GFLOP/s a core in place of 200 in fp32. Without the unit bf16 is
    emulated, and slower.
    """
    if wanted is not None:
        return wanted
    if device.type != "cpu":
        return device.type == "cuda"
    known = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(known and known())


def keep_memory() -> None:
    """Ask glibc to keep what is freed instead of giving it back to the system.

    A training step frees and takes the same hundreds of megabytes again and again, and each time
    the kernel would have to hand out, and clear, new pages: a sixth of a step. No-op elsewhere.
    """
    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return
    for parameter, value in ((_MMAP, 2**25), (_TRIM, 2**31 - 1), (_TOP_PAD, 2**28)):
        mallopt(parameter, value)
