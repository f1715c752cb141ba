"""Segments an image with the files of `python -m prediction.export`; needs onnxruntime, NumPy and Pillow alone.

    python examples/segment_onnx.py DIR IMAGE MASK

This is the whole of GLNet's prediction in one file, to be read, copied and changed. Sizes are (height, width), boxes
(top, left, height, width), maps (N, C, h, w) float32. Images are RGB or grey with 8 bits; the mask is a PNG of class
ids with the classes' colours as its palette.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

SUB_BATCH = 6
"""Patches that are computed at a time."""


class Network:
    """The files of a folder."""

    def __init__(self, folder: Path) -> None:
        self.about = json.loads((folder / "glnet.json").read_text(encoding="utf-8"))
        if self.about["coarse_to_fine"]:
            raise SystemExit(
                "this network reads selected patches only (coarse to fine), which this example does not do"
            )
        if self.about["bands"] is not None:
            raise SystemExit(f"this network reads the bands {self.about['bands']}; this example reads RGB alone")
        self.sessions = {
            name: onnxruntime.InferenceSession(folder / part["file"], providers=["CPUExecutionProvider"])
            for name, part in self.about["parts"].items()
        }

    def run(self, name: str, *inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Return the outputs of one part by name."""
        part = self.about["parts"][name]
        outputs = self.sessions[name].run(part["outputs"], dict(zip(part["inputs"], inputs, strict=True)))
        return dict(zip(part["outputs"], outputs, strict=True))

    def to_input(self, images: np.ndarray) -> np.ndarray:
        """Return images (N, h, w, 3), 0..255, as (N, 3, h, w), normalised."""
        x = images.astype(np.float32) / 255
        mean, std = (np.array(self.about[name], np.float32) for name in ("mean", "std"))
        x = (x - mean) / std
        return np.ascontiguousarray(x.transpose(0, 3, 1, 2))


