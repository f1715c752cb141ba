"""Published numbers, as constants, each with its split and source. None of them was measured by this project."""

from collections.abc import Mapping
from dataclasses import dataclass

PAPER = "paper (Chen et al. 2019)"
USER = "a user of the released weights"
LATER = "the later system's own paper"


@dataclass(frozen=True)
class Published:
    """A published result, in per cent; `PublishedSet.measure` says of what. None stands for what is not known.

    `memory_mb` is that of inference, as the source counted it; `mode` that of GLNet, None for other systems.
    """

    name: str
    score: float
    split: str | None
    source: str
    memory_mb: int | None = None
    mode: int | None = None


@dataclass(frozen=True)
class PublishedSet:
    """The published results of one data set: `measure` is that of the scores, `memory` how memory was counted."""

    title: str
    n_class: int
    measure: str
    memory: str
    results: tuple[Published, ...]


GPUSTAT = "gpustat, batch size 1"

PUBLISHED: Mapping[str, PublishedSet] = {
    "deep_globe": PublishedSet(
        title="DeepGlobe",
        n_class=7,
        measure="mIoU without class 0",
        memory=GPUSTAT,
        results=(
            Published("GLNet", 71.6, "test", PAPER, 1865, 3),
            Published("GLNet, patches of 308", 71.3, "test", PAPER, 1839, 3),
            Published("GLNet, patches of 208", 71.2, "test", PAPER, 1823, 3),
            Published("global branch alone", 66.4, "test", PAPER, None, 1),
            Published("released weights, mode 1", 63.9, "crossvali", USER, None, 1),
            Published("released weights, mode 2", 69.2, "crossvali", USER, None, 2),
            Published("released weights, mode 3", 69.9, "crossvali", USER, None, 3),
            Published("FCN-8s", 70.1, "test", PAPER, 5227),
            Published("FPN", 66.4, "test", PAPER, 5389),
            Published("DeepLabv3+", 63.5, "test", PAPER, 3199),
            Published("SegNet", 61.2, "test", PAPER, 10339),
            Published("PSPNet", 56.6, "test", PAPER, 6289),
            Published("ICNet", 40.2, "test", PAPER, 2557),
            Published("UNet", 38.4, "test", PAPER, 5507),
            Published("PPN", 71.9, None, LATER),
            Published("MagNet", 72.9, None, LATER, 1559),
            Published("ISDNet", 73.3, None, LATER, 1948),
            Published("FCtL", 73.5, None, LATER, 3167),
            Published("WSDNet", 74.1, None, LATER, 1876),
            Published("GPWFormer", 75.8, None, LATER, 2380),
            Published("BPT", 76.6, None, LATER, 2074),
        ),
    ),
    "inria": PublishedSet(
        title="Inria Aerial",
        n_class=2,
        measure="IoU of buildings, which is the mIoU without background",
        memory=GPUSTAT,
        results=(Published("GLNet, patches of 536", 71.2, None, PAPER, 2663, 3),),
    ),
    "isic": PublishedSet(
        title="ISIC",
        n_class=2,
        measure="the paper's score beside the IoU of lesions, which is the mIoU without background",
        memory=GPUSTAT,
        results=(Published("GLNet", 75.2, None, PAPER, None, 3),),
    ),
}
"""By `--dataset`."""


def released_scores(mode: int) -> list[Published]:
    """Return what is published of GLNet in `mode` on DeepGlobe, with the paper's patches: of the weights, then more."""
    found = [one for one in PUBLISHED["deep_globe"].results if one.mode == mode and "patches" not in one.name]
    return sorted(found, key=lambda one: one.source != USER)
