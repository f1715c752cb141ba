"""`Settings` of a network, and the options that a checkpoint records."""

import math
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from utils.errors import InputError
from utils.loss import Loss, build_loss
from utils.precision import lay_out
from utils.selection import BOX_MARGIN, PatchSelection
from utils.tiling import MIN_OVERLAP, Size


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation of pixel values in [0, 1], of each band; a single one is that of all bands."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __str__(self) -> str:
        mean, std = (" ".join(f"{value:.3f}" for value in values) for values in (self.mean, self.std))
        return f"mean {mean}, deviation {std}"

    @classmethod
    def from_record(cls, record: Any, n_bands: int) -> "Statistics":
        """Return the statistics of `n_bands` bands from a record of plain values, `asdict` of this class.

        Raises ValueError, TypeError or KeyError for a record that no training can have written.
        """
        found = cls(*(tuple(map(float, record[name])) for name in ("mean", "std")))
        if {len(found.mean), len(found.std)} != {n_bands} or not all(0 < value < math.inf for value in found.std):
            raise ValueError(f"statistics {record} of {n_bands} bands")
        return found


STATISTICS = {
    "none": Statistics((0.0,), (1.0,)),
    "half": Statistics((0.5,), (0.5,)),
    "imagenet": Statistics((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
"""What pixel values are normalised by, by `--normalize`. The released code uses none."""

DATA = "data"
"""The value of `--normalize` for statistics of the training images, which the checkpoint records."""

NORMALIZATIONS = (*STATISTICS, DATA)
"""The values of `--normalize`."""


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """Options that a checkpoint's header records, each under its own name, with their defaults.

    An option that is not given takes the recorded value, else the data set's, else this one.
    """

    size_g: int = 508
    size_p: int = 508
    min_overlap: int = MIN_OVERLAP
    backbone: str = "resnet50"
    normalize: str = "none"
    coarse_to_fine: bool = False
    box_margin: float = BOX_MARGIN
    share: str = "own"
    pyramid_width: int = 256
    pyramid_norm: str = "none"
    bands: str | None = None
    stretch: str = "2%,98%"
    context: str = "square"


RECORDED: dict[str, Any] = {entry.name: entry.default for entry in fields(Recorded)}
"""The defaults of recorded options, by name."""

OF_WEIGHTS = ("backbone", "pyramid_width", "pyramid_norm")
"""Recorded options that decide which tensors a network has; a checkpoint fits no others."""

SHARES = ("own", "none", "other", "blank")
"""Whose global maps the local branch reads: of its own image, none, of another image, of a grey one."""

TRAINED_SHARES = SHARES[:2]
"""The values of `--share` that training has; the others are controls in evaluation."""

MOST_SHRUNK = 1536
"""Pixels of the side of a shrunk image at most, where it follows from the image: the maps of its pyramid then take nine
times the memory of those of 508."""

CONTEXTS = ("square", "scale")
"""How images are shrunk, by `--context`: to `size_g` x `size_g`, as released, or all by one factor."""

VIEW_PIXELS = MOST_SHRUNK**2
"""Pixels of a shrunk image at most with `--context scale`, unless `--view_pixels` says otherwise."""

LEAST_VIEW = 1 << 14
"""The least value of `--view_pixels`."""

LEAST_SHRUNK = 64
"""Pixels of the shorter side of a shrunk image at least with `--context scale`.

The encoder's last maps of a smaller one may have a single cell, from which norm layers cannot learn.
"""

MOST_CLASSES = 255
"""The number of ids that a byte holds beside the ignored one, 255."""

SMALLEST_SIDE, LONGEST_SIDE = 32, 1 << 15
"""Bounds of `--size_g` and `--size_p`, in pixels; a damaged checkpoint must not ask for terabytes."""


def check_sizes(size_g: int, size_p: int, min_overlap: int) -> None:
    """Raise InputError unless both sides, in pixels, are in bounds and divisible by 4, and the overlap is smaller."""
    for name, value in (("size_g", size_g), ("size_p", size_p)):
        if value % 4 or value < SMALLEST_SIDE:
            near = max(SMALLEST_SIDE, value // 4 * 4)
            raise InputError(
                f"--{name} {value} must be at least {SMALLEST_SIDE} and divisible by 4; try {near} or {near + 4}"
            )
        if value > LONGEST_SIDE:
            raise InputError(f"--{name} {value} is more than {LONGEST_SIDE} pixels")
    if min_overlap < 0:
        raise InputError(f"--min_overlap {min_overlap} is negative")
    if min_overlap >= size_p:
        raise InputError(f"--min_overlap {min_overlap} must be smaller than --size_p {size_p}")


@dataclass(frozen=True)
class ContextScale:
    """How far the images of a network are shrunk that was trained on windows: as far as its windows were.

    `factor` pixels of a window became one of its shrunk image, of the side `size_g`. The sides of shrunk images are
    multiples of `multiple`.
    """

    size_g: int
    factor: float
    multiple: int = 4

    def size(self, image: Size) -> Size:
        """Return the (height, width) of the shrunk image of an image of (height, width), in pixels.

        An image that training would not have cut is shrunk to `size_g`, as there. The shrunk image is square as are
        those of training; the mean of the factors of both axes is kept.
        """
        side = self.size_g
        if max(image) > self.factor * self.size_g:
            side = round(math.sqrt(image[0] * image[1]) / self.factor / self.multiple) * self.multiple
            side = max(self.size_g, min(side, MOST_SHRUNK // self.multiple * self.multiple))
        return side, side

    def __str__(self) -> str:
        return (
            f"trained on windows that were shrunk {self.factor:.3g} times, and so are larger images, to a side of "
            f"{self.size_g} to {max(self.size_g, MOST_SHRUNK)} pixels; --size_g {self.size_g} shrinks all to that"
        )


@dataclass(frozen=True)
class ViewScale(ContextScale):
    """How far images are shrunk with `--context scale`: all by `factor`, in both axes, whatever their size.

    A side is rounded to `multiple`, and has at least `LEAST_SHRUNK` pixels. Shrunk images of more than `most` pixels
    are left to scenes.
    """

    most: int = VIEW_PIXELS

    def size(self, image: Size) -> Size:
        """Return the (height, width) of the shrunk image of an image of (height, width), in pixels."""
        height, width = (max(self._least, round(side / self.factor / self.multiple) * self.multiple) for side in image)
        return height, width

    @property
    def _least(self) -> int:
        return -(-LEAST_SHRUNK // self.multiple) * self.multiple

    def fits(self, image: Size) -> bool:
        """Return whether the shrunk image of an image of (height, width) has at most `most` pixels."""
        return math.prod(self.size(image)) <= self.most

    def scene(self, image: Size) -> Size:
        """Return the (height, width) of the largest part of an image whose shrunk image has at most `most` pixels.

        It is as close to a square as the image allows, but no smaller than the least shrunk image.
        """
        if self.fits(image):
            return image
        view = self.size(image)
        side = max(self._least, math.isqrt(self.most) // self.multiple * self.multiple)
        longest = (max(side, self.most // other // self.multiple * self.multiple) for other in reversed(view))
        height, width = (
            whole if shrunk <= most else int(most * self.factor)
            for whole, shrunk, most in zip(image, view, longest, strict=True)
        )
        return height, width

    def __str__(self) -> str:
        return f"images are shrunk {self.factor:.3g} times, whatever their size, with their aspect (--context scale)"


@dataclass(frozen=True)
class Settings:
    """Settings of inference: patches, pixel values, device and precision."""

    size_p: int = 508  # side of a patch, in pixels
    sub_batch_size: int = 6  # patches that are computed at a time
    min_overlap: int = MIN_OVERLAP  # pixels that neighbouring patches share at least
    statistics: Statistics | None = None  # what pixel values are normalised by; None leaves them in [0, 1]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: str = "fp32"  # a key of `utils.precision.PRECISIONS`
    selection: PatchSelection | None = None  # of the patches that the local branch computes; None is all patches
    share_maps: bool = True  # whether the local branch, and stage 2's ensemble, read the global branch's maps, or zeros
    blend: str = "none"  # the weights of a patch's scores, a key of `utils.tiling.BLENDS`
    upsample: str = "nearest"  # how logits are enlarged to pixels, one of `utils.canvas.UPSAMPLES`

    def to_device(self, x: Tensor) -> Tensor:
        """Return `x` on the device. A copy to CUDA goes through pinned memory, so that the host does not wait."""
        if self.device.type == "cuda" and x.device.type == "cpu" and not x.is_pinned():
            x = x.pin_memory()
        return x.to(self.device, non_blocking=True)

    def to_input(self, image: Tensor) -> Tensor:
        """Return images (N, bands, H, W) uint8 as the network's input, on the device.

        Values are scaled to [0, 1] and normalised in float32, then rounded to the precision, in which the first
        convolution reads them.
        """
        x = self.to_device(image).float().div_(255)
        if self.statistics is not None:
            mean, std = (x.new_tensor(values).view(-1, 1, 1) for values in (self.statistics.mean, self.statistics.std))
            x = (x - mean) / std
        return lay_out(x, self.precision)


@dataclass(frozen=True)
class TrainingSettings(Settings):
    """Settings of training, and of the validation in it.

    `scaler` scales the loss so that float16 gradients do not vanish; it is disabled in other precisions. `share` is the
    weight of a part of a batch in the mean over the whole batch's pixels, 0..1.
    """

    loss: Loss = field(default_factory=build_loss)  # of one prediction
    full_labels: bool = False  # whether patches' labels stay as they are for the loss, or are shrunk to the logits
    lamb_fmreg: float = 0.15  # weight of the feature-map regulariser, lambda in the paper (section 3.3)
    scaler: torch.amp.GradScaler = field(default_factory=lambda: torch.amp.GradScaler("cpu", enabled=False))
    share: float = 1.0
    patches: int = 0  # of each image in a training step of stages 2 and 3; 0 is all
    mix_images: bool = False  # whether a sub-batch of stage 2 holds patches of all images of the step
    checkpoint_activations: bool = False  # whether encoders are computed again in the backward pass, to save memory
