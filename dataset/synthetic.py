"""A generated land-cover set in DeepGlobe's layout, for trying everything out with nothing on disk.

Made so that both branches of the network are needed. A shrunk image loses what only full resolution shows: rivers
and roads are a few pixels wide, and urban blocks average to the colour of barren ground. A lone patch misses what
only the whole shows: the season. In summer crops are green and rangeland is tan; in autumn harvested fields have
that tan and rangeland, after rain, that green, and only water and woods tell which season it is.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from tqdm import tqdm

from dataset.deep_globe import DEEP_GLOBE, published_splits
from utils.errors import InputError, exit_code
from utils.files import replacing

MIN_SIZE = 64

UNKNOWN, URBAN, AGRICULTURE, RANGELAND, FOREST, WATER, BARREN = range(len(DEEP_GLOBE))

_SUMMER = (
    (225, 225, 225),
    (150, 140, 126),
    (104, 128, 74),
    (160, 142, 100),
    (52, 78, 44),
    (44, 74, 98),
    (168, 156, 138),
)
_AUTUMN = (
    (225, 225, 225),
    (150, 140, 126),
    (160, 142, 100),
    (104, 128, 74),
    (104, 70, 40),
    (84, 86, 66),
    (168, 156, 138),
)
"""Mean RGB of each class."""

Scene = tuple[np.ndarray, np.ndarray]


def smooth_noise(rng: np.random.Generator, size: int, cells: float) -> np.ndarray:
    """Return (size, size) float32 noise of mean 0 and deviation 1 with bumps of about size / cells pixels."""
    n = max(4, round(cells) + 3)
    noise = cv2.resize(rng.standard_normal((n, n), np.float32), (size, size), interpolation=cv2.INTER_CUBIC)
    return (noise - noise.mean()) / noise.std()


def speckle(rng: np.random.Generator, size: int, sigma: float) -> np.ndarray:
    """Return (size, size) float32 noise of mean 0 and deviation 1 with grains of about `sigma` pixels."""
    noise = cv2.GaussianBlur(rng.standard_normal((size, size), np.float32), (0, 0), sigma)
    return noise / noise.std()


def rotated_axes(rng: np.random.Generator, size: int) -> Scene:
    """Return two (size, size) float32 coordinates in pixels along perpendicular axes of a random direction."""
    angle = rng.uniform(0, np.pi)
    y, x = np.mgrid[:size, :size].astype(np.float32)
    return x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)


def per_cell(rng: np.random.Generator, *cells: np.ndarray) -> np.ndarray:
    """Return a random number in [0, 1) for each pixel, the same in a whole cell; `cells` are integer coordinates."""
    table = rng.random(4093, np.float32)
    return table[(cells[0] * 73 + cells[1] * 1009) % len(table)]


def draw_regions(rng: np.random.Generator, size: int, index: int) -> np.ndarray:
    """Return (size, size) uint8 classes with smooth borders, unknown left out.

    Three classes, others in the next image, are sure to get a region, so that two images show all six.
    """
    fields = np.stack([smooth_noise(rng, size, 3.5) + rng.normal(0, 0.4) for _ in range(URBAN, BARREN + 1)])
    fields[WATER - URBAN] -= 0.5  # rivers add to it
    y, x = np.mgrid[:size, :size].astype(np.float32) / size
    for k, place in enumerate(rng.permutation(9)[:3]):
        top, left = (np.array(divmod(int(place), 3)) + 0.5) / 3
        # higher than noise ever gets at its top, nothing two places away
        fields[(3 * index + k) % len(fields)] += 8 * np.exp(-((y - top) ** 2 + (x - left) ** 2) / 0.02)
    return (URBAN + fields.argmax(0)).astype(np.uint8)


def draw_line(rng: np.random.Generator, label: np.ndarray, class_id: int, width: int, wander: float) -> None:
    """Draw a winding line of `class_id` across `label`, `width` pixels wide, `wander` image sides off the straight."""
    size = len(label)
    along = np.linspace(-0.1, 1.1, 64)
    start, end = rng.uniform(0.1, 0.9, 2)
    waves = sum(rng.normal(0, 1 / k) * np.sin(np.pi * k * along + rng.uniform(0, 6.3)) for k in range(2, 7))
    points = np.stack([along, start + (end - start) * along + wander * waves], axis=1)
    if rng.random() < 0.5:
        points = points[:, ::-1]
    cv2.polylines(label, [np.round(points * size).astype(np.int32)], False, class_id, width)


def draw_label(rng: np.random.Generator, size: int, index: int) -> np.ndarray:
    """Return (size, size) uint8 class ids of image `index`: regions, rivers, roads, sparsely a cloud (unknown)."""
    label = draw_regions(rng, size, index)
    for _ in range(rng.integers(1, 3)):
        draw_line(rng, label, WATER, int(rng.integers(4, 8)), wander=0.12)
    for _ in range(rng.integers(2, 5)):
        draw_line(rng, label, URBAN, int(rng.integers(2, 5)), wander=0.03)
    if index % 4 == 0:
        y, x = np.mgrid[:size, :size].astype(np.float32) / size
        top, left = rng.uniform(0.1, 0.9, 2)
        ragged = 0.09 + 0.02 * smooth_noise(rng, size, 12)
        label[np.hypot(y - top, x - left) < ragged] = UNKNOWN
    return label


def draw_fields(rng: np.random.Generator, size: int) -> np.ndarray:
    """Return (size, size) float32 brightness of farmland: parcels, each in its own shade, two of three in rows."""
    u, v = rotated_axes(rng, size)
    cell_u, cell_v = (u // rng.uniform(40, 70)).astype(np.int32), (v // rng.uniform(25, 50)).astype(np.int32)
    shade = per_cell(rng, cell_u, cell_v)
    turned, period, tilled = per_cell(rng, cell_u, cell_v), per_cell(rng, cell_u, cell_v), per_cell(rng, cell_u, cell_v)
    rows = np.sin(2 * np.pi * np.where(turned < 0.5, u, v) / (3 + 2 * period))
    return 24 * (shade - 0.5) + 13 * rows * (tilled < 0.67) + 4 * speckle(rng, size, 1)


def draw_towns(rng: np.random.Generator, urban: np.ndarray) -> np.ndarray:
    """Return (size, size) float32 brightness where `urban`: bright and dark roofs between streets."""
    size = len(urban)
    built = cv2.morphologyEx(urban.astype(np.uint8), cv2.MORPH_OPEN, np.ones((7, 7), np.uint8)) > 0
    u, v = rotated_axes(rng, size)
    pitch = rng.uniform(5, 8)
    roofs = 110 * (per_cell(rng, (u // pitch).astype(np.int32), (v // pitch).astype(np.int32)) - 0.5)
    streets = (u % (4 * pitch) < 2.5) | (v % (6 * pitch) < 2.5)
    return np.where(built & ~streets, roofs, -8) + 5 * speckle(rng, size, 0.8)


def draw_image(rng: np.random.Generator, label: np.ndarray) -> np.ndarray:
    """Return a (size, size, 3) uint8 RGB picture of `label`, in a season of its own."""
    size = len(label)
    textures = {
        UNKNOWN: 8 * smooth_noise(rng, size, 8),
        URBAN: draw_towns(rng, label == URBAN),
        AGRICULTURE: draw_fields(rng, size),
        RANGELAND: 7 * speckle(rng, size, 3) + 4 * speckle(rng, size, 1),
        FOREST: 16 * speckle(rng, size, 1.3),
        WATER: 2 * smooth_noise(rng, size, 10),
        BARREN: 9 * smooth_noise(rng, size, 25) + 6 * speckle(rng, size, 1),
    }
    brightness = np.zeros((size, size), np.float32)
    for k, texture in textures.items():
        np.copyto(brightness, texture, where=label == k)
    season = np.array(_SUMMER if rng.random() < 0.5 else _AUTUMN, np.float32)
    brightness += 5 * smooth_noise(rng, size, 6) + rng.normal(0, 5)
    # a lens never draws a border sharply
    colors = cv2.GaussianBlur(season[label], (0, 0), 0.8)
    grain = 3 * rng.standard_normal((size, size, 3), np.float32)
    return np.clip(colors + brightness[..., None] + grain, 0, 255).astype(np.uint8)


def draw_scene(seed: int, index: int, size: int) -> Scene:
    """Return image `index` of set `seed`: (size, size, 3) uint8 RGB and (size, size) uint8 class ids."""
    rng = np.random.default_rng([seed, index])
    label = draw_label(rng, size, index)
    return draw_image(rng, label), label


def plan_files(n_image: int, prepared: bool) -> list[tuple[str, str]]:
    """Return for each image the paths of image and label in the output, with published ids of its split.

    Raises InputError for too few or too many images.
    """
    crossvali = max(1, round(n_image / 4))
    test = 0 if prepared else max(1, round(n_image / 8))
    counts = {"train": n_image - crossvali - test, "crossvali": crossvali, "test": test}
    if counts["train"] < 1:
        raise InputError(f"--images {n_image} does not fill every split; ask for at least {2 if prepared else 3}")
    files = []
    for split, count in counts.items():
        ids = [id_ for id_, listed in published_splits().items() if listed == split]
        if count > len(ids):
            raise InputError(
                f"--images {n_image} needs {count} ids for {split}, of which {len(ids)} are published; ask for fewer"
            )
        sat, mask = (f"{split}/Sat/", f"{split}/Label/") if prepared else ("", "")
        files += [(f"{sat}{id_}_sat.jpg", f"{mask}{id_}_mask.png") for id_ in ids[:count]]
    return files


def generate(output: Path, n_image: int, size: int, seed: int, prepared: bool = False, overwrite: bool = False) -> None:
    """Write `n_image` images of `size` x `size` pixels with RGB masks to `output`, in either layout.

    Raises InputError for sizes and counts out of range, and when `output` holds images already.
    """
    if size < MIN_SIZE:
        raise InputError(f"--size {size} leaves no room for regions; ask for at least {MIN_SIZE}")
    if seed < 0:
        raise InputError(f"--seed {seed} is negative; give 0 or more")
    files = plan_files(n_image, prepared)
    if not overwrite and next(output.rglob("*_sat.*"), None) is not None:
        raise InputError(f"{output} holds images already; name another folder, or add --overwrite")
    palette = np.array(DEEP_GLOBE.palette, np.uint8)
    for index, (sat, mask) in enumerate(tqdm(files, desc=f"images to {output}", unit="image")):
        image, label = draw_scene(seed, index, size)
        with replacing(output / sat) as path:
            Image.fromarray(image).save(path, quality=90)
        with replacing(output / mask) as path:
            Image.fromarray(palette[label]).save(path)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m dataset.synthetic",
        description="Generates a land-cover set in DeepGlobe's layout, for trying things out without the real one.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--output", type=Path, required=True, default=argparse.SUPPRESS, help="folder to write to; made when missing")
    add("--images", type=int, default=16, help="how many images, over all splits")
    add("--size", type=int, default=512, help="height and width of every image in pixels")
    add("--seed", type=int, default=0, help="the same seed, images and size give the same files")
    add(
        "--prepared",
        action="store_true",
        help="write the prepared layout, folders train and crossvali, instead of the distributed one",
    )
    add(
        "--overwrite",
        action="store_true",
        help="write to a folder that holds images: those of the same name are replaced, the others stay",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit status: 0, or 2 after one line that says what is wrong."""
    given = parse(arguments)
    return exit_code(
        lambda: generate(given.output, given.images, given.size, given.seed, given.prepared, given.overwrite)
    )


if __name__ == "__main__":
    sys.exit(main())
