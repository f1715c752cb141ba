"""What the known ways to fail mean, in one line for the user."""

import argparse

import torch

LOWER_MEMORY = {
    1: ("batch_size", "size_g"),
    2: ("sub_batch_size", "size_p"),
    3: ("sub_batch_size", "size_p", "batch_size"),
}
"""By mode, the options that lower what a step or an evaluation needs, the most useful first."""

_ALLOCATION = ("can't allocate memory", "not enough memory", "out of memory")
_PEER = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Socket closed",
    "NCCL",
    "gloo",
    "Gloo",
)


def diagnose(
    error: BaseException, options: argparse.Namespace, processes: int, lower_memory: tuple[str, ...] = ()
) -> str | None:
    """A line that says what `error` means and what helps; None where it is unknown and its stack trace is needed.

    `lower_memory`: options to advise where memory runs out; by default those of the mode.
    """
    text = str(error)
    first = text.strip().splitlines()[0] if text.strip() else type(error).__name__
    if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError) or any(sign in text for sign in _ALLOCATION):
        lower = ", ".join(f"--{name} {getattr(options, name)}" for name in lower_memory or LOWER_MEMORY[options.mode])
        return f"out of memory ({first}); lower {lower}"
    if "DataLoader worker" in text:
        return f"a process that reads images died: {' '.join(text.split())} If memory ran out, lower --num_workers"
    if processes > 1 and isinstance(error, RuntimeError) and any(sign in text for sign in _PEER):
        return f"lost another process of this run, whose own message says why ({first})"
    return None
