"""Segments an array on the disk that need not fit in memory, a NumPy file or a Zarr array, into another one.

    python -m examples.segment_array CHECKPOINT IMAGE.npy MASK.npy
    python -m examples.segment_array CHECKPOINT IMAGE.zarr MASK.zarr   # needs zarr: pip install zarr

The image is (H, W, bands) uint8 with the bands that the network reads; the mask is (H, W) uint8, class ids. Anything
else that can be read in windows becomes a source in the same way as `ArraySource`. The mask gets its name when it is
complete: a run that fails or is interrupted leaves none.
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from predict import Box, Rows, Segmenter
from prediction.packages import require_packages
from utils.errors import InputError, exit_code, reason_of
from utils.files import new_folder, replacing


class ArraySource:
    """A `Source` of anything with a shape (H, W, bands) that gives uint8 arrays when it is sliced."""

    def __init__(self, array: Any) -> None:
        self.array = array
        self.size = (array.shape[0], array.shape[1])
        self.n_bands = array.shape[2]

    def read(self, box: Box) -> Tensor:
        rows, columns = slice(box.top, box.top + box.height), slice(box.left, box.left + box.width)
        return torch.from_numpy(np.array(self.array[rows, columns])).permute(2, 0, 1)  # a copy, in memory

    def valid(self, box: Box) -> None:
        return None  # every pixel has data


def open_array(path: Path, axes: int = 3) -> Any:
    """Open an array to be read in windows. Raises InputError if it has other than `axes` axes, or is not uint8."""
    if path.suffix == ".zarr":
        require_packages(str(path), ("zarr",))
        import zarr

        load: Any = partial(zarr.open_array, mode="r")
    else:
        load = partial(np.load, mmap_mode="r")
    try:
        array: Any = load(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {reason_of(error)}") from error
    if array.ndim != axes or array.dtype != np.uint8:
        raise InputError(f"{path} is {array.shape} {array.dtype}; an image is (H, W, bands) uint8, a mask (H, W)")
    return array


@contextmanager
def new_array(path: Path, size: tuple[int, int]) -> Iterator[Any]:
    """Yield a new array of `size` uint8 to write to. It gets its name when the context ends well."""
    if path.suffix == ".zarr":
        require_packages(str(path), ("zarr",))
        import zarr

        with new_folder(path) as folder:
            chunks = min(512, size[0]), min(512, size[1])
            yield zarr.create_array(folder, shape=size, chunks=chunks, dtype="uint8", overwrite=True)
    else:
        with replacing(path) as part:
            mask = np.lib.format.open_memmap(part, "w+", np.uint8, size)
            yield mask
            mask.flush()


def segment(segmenter: Segmenter, image: Path, mask: Path) -> None:
    """Segment the array at `image` into a new one at `mask`, with a progress bar."""
    source = ArraySource(open_array(image))
    with new_array(mask, source.size) as ids, tqdm(unit="patch") as bar:

        def sink(top: int, rows: Rows) -> None:
            ids[top : top + len(rows.ids)] = rows.ids.numpy()

        def show(done: int, total: int | None) -> None:
            bar.total = total
            bar.update(done - bar.n)

        segmenter.segment_to(source, sink, on_progress=show)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m examples.segment_array", description=__doc__)
    for name in ("checkpoint", "image", "mask"):
        parser.add_argument(name, type=Path)
    options = parser.parse_args(arguments)
    return exit_code(lambda: segment(Segmenter.from_checkpoint(options.checkpoint), options.image, options.mask))


if __name__ == "__main__":
    sys.exit(main())
