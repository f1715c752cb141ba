"""Tensors by name: read from a file of weights, and copied into a network strictly."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils.errors import InputError, reason_of


def read_weights(source: str) -> dict[str, Tensor]:
    """Read the file that `--backbone_weights` names, `.safetensors` or a state dict of `torch.save`, without its code.

    Raises InputError if it is missing, cannot be read, or holds anything else.
    """
    path = Path(source)
    if not path.is_file():
        raise InputError(f"--backbone_weights {source}: no such file (or one of: imagenet, none)")
    safe = path.suffix == ".safetensors"
    try:
        if safe:
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError as error:
        raise InputError(
            f"--backbone_weights {path} needs the package safetensors, which is not installed: pip install safetensors"
        ) from error
    except Exception as error:  # both libraries raise many kinds; each means that the file cannot be used
        kind = "safetensors" if safe else "torch weight"
        raise InputError(f"--backbone_weights {source} is not a {kind} file: {reason_of(error)}") from error
    if not isinstance(state, dict):
        raise InputError(f"--backbone_weights {source} holds a {type(state).__name__}, not a state dict")
    return only_tensors(path, state)


def only_tensors(path: Path, tensors: dict[str, Any]) -> dict[str, Tensor]:
    """Return `tensors` of the file at `path` if each is a plain tensor under a name.

    Raises InputError if a name is not a string, or a value is not a dense tensor of real numbers.
    """
    for name, value in tensors.items():
        if not isinstance(name, str):
            raise InputError(f"{path}: {name!r} names no tensor")
        if not isinstance(value, Tensor):
            raise InputError(f"{path}: {name} is a {type(value).__name__}, not a tensor")
        if value.layout != torch.strided or value.is_quantized or value.is_complex():
            raise InputError(f"{path}: {name} is no plain tensor ({value.dtype}, {value.layout})")
    return tensors


def children_of(names: Iterable[str]) -> set[str]:
    """Return the children of a network that the names of its state dict's tensors begin with."""
    return {name.split(".")[0] for name in names}


def state_of(model: nn.Module, children: Iterable[str]) -> dict[str, Tensor]:
    """Return the entries of a network's state dict that are of the named children, on the CPU."""
    wanted = set(children)
    return {name: x.detach().cpu() for name, x in model.state_dict().items() if name.split(".")[0] in wanted}


def load(model: nn.Module, tensors: Mapping[str, Tensor], path: Path, parts: Iterable[str]) -> None:
    """Copy those tensors of the file at `path` whose names begin with one of `parts` into a network, strictly.

    A missing `num_batches_tracked` (files of torch 0.4) is read as 0. Raises InputError if a tensor is missing,
    unexpected or of another shape.
    """
    parts = tuple(parts)
    state = model.state_dict()
    expected = {name: tensor for name, tensor in state.items() if name.startswith(parts)}
    given = {name: tensor for name, tensor in tensors.items() if name.startswith(parts)}
    unexpected = sorted(set(tensors) - set(state))
    missing = sorted(n for n in set(expected) - set(given) if not n.endswith("num_batches_tracked"))
    for kind, names in (("misses", missing), ("has the unexpected", unexpected)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise InputError(f"{path} {kind} tensor {names[0]}{more}; was it made with another --backbone?")
    for name, tensor in given.items():
        if tensor.shape != expected[name].shape:
            raise InputError(
                f"{path}: {name} is {tuple(tensor.shape)} where {tuple(expected[name].shape)} is expected; "
                "was it made with other --bands, --n_class or --backbone?"
            )
    with torch.no_grad():
        for name, tensor in expected.items():
            tensor.copy_(given[name]) if name in given else tensor.zero_()
