"""The known ways to fail, each explained in one line."""

import argparse

import torch

LOWER_MEMORY = {
    1: ("batch_size", "size_g"),
    2: ("sub_batch_size", "size_p"),
    3: ("sub_batch_size", "size_p", "batch_size"),
}
"""By mode, the options that lower the memory of a step or an evaluation, the most useful first."""

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
    error: BaseException, options: argparse.Namespace | None, processes: int, lower_memory: tuple[str, ...] = ()
) -> str | None:
    """Explain an error in one line, with a remedy.

    Args:
        error: any exception.
        options: of the command line; None if they could not be parsed.
        processes: how many run together.
        lower_memory: options to advise if memory runs out; by default `LOWER_MEMORY` of the mode.

    Returns:
        The line; None if the error is of no known kind, so that its stack trace is needed.
    """
    text = str(error)
    first = text.strip().splitlines()[0] if text.strip() else type(error).__name__
    if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError) or any(sign in text for sign in _ALLOCATION):
        if options is None:
            return f"out of memory ({first})"
        lower = ", ".join(f"--{name} {getattr(options, name)}" for name in lower_memory or LOWER_MEMORY[options.mode])
        recomputable = not getattr(options, "checkpoint_activations", True) and not options.evaluation
        more = ", or give --checkpoint_activations" if recomputable else ""
        return f"out of memory ({first}); lower {lower}{more}"
    if "DataLoader worker" in text:
        return f"a process that reads images died: {' '.join(text.split())} If memory ran out, lower --num_workers"
    if processes > 1 and isinstance(error, RuntimeError) and any(sign in text for sign in _PEER):
        return f"lost another process of this run, whose own message says why ({first})"
    return None
