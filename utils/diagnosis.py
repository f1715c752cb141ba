"""The known ways to fail, each explained in one line."""

from collections.abc import Mapping
from typing import Any

import torch

from utils.errors import reason_of

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
    error: BaseException, options: Mapping[str, Any], processes: int, lower_memory: tuple[str, ...] = ()
) -> str | None:
    """Explain an error in one line, with a remedy; return None for one of no known kind, whose stack trace is needed.

    `options` are by name, empty if they could not be parsed. If memory runs out, `lower_memory` is advised, by default
    `LOWER_MEMORY` of the mode.
    """
    text, first = str(error), reason_of(error)
    if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError) or any(sign in text for sign in _ALLOCATION):
        if not options:
            return f"out of memory ({first})"
        names = lower_memory or LOWER_MEMORY[options["mode"]]
        lower = ", ".join(f"--{name}" if options[name] is None else f"--{name} {options[name]}" for name in names)
        recomputable = not options.get("checkpoint_activations", True) and not options["evaluation"]
        more = ", or give --checkpoint_activations" if recomputable else ""
        return f"out of memory ({first}); lower {lower}{more}"
    if "DataLoader worker" in text:
        return f"a process that reads images died: {' '.join(text.split())} If memory ran out, lower --num_workers"
    if processes > 1 and isinstance(error, RuntimeError) and any(sign in text for sign in _PEER):
        return f"lost another process of this run, whose own message says why ({first})"
    return None
