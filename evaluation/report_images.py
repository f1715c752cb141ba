"""The images that an evaluation's report shows: the best and the worst, each as a few small pictures.

Only encoded pictures of these images are kept, so that memory depends neither on the number nor on the size of images.
"""

import io
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image
from torch import Tensor

from dataset.base import Sample
from utils.classes import IGNORED, Classes, Color
from utils.distributed import Ranks
from utils.errors import required
from utils.metrics import ConfusionMatrix
from utils.resize import shrink_label
from utils.tiling import Size, map_size
from utils.visualize import NO_CLASS, as_rgb, shrink_for_display

SHOWN = 10
"""How many of the best images a report shows, and of the worst."""

LONGEST_SIDE = 640
"""Pixels of a picture's longer side, at most."""

MOST_BYTES = 170_000
"""Of all pictures of one image together: 20 images, in base64, stay below 5 MB."""

RIGHT, WRONG = (236, 236, 236), (200, 30, 45)
"""Colours of a map of errors; pixels that do not count have NO_CLASS's."""


@dataclass(frozen=True)
class ReportImage:
    """An image of a report, by its place and its name in the split; `size` is that of the whole image, in pixels.

    `scores` are its own mIoU, 0..1, by prediction; None where no class counts, or there is no label. `pictures` are
    encoded, by name: `image` is a JPEG; `label`, the predictions and `errors` are PNGs.
    """

    index: int
    id: str
    size: Size
    scores: dict[str, float | None]
    pictures: dict[str, bytes]


def own_mean_iou(counts: np.ndarray, left_out: tuple[int, ...]) -> float | None:
    """Return the mean IoU, 0..1, of the classes that occur in one image, labelled or predicted; None without any.

    In the mIoU of a whole split a class that does not occur counts 0; of single images this would rank those with few
    classes last. `counts` is (n_class, n_class) pixels, rows are the truth.
    """
    hit = np.diag(counts)
    union = counts.sum(0) + counts.sum(1) - hit
    kept = [k for k in range(len(counts)) if union[k] and k not in left_out]
    return float((hit[kept] / union[kept]).mean()) if kept else None


class ReportImages:
    """Collects, during an evaluation, the images of its report and the score of every image.

    Attributes:
        labelled: whether the split has labels; without labels the first images are kept.
        kept: the images to show, the best first.
        ranking: (score, index, id) of every image, the best first; the score is None if no class of the image counts.
    """

    def __init__(self, classes: Classes, headline: str, labelled: bool, images: int, ranks: Ranks) -> None:
        """Start without images; of `images` in the split number i is that of process i modulo the number of them."""
        self.labelled = labelled
        self.kept: list[ReportImage] = []
        self.ranking: list[tuple[float | None, int, str]] = []
        self._classes = classes
        self._headline = headline
        self._indices = iter(range(ranks.rank, images, ranks.world))

    def add(self, sample: Sample, found: Mapping[str, Tensor]) -> None:
        """Count one image of this process and keep its pictures if it is among the best or worst so far.

        `found` are the predictions by name, (H, W) uint8 ids on any device.
        """
        index = next(self._indices)
        scores: dict[str, float | None] = dict.fromkeys(found)
        if sample.label is not None:
            for name, ids in found.items():
                counts = ConfusionMatrix(len(self._classes)).update(sample.label.to(ids.device), ids)
                scores[name] = own_mean_iou(counts.cpu().numpy(), self._classes.left_out)
        score = scores[self._headline]
        self.ranking.append((score, index, sample.id))
        if self.labelled and score is None:
            return
        image = ReportImage(index, sample.id, map_size(required(sample.image, "image")), scores, {})
        self.kept.append(image)
        self._trim()
        if any(one is image for one in self.kept):
            image.pictures.update(encode_pictures(sample, found, self._headline, self._classes))

    def gather(self, ranks: Ranks) -> None:
        """Join what all processes collected; each has the same afterwards."""
        self.ranking = [entry for part in ranks.gather(self.ranking) for entry in part]
        self.ranking.sort(key=lambda entry: (entry[0] is None, -(entry[0] or 0.0), entry[1]))
        self.kept = [image for part in ranks.gather(self.kept) for image in part]
        self._trim()

    def best_and_worst(self) -> tuple[list[ReportImage], list[ReportImage]]:
        """Return the best images, the best first, and the worst, the worst first.

        If there are no more than both together, the first list has all of them.
        """
        if len(self.ranking) <= 2 * SHOWN or not self.labelled:
            return self.kept, []
        half = min(SHOWN, (len(self.kept) + 1) // 2)
        return self.kept[:half], self.kept[half:][::-1]

    def _trim(self) -> None:
        """Sort the images and leave out those that are neither among the best nor among the worst."""
        self.kept.sort(key=lambda image: (-(image.scores[self._headline] or 0.0), image.index))
        if len(self.kept) > 2 * SHOWN:
            del self.kept[slice(SHOWN, -SHOWN) if self.labelled else slice(2 * SHOWN, None)]


def encode_pictures(sample: Sample, found: Mapping[str, Tensor], headline: str, classes: Classes) -> dict[str, bytes]:
    """Return the pictures of `ReportImage` of one image, shrunk until they take no more than MOST_BYTES together.

    `found` are the predictions by name, (H, W) uint8 ids on any device; the map of errors is of the `headline`.
    """
    whole, colors = as_rgb(required(sample.image, "image")), dict(enumerate(classes.palette))
    longest = LONGEST_SIDE
    while True:
        image = shrink_for_display(whole, longest, smooth=True)
        height, width = image.shape[:2]
        ids = {name: shrink_label(one, (height, width)).cpu().numpy() for name, one in found.items()}
        pictures = {"image": _encoded(Image.fromarray(image), "JPEG", quality=80)}
        if sample.label is not None:
            label = shrink_label(sample.label, (height, width)).numpy()
            pictures["label"] = _png(label, colors)
        pictures |= {name: _png(one, colors) for name, one in ids.items()}
        if sample.label is not None:
            errors = np.where(label < len(classes), label != ids[headline], IGNORED).astype(np.uint8)
            pictures["errors"] = _png(errors, {0: RIGHT, 1: WRONG})
        if sum(map(len, pictures.values())) <= MOST_BYTES or longest <= 64:
            return pictures
        longest = longest * 4 // 5


def _png(ids: np.ndarray, colors: Mapping[int, Color]) -> bytes:
    """Return (H, W) uint8 ids as the content of a PNG file with a palette; ids without a colour have NO_CLASS's."""
    picture = Image.fromarray(ids).convert("P")
    picture.putpalette([channel for k in range(256) for channel in colors.get(k, NO_CLASS)])
    return _encoded(picture, "PNG")


def _encoded(picture: Image.Image, kind: str, **options: int) -> bytes:
    """Return the content of a file with a picture."""
    file = io.BytesIO()
    picture.save(file, kind, optimize=True, **options)
    return file.getvalue()
