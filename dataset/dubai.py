"""Semantic segmentation of aerial imagery (Humans in the Loop, 2020): scenes of Dubai, published in nine parts each.

The parts of a tile are a 3 x 3 grid of one seamless scene, row by row, so each tile is read as one image.
"""

import argparse
import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from dataset.layout import SPLITS, TEST, TRAIN, VAL, SplitChoice, listed, lists_in, natural
from dataset.pairs import Item, JoinedParts, PairReader
from utils.classes import Classes
from utils.errors import InputError, exit_code, shortened
from utils.files import replacing

DUBAI = Classes(
    names=("building", "land", "road", "vegetation", "water"),
    palette=((60, 16, 152), (132, 41, 246), (110, 193, 228), (254, 221, 58), (226, 169, 41)),
    # masks hold colours; turned to grey, they hold the colours' luminance
    values=(45, 92, 172, 212, 171),
    ignored=((155, 155, 155), (0, 0, 0)),
)
"""Grey is unlabelled; black is no class."""

TILES = {TRAIN: (1, 2, 5, 7), VAL: (3, 6), TEST: (4, 8)}
"""Of the eight published ones. The split is ours; it is by tiles, for parts of one tile share streets."""

LAYOUT = "'Tile 1/images/image_part_001.jpg' ... 009.jpg, 'Tile 1/masks/image_part_001.png' ... 009.png, 'Tile 2/...'"

_TILE = re.compile("Tile ([1-9][0-9]*)")


def find_items(root: Path, split: str, choice: SplitChoice) -> list[Item]:
    """Find the scenes of `split`: by tiles, by the lists of `choice`, or all but the one that it holds out.

    Published tiles that are not there are told, and left out.

    Raises:
        InputError: `root` has another layout, parts are missing, the lists do not fit, or the split is empty.
    """
    tiles = _find_tiles(root)
    if choice.lists is not None:
        ids = listed(tiles, lists_in(choice.lists, SPLITS), split)
    elif choice.hold_out is not None:
        ids = _held_out(tiles, split, choice.hold_out)
    else:
        ids = _published(root, tiles, split)
    return _join(tiles, sorted(ids, key=natural))


def _find_tiles(root: Path) -> dict[str, Path]:
    """Return the folders of all tiles by id, in `root` or in the only folder there that has any."""
    for folder in (root, *sorted(root.iterdir())) if root.is_dir() else ():
        matches = [(path, _TILE.fullmatch(path.name)) for path in folder.iterdir()] if folder.is_dir() else ()
        tiles = {f"tile{match[1]}": path for path, match in matches if match and path.is_dir()}
        if tiles:
            return {id_: tiles[id_] for id_ in sorted(tiles, key=natural)}
    raise InputError(f"{root} has no tiles of Dubai; expected is {LAYOUT}")


def _published(root: Path, tiles: dict[str, Path], split: str) -> list[str]:
    wanted = [f"tile{number}" for number in TILES[split]]
    missing = [id_ for id_ in wanted if id_ not in tiles]
    if len(missing) == len(wanted):
        rule = "; ".join(f"{name}: {' '.join(map(str, numbers))}" for name, numbers in TILES.items())
        raise InputError(
            f"split {split} is empty: {root} has none of its tiles ({rule}); add them, or give lists of ids by "
            "--split_lists",
            "empty split",
        )
    if missing:
        logging.warning(
            f"{root}: {len(missing)} of the {len(wanted)} tiles of {split} are not there ({', '.join(missing)}); going "
            "on without"
        )
    return [id_ for id_ in wanted if id_ in tiles]


def _held_out(tiles: dict[str, Path], split: str, id_: str) -> list[str]:
    """Return the one tile for validation, or all others; InputError where it is not there, or no other is."""
    if id_ not in tiles:
        raise InputError(f"--hold_out {id_} is no scene that is there; choose one of {', '.join(tiles)}")
    others = [other for other in tiles if other != id_]
    if not others:
        raise InputError(f"--hold_out {id_}: there is no other scene to train on", "empty split")
    return [id_] if split == VAL else others


def _join(tiles: dict[str, Path], ids: Sequence[str]) -> list[Item]:
    items = [Item(id_, _parts(tiles[id_], "images", "jpg"), _parts(tiles[id_], "masks", "png")) for id_ in ids]
    files = [path for item in items for pair in item.pairs() for path in pair if path is not None]
    missing = [str(path) for path in files if not path.is_file()]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(files)} parts are missing: {shortened(missing)}; expected is {LAYOUT}. "
            "Copy them from the published set, or take the whole tile away",
            "missing part",
        )
    return items


def _parts(tile: Path, folder: str, suffix: str) -> JoinedParts:
    paths = [tile / folder / f"image_part_{number:03d}.{suffix}" for number in range(1, 10)]
    return JoinedParts(tuple(tuple(paths[first : first + 3]) for first in (0, 3, 6)))


def write_scenes(root: Path, output: Path, ids: Sequence[str]) -> None:
    """Write scenes, none for all, as ID.png for `predict.py`, which takes files.

    Raises InputError if a scene is not there, a part cannot be used, or a file cannot be written.
    """
    tiles = _find_tiles(root)
    unknown = [id_ for id_ in ids if id_ not in tiles]
    if unknown:
        raise InputError(f"{root} has no {shortened(unknown)}; choose from {', '.join(tiles)}")
    reader = PairReader(DUBAI)
    for item in _join(tiles, ids or list(tiles)):
        pixels, _ = reader.read(item._replace(label=None))
        with replacing(output / f"{item.id}.png") as part:
            Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(part, format="PNG")
        print(f"Written: {output / item.id}.png, {pixels.shape[2]} x {pixels.shape[1]} pixels")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dataset.dubai", description="Write whole scenes of Dubai as PNG.")
    parser.add_argument("root", type=Path, help="folder of the published set")
    parser.add_argument("ids", nargs="*", metavar="ID", help="scenes, such as tile7 (default: all)")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the pictures, ID.png")
    options = parser.parse_args(arguments)
    return exit_code(lambda: write_scenes(options.root, options.output, options.ids))


if __name__ == "__main__":
    sys.exit(main())
