"""GLNet cut into parts that other runtimes compute: functions of tensors alone, of any size, in standard operators.

The parts compute the definition (`FPN.forward`). The forms for training and for inference save work by matrices and
choices that depend on the sizes of maps, so that a graph of them would be larger and would hold for one size only.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from models.glnet import Branch, Ensemble, GLNet
from models.pyramid import Pyramid, resize
from utils.stages import STAGES
from utils.tiling import map_size

LEVELS = ("p5", "p4", "p3", "p2")
"""The levels of a pyramid, coarsest first."""

MAPS = tuple(f"{depth}_{level}" for depth in ("c", "ps0", "ps1", "ps2") for level in LEVELS)
"""The names of the maps that a branch computes for another one, in the order of `Pyramid.levels`."""

OTHER_MAPS = tuple(f"other_{name}" for name in MAPS)
"""The names of the maps that a fused branch reads of another one."""


class Part(nn.Module):
    """A part of the network with names for its inputs and outputs.

    It takes its inputs by position and returns a tuple of its outputs, (N, C, h, w) each.
    """

    def __init__(self, name: str, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> None:
        super().__init__()
        self.name, self.inputs, self.outputs = name, inputs, outputs


class BranchPart(Part):
    """A branch of GLNet, which reads images and, in the fused form, another branch's maps at the same place."""

    def __init__(self, name: str, branch: Branch, outputs: tuple[str, ...], ensemble: Ensemble | None = None) -> None:
        """Make the part; it shares the branch's weights.

        `outputs` are of `logits`, `ps3`, `MAPS` and, with an ensemble, `half`.
        """
        super().__init__(name, ("image", *(OTHER_MAPS if branch.pyramid.fused else ())), outputs)
        self.branch, self.ensemble = branch, ensemble

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        image, *maps = inputs
        other = Pyramid.of(maps[i : i + len(LEVELS)] for i in range(0, len(maps), len(LEVELS))) if maps else None
        logits, own = self.branch(image, other)
        found = {"logits": logits, "ps3": own.ps3, **named_maps(MAPS, own)}
        if self.ensemble is not None:
            found["half"] = self.ensemble.local_half(own.ps3)
        return tuple(found[name] for name in self.outputs)


class EnsemblePart(Part):
    """The ensemble: from its local half and the crop of the global ps3 to its logits."""

    def __init__(self, ensemble: Ensemble) -> None:
        super().__init__("ensemble", ("half", "ps3"), ("logits",))
        self.ensemble = ensemble

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        half, crop = inputs
        resized = resize(crop, map_size(half))
        return (half + F.conv2d(resized, self.ensemble.global_weight, padding=1),)


def parts_of(model: GLNet, mode: int) -> list[Part]:
    """Return the parts of which a mode consists, in the order of computation; they share the weights of `model`."""
    parts = {
        "global_": BranchPart("global", model.global_, ("logits", *MAPS, "ps3")),
        "local": BranchPart("local", model.local, ("logits", "half", *MAPS), model.ensemble),
        "refined": BranchPart("refined", model.refined, ("logits", "ps3")),
        "ensemble": EnsemblePart(model.ensemble),
    }
    return [parts[child] for child in STAGES[mode].uses]


def named_maps(names: tuple[str, ...], pyramid: Pyramid) -> dict[str, Tensor]:
    """Return the maps of a pyramid but ps3 under `names`, which are `MAPS` or `OTHER_MAPS`."""
    return dict(zip(names, (x for levels in pyramid.levels for x in levels), strict=True))
