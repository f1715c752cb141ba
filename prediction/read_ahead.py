"""Reads the next scene of an image while one is computed."""

from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor

from imaging.sources import CropSource, Source, load_in_memory
from utils.tiling import Box


def read_ahead(source: Source, boxes: Sequence[Box]) -> Generator[Source, None, None]:
    """Yield the scenes of `boxes`, each read while the one before is used; to be closed before the source is.

    A scene is in memory if it fits (`load_in_memory`), so two are held: that in use, and the next one. A larger scene
    is read in windows by whoever uses it.

    Args:
        source: the image; its `read` is called by another thread.
        boxes: the scenes, in order.

    Raises:
        InputError: when a scene that cannot be read comes next, not before.
    """
    with ThreadPoolExecutor(1, "read_ahead") as reader:
        readings = (reader.submit(load_in_memory, CropSource(source, box)) for box in boxes)
        following = next(readings, None)
        while following is not None:
            scene = following.result()
            following = next(readings, None)
            yield scene
            del scene  # before the next one is waited for