class Axis:
    """The patches along one axis of an image: `starts`, the first pixel of each, and `patch`, the length of all."""

    def __init__(self, side: int, size_p: int, min_overlap: int) -> None:
        self.side, self.patch = side, min(side, size_p)
        count = 1 if side <= size_p else max(2, -(-side // size_p))
        while count > 1 and size_p - (side - size_p) / (count - 1) < min_overlap:
            count += 1
        step = (side - self.patch) / max(1, count - 1)
        self.starts = [round(k * step) for k in range(count)]

    def cells(self, length: int) -> tuple[list[int], int]:
        """Return the first cell of each patch, and how many cells each has, on a map of `length` cells."""
        covered = max(1, round(length * (self.patch / self.side)))
        return [min(round(start / self.side * length), length - covered) for start in self.starts], covered

    def counts(self, length: int) -> np.ndarray:
        """Return how many patches cover each pixel, resized to `length` cells."""
        counts = np.zeros(self.side, np.float32)
        for start in self.starts:
            counts[start : start + self.patch] += 1
        return resize_axis(counts, length, 0)


class Grid:
    """The patches of an image, row by row."""

    def __init__(self, size: tuple[int, int], size_p: int, min_overlap: int) -> None:
        self.rows, self.columns = (Axis(side, size_p, min_overlap) for side in size)

    def boxes(self, size: tuple[int, int]) -> list[tuple[slice, slice]]:
        """Return the cells of each patch on a map of `size`, or its pixels if `size` is the image's."""
        (tops, height), (lefts, width) = self.rows.cells(size[0]), self.columns.cells(size[1])
        return [(slice(top, top + height), slice(left, left + width)) for top in tops for left in lefts]

    def counts(self, size: tuple[int, int]) -> np.ndarray:
        """Return how many patches cover each pixel, resized to `size`; merged maps are divided by them."""
        return np.outer(self.rows.counts(size[0]), self.columns.counts(size[1]))


def resize_axis(x: np.ndarray, length: int, axis: int) -> np.ndarray:
    """Return `x` resized linearly along one axis; cells have their values in their centres."""
    source = x.shape[axis]
    places = np.clip((np.arange(length) + 0.5) * (source / length) - 0.5, 0, source - 1)
    low = places.astype(int)
    part = (places - low).astype(np.float32).reshape([-1 if k == axis else 1 for k in range(x.ndim)])
    return np.take(x, low, axis) * (1 - part) + np.take(x, np.minimum(low + 1, source - 1), axis) * part


def resize(x: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return a map (C, h, w) resized bilinearly to `size`."""
    return resize_axis(resize_axis(x, size[0], 1), size[1], 2)


def enlarge(x: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return scores (C, h, w) enlarged to `size`: each pixel gets the scores of the cell in which it begins."""
    rows, columns = (
        np.minimum((np.arange(side, dtype=np.float32) * (np.float32(cells) / np.float32(side))).astype(int), cells - 1)
        for cells, side in zip(x.shape[1:], size, strict=True)
    )
    return x[:, rows[:, None], columns]


def shrunk_size(about: dict, size: tuple[int, int]) -> tuple[int, int]:
    """Return the size of the shrunk image: `size_g` twice, or as much smaller than the image as in training."""
    unit = about["side_multiple"]
    if about["context"] == "scale":
        least = -(-about["least_side"] // unit) * unit
        height, width = (max(least, round(side / about["scale"] / unit) * unit) for side in size)
        return height, width
    side = about["size_g"]
    if about["scale"] is not None and max(size) > about["scale"] * side:
        side = round((size[0] * size[1]) ** 0.5 / about["scale"] / unit) * unit
        side = max(about["size_g"], min(side, about["largest_side"] // unit * unit))
    return side, side


def segment(network: Network, image: Image.Image) -> np.ndarray:
    """Return the class ids of an RGB image, (H, W) uint8."""
    about, pixels = network.about, np.asarray(image)
    size = pixels.shape[:2]
    height, width = shrunk_size(about, size)
    shrunk = image.resize((width, height), Image.Resampling.BILINEAR)  # antialiased
    whole = network.to_input(np.asarray(shrunk)[None])

    # the global branch reads the shrunk image
    found = network.run("global", whole)
    if about["mode"] == 1:
        return enlarge(found["logits"][0], size).argmax(0).astype(np.uint8)

    # global to local: the local branch reads each patch, and the global maps cropped to it
    grid = Grid(size, about["size_p"], about["min_overlap"])
    boxes = grid.boxes(size)
    batches = [slice(start, start + SUB_BATCH) for start in range(0, len(boxes), SUB_BATCH)]
    context = {name: found[name] for name in about["maps"]}
    merged = {name: np.zeros_like(x) for name, x in context.items()} if about["mode"] == 3 else {}
    halves = []
    for batch in batches:
        patches = network.to_input(np.stack([pixels[box] for box in boxes[batch]]))
        local = network.run("local", patches, *(crop(x, grid, batch) for x in context.values()))
        halves.append(local["half"])
        for name, total in merged.items():
            for (rows, columns), x in zip(grid.boxes(total.shape[2:])[batch], local[name], strict=True):
                cells = total[0, :, rows, columns]
                cells += resize(x, cells.shape[1:])

    # local to global: the refined branch reads the shrunk image again, and the local maps merged into its frame
    if about["mode"] == 3:
        found = network.run("refined", whole, *(x / grid.counts(x.shape[2:]) for x in merged.values()))

    # ensemble of local and global maps; the scores of overlapping patches are added
    scores = np.zeros((len(about["classes"]), *size), np.float32)
    for batch, half in zip(batches, halves, strict=True):
        logits = network.run("ensemble", half, crop(found["ps3"], grid, batch))["logits"]
        for (rows, columns), x in zip(boxes[batch], logits, strict=True):
            scores[:, rows, columns] += enlarge(x, (grid.rows.patch, grid.columns.patch))
    return scores.argmax(0).astype(np.uint8)


def crop(x: np.ndarray, grid: Grid, batch: slice) -> np.ndarray:
    """Return the cells of a global map (1, C, H, W) that some patches cover, (n, C, h, w)."""
    return np.stack([x[0, :, rows, columns] for rows, columns in grid.boxes(x.shape[2:])[batch]])


def read(path: Path) -> Image.Image:
    """Return a picture of 8 bits as RGB, as displayed. Pillow would cut samples of more bits down, each in its way."""
    image = Image.open(path)
    arguments = [tile[3] for tile in getattr(image, "tile", ())]  # of decoders; the first tells how samples are stored
    raw = " ".join(str(one[0] if isinstance(one, tuple) else one) for one in arguments)
    head = path.read_bytes()[: 1 << 16] if image.format == "JPEG2000" else b""
    start = head.find(b"\xff\x4f\xff\x51")  # where a code stream of JPEG 2000 begins, with the bits of its bands
    bits = (head[start + 42] & 0x7F) + 1 if start >= 0 else 8
    maximum = int(image.tile[0][3][1]) if image.format == "PPM" and isinstance(image.tile[0][3], tuple) else 255
    deep = ("16" in raw and "BGR;16" not in raw) or bits > 8 or maximum > 255
    if image.mode in ("I", "F") or image.mode.startswith("I;16") or deep:
        raise SystemExit(f"{path} has samples of more than 8 bits; convert it to 8 bits, stretched as in training")
    return ImageOps.exif_transpose(image).convert("RGB")


def main() -> None:
    parser = argparse.ArgumentParser(description="Segment an image with exported ONNX files.")
    parser.add_argument("folder", type=Path, help="that python -m prediction.export wrote")
    parser.add_argument("image", type=Path, help="to segment, 8 bits, RGB or grey")
    parser.add_argument("mask", type=Path, help="PNG to write")
    given = parser.parse_args()
    network = Network(given.folder)
    mask = Image.fromarray(segment(network, read(given.image)))
    mask.putpalette([value for color in network.about["palette"] for value in color])
    mask.save(given.mask, format="PNG")


if __name__ == "__main__":
    main()
