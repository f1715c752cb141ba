"""GLNet cut into parts that other runtimes compute: functions of tensors alone, of any size, in standard operators.

The parts compute the paper's definition as it stands: maps are resized, concatenated and convolved. The forms for
training and for inference save work by matrices and choices that depend on the sizes of maps, so that a graph of them
would be larger and would hold for one size only.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.fpn import FPN, LevelConvs
from models.glnet import Branch, Ensemble, GLNet
from models.pyramid import FullPyramid, Levels, Pyramid
from utils.stages import STAGES
from utils.tiling import Size, map_size

LEVELS = ("p5", "p4", "p3", "p2")
"""The levels of a pyramid, coarsest first."""

MAPS = tuple(f"{depth}_{level}" for depth in ("c", "ps0", "ps1", "ps2") for level in LEVELS)
"""The names of the maps that a branch computes for another one, in the order of `Pyramid.levels`."""

OTHER_MAPS = tuple(f"other_{name}" for name in MAPS)
"""The names of the maps that a fused branch reads of another one."""


class Part(nn.Module):
    """A part of the network. It takes its inputs by position and returns a tuple of its outputs, (N, C, h, w) each.

    Attributes:
        name: of the part.
        inputs: names of the inputs.
        outputs: names of the outputs.
    """

    def __init__(self, name: str, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> None:
        super().__init__()
        self.name, self.inputs, self.outputs = name, inputs, outputs

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Compute the outputs."""
        found = self.compute(*inputs)
        return tuple(found[name] for name in self.outputs)

    def compute(self, *inputs: Tensor) -> dict[str, Tensor]:
        """Return at least the outputs, by name."""
        raise NotImplementedError


class BranchPart(Part):
    """A branch of GLNet, which reads images and, in the fused form, another branch's maps at the same place."""

    def __init__(
        self,
        name: str,
        branch: Branch,
        outputs: tuple[str, ...],
        ensemble: Ensemble | None = None,
    ) -> None:
        """Make the part; it shares the branch's weights.

        Args:
            name: of the part.
            branch: the branch.
            outputs: of `logits`, `ps3`, `MAPS` and, with an ensemble, `half`.
            ensemble: the one that reads this branch's ps3 as the local one.
        """
        super().__init__(name, ("image", *(OTHER_MAPS if branch.pyramid.fused else ())), outputs)
        self.branch, self.ensemble = branch, ensemble

    def compute(self, *inputs: Tensor) -> dict[str, Tensor]:
        image, *maps = inputs
        other = Pyramid.of(maps[i : i + len(LEVELS)] for i in range(0, len(maps), len(LEVELS))) if maps else None
        own = define_pyramid(self.branch.pyramid, self.branch.backbone(image), other)
        found = {"logits": self.branch.head(own.ps3), "ps3": own.ps3, **named_maps(MAPS, own)}
        if self.ensemble is not None:
            found["half"] = self.ensemble.local_half(own.ps3)
        return found


class EnsemblePart(Part):
    """The ensemble: from its local half and the crop of the global ps3 to its logits."""

    def __init__(self, ensemble: Ensemble) -> None:
        super().__init__("ensemble", ("half", "ps3"), ("logits",))
        self.ensemble = ensemble

    def compute(self, *inputs: Tensor) -> dict[str, Tensor]:
        half, crop = inputs
        resized = resize(crop, map_size(half))
        return {"logits": half + F.conv2d(resized, self.ensemble.global_weight, padding=1)}


def parts_of(model: GLNet, mode: int) -> list[Part]:
    """Return the parts of which a mode consists, in the order of computation.

    Args:
        model: the network in evaluation mode; the parts share its weights.
        mode: 1 global, 2 global to local, 3 local to global.
    """
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


def define_pyramid(fpn: FPN, c: Levels, other: Pyramid | None = None) -> FullPyramid:
    """Compute what `fpn(c, other)` does, as the paper defines it; see `FPN.forward`."""
    other_c, other_ps0, other_ps1 = (None, None, None) if other is None else (other.c, other.ps0, other.ps1)
    ps0: list[Tensor] = []
    for x in convolve_joined(fpn.lateral, c, other_c):
        ps0.append(x + resize(ps0[-1], map_size(x)) if ps0 else x)
    ps1 = convolve_joined(fpn.smooth1, tuple(ps0), other_ps0)
    ps2 = convolve_joined(fpn.smooth2, ps1, other_ps1)
    maps = ps2
    if other is not None:
        maps = tuple(x for own, y in zip(ps2, other.ps2, strict=True) for x in (own, resize(y, map_size(own))))
    ps3 = torch.cat([resize(x, map_size(ps2[-1])) for x in maps], dim=1)
    if fpn.smooth is not None:
        ps3 = fpn.smooth(ps3)
    return FullPyramid(c, tuple(ps0), ps1, ps2, ps3)


def convolve_joined(layers: LevelConvs, own: Levels, other: Levels | None) -> Levels:
    """Convolve every level of `own`, joined with the same level of `other`, resized to it, if there is one."""
    if other is not None:
        own = tuple(torch.cat([x, resize(y, map_size(x))], dim=1) for x, y in zip(own, other, strict=True))
    return tuple(layer(x) for layer, x in zip(layers, own, strict=True))


def resize(x: Tensor, size: Size) -> Tensor:
    """Return `x` resized as `models.resized.resize` does it; a map that fits is resized too, so that any size may."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)
