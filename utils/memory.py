"""The memory of this process: how much it used, and how the C library keeps it."""

import ctypes
import resource
import sys
from contextlib import suppress

import torch

MB = 2**20
"""Bytes."""


def peak_memory_mb(device: torch.device) -> float:
    """Return the largest use of memory so far, in MB of 2**20 bytes.

    On CUDA: of `device`, what tensors occupied at once since the start of the process or the last
    `torch.cuda.reset_peak_memory_stats`; the CUDA context and unused cached blocks are not in it.
    On any other device: the largest resident size of the whole process so far, interpreter and libraries included.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MB
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident / MB if sys.platform == "darwin" else resident / 1024


def keep_freed_memory() -> None:
    """Let the C library keep freed memory for the next layer; without glibc this does nothing.

    Otherwise each large activation is mapped, filled with zeros page by page, and unmapped again: on a CPU that took a
    third of the time of a float32 evaluation. The peak of memory is about the same; freed memory stays.
    """
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # names of glibc's malloc.h
    with suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(top_pad, 64 * 2**20)
