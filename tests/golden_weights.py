"""The golden network: every weight follows from its released name and a seed (see golden/README.md)."""

import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

GOLDEN = Path(os.environ.get("GLNET_GOLDEN", Path(__file__).parent / "golden"))
META = json.loads((GOLDEN / "meta.json").read_text())
STATE = [(name, tuple(shape), dtype) for name, shape, dtype in json.loads((GOLDEN / "state_dict.json").read_text())]


def load(name: str) -> dict[str, np.ndarray]:
    """The arrays of `name`.npz."""
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return {key: arrays[key] for key in arrays.files}


def golden_tensor(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """The value of the released tensor `name` (without `module.`); first match wins."""
    if name.endswith("num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.int64)
    rng = np.random.RandomState((zlib.crc32(name.encode()) + seed) % 2**32)
    draws: list[tuple[bool, Callable[[], np.ndarray]]] = [
        (name.endswith("running_mean"), lambda: rng.normal(0.0, 0.1, shape)),
        (name.endswith("running_var"), lambda: rng.uniform(0.5, 1.5, shape)),
        (len(shape) == 4, lambda: rng.normal(0.0, np.sqrt(2.0 / np.prod(shape[1:])), shape)),
        (name.endswith("bias"), lambda: rng.normal(0.0, 0.05, shape)),
        (name.endswith("bn3.weight"), lambda: rng.uniform(0.2, 0.4, shape)),
        (True, lambda: rng.uniform(0.5, 1.0, shape)),
    ]
    return torch.from_numpy(np.asarray(next(draw for match, draw in draws if match)(), dtype=np.float32))


def golden_state(seed: int) -> dict[str, Tensor]:
    """The released state dict of the network with `seed`."""
    return {name: golden_tensor(name.removeprefix("module."), shape, seed) for name, shape, _ in STATE}
