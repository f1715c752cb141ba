"""Nearest-neighbour resizing with Pillow's choice of cells, on any device."""

import numpy as np
import torch
from torch import Tensor

from utils.tiling import Size


def nearest_indices(source: int, target: int) -> Tensor:
    """Return the cell of `source` that Pillow's NEAREST reads for each cell of `target`, (target,) int64.

    Pillow samples cell centres (124 -> 31 reads 2, 6, 10, ...; torch's `nearest` reads 0, 4, 8, ...). It adds the step
    up in float64, one cell at a time, as is done here; `(i + 0.5) * step` would round some ties the other way.
    """
    step = source / target
    steps = np.full(target, step)
    steps[0] = step * 0.5
    return torch.from_numpy(np.cumsum(steps).astype(np.int64)).clamp_(max=source - 1)


def shrink_label(label: Tensor, size: Size) -> Tensor:
    """Return labels (..., H, W) resized to `size`, (..., h, w), as `PIL.Image.resize(..., NEAREST)` does it."""
    rows = nearest_indices(label.shape[-2], size[0]).to(label.device)
    columns = nearest_indices(label.shape[-1], size[1]).to(label.device)
    return label.index_select(-2, rows).index_select(-1, columns)
