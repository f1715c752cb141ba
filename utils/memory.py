"""The memory of this process: how much it used, and how the C library keeps it."""

import ctypes
import resource
import sys
from contextlib import suppress

import torch

MB = 2**20
"""Bytes of a megabyte, in this project."""


def peak_memory_mb(device: torch.device) -> float:
    """Return the largest use of memory so far, in MB of 2**20 bytes.

    On CUDA it is that of all tensors on `device` since the last `torch.cuda.reset_peak_memory_stats`, without context
    and unused cached blocks; else the largest resident size of the process, interpreter and libraries included.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MB
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident / MB if sys.platform == "darwin" else resident / 1024


def keep_freed_memory() -> None:
    """Let the C library keep freed memory for the next layer; without glibc this does nothing.

    Otherwise each large activation is mapped, filled with zeros page by page, and unmapped again, which on a CPU took a
    third of the time of a float32 evaluation. The peak of memory is about the same.
    """
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # names of glibc's malloc.h
    with suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(top_pad, 64 * 2**20)
