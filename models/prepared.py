"""The network prepared for inference: computed once from the weights, without gradients.

It gives the scores of the plain form, up to rounding, for about a third of the work. Beside what training does
(`models/efficient.py`, `models/resized.py`):

*Norm layers* whose statistics are fixed are affine, so each folds into the convolution before it (`models/folding.py`,
`folded_kernel`).

*A 1x1 convolution commutes* with resizing and cropping, so the global branch's half of every local lateral is computed
once per image, on the whole global map, and cropped.

*The end of the pyramid folds* (`folded_end`). From ps2 to the scores there is only: resize, concatenate, smooth (1024
-> 512), and a 3x3 convolution to n_class scores. That last one is its nine taps of ps3, each shifted and added
(`add_taps`), and a tap of ps3 is one channel of smooth followed by a 1x1 convolution: one 3x3 convolution from 1024 to
9 n_class channels. So ps3 is never built. Shifting after the fold keeps the border exact: outside ps3 a tap is 0, like
the padding. Taps of the global ps3 for the ensemble are computed once per image and cropped.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.efficient import SplitPyramid, ensemble_global_half, folded_end, interleaved
from models.folding import Placement, fold_norms
from models.glnet import GLNet
from models.pyramid import Levels, OnMap, Pyramid
from models.resized import add_taps, joint_conv
from models.sharing import crop_pyramid
from utils.stages import Stage
from utils.tiling import Patches, map_size


@dataclass(frozen=True)
class GlobalMaps:
    """The maps that a global branch computes from a whole image; None for a map that was not requested."""

    logits: Tensor | None  # (1, n_class, size_g / 4, size_g / 4)
    context: Pyramid | None  # that the local pyramid reads, (1, C, h, w) each; `c` is projected to its laterals
    taps: Tensor | None  # `ensemble_taps`, (1, 9 * n_class, size_g / 4, size_g / 4)


class PreparedGLNet:
    """GLNet as one stage evaluates it, in four parts: global maps, local maps, refined maps, ensemble.

    Each part computes only what is requested. The plain network, whose `forward` is the reference, is neither changed
    nor kept.

    Attributes:
        ends: of each branch, the nine taps of the convolutions of ps3 by its head and by its half of the ensemble, see
            `folded_end`: for each map that ps3 reads a kernel (9, 2, n_class, C / 4, k, k), and the bias (9, 2,
            n_class).
        biases: of each branch's head.
    """

    def __init__(self, model: GLNet, stage: Stage, placement: Placement) -> None:
        """Copy the branches of the plain network, in evaluation mode, that the stage uses."""
        self.n_class = model.n_class
        self.placement = placement
        joint = [branch for branch in ("local", "refined") if branch in stage.uses]
        local_kernel, global_kernel = model.ensemble.weight.chunk(2, dim=1)
        kernels = {"global_": global_kernel, "local": local_kernel, "refined": global_kernel}
        self.backbones: dict[str, nn.Module] = {}
        self.pyramids: dict[str, SplitPyramid] = {}
        self.ends: dict[str, tuple[list[Tensor], Tensor]] = {}
        self.biases: dict[str, Tensor] = {}
        with torch.no_grad():
            for name in ("global_", *joint):
                branch = getattr(model, name)
                self.backbones[name] = fold_norms(branch.backbone, placement)
                self.pyramids[name] = SplitPyramid(branch.pyramid, placement.put, projected=True)
                both = torch.cat([branch.head.weight, kernels[name]]).double()
                kernel, shift = (x.unflatten(0, (9, 2, -1)) for x in folded_end(branch.pyramid, both))
                groups = kernel.split(branch.pyramid.ps2_channels, dim=3)
                self.ends[name] = [placement.put(group) for group in groups], placement.put(shift)
                self.biases[name] = branch.head.bias.detach().float().to(placement.device)
            self.ensemble_bias = model.ensemble.bias.detach().float().to(placement.device)

    def global_maps(self, image: Tensor, *, logits: bool, context: bool, ensemble: bool) -> GlobalMaps:
        """Run the global branch on the whole image shrunk, (1, bands, size_g, size_g), normalised.

        The flags request the logits, the maps that the local branch reads, and the taps that the ensemble reads.
        """
        kept: list[list[Tensor]] = [[], [], [], []]

        def keep(depth: int, level: int, x: Tensor) -> None:
            kept[depth].append(x if depth else self.pyramids["local"].project(level, x))

        c = list(self.backbones["global_"](self.placement.put(image)))
        ps2 = self.pyramids["global_"](c, on_map=keep if context else None)
        found, taps = self._read_ps3("global_", ps2, None, logits, ensemble)
        return GlobalMaps(found, Pyramid.of(kept) if context else None, taps)

    def local_maps(
        self,
        x: Tensor,
        context: Pyramid,
        grid: Patches,
        patches: slice,
        requested: Collection[str],
        on_map: OnMap | None = None,
    ) -> dict[str, Tensor]:
        """Run the local branch on n normalised patches of the grid, (n, bands, h, w).

        `context` are the global branch's maps of the whole image, as `global_maps` gives them; `on_map` gets the maps
        that are merged for the refined branch. Return what is requested, (n, n_class, h / 4, w / 4) each: `local`, the
        logits; `ensemble`, the local half of the ensemble's logits.
        """
        other = crop_pyramid(context, grid, patches)
        ps2 = self.pyramids["local"](list(self.backbones["local"](self.placement.put(x))), other, on_map)
        biases = {"local": self.biases["local"], "ensemble": self.ensemble_bias}
        outputs = {name: k for k, name in enumerate(biases) if name in requested}
        if not outputs:
            return {}
        # the taps, nine times as large as the scores, get no name: they are freed at once
        scores = add_taps(self._taps("local", list(outputs.values()), ps2, other.ps2)).split(self.n_class, dim=1)
        return {name: x + biases[name].view(-1, 1, 1) for name, x in zip(outputs, scores, strict=True)}

    def refined_maps(self, image: Tensor, merged: Pyramid, *, logits: bool, ensemble: bool) -> GlobalMaps:
        """Run the refined branch; `merged` are the local maps merged into the global frame, (1, C, H, W) each.

        For the others see `global_maps`.
        """
        fused = self.pyramids["refined"]
        projected = tuple(fused.project(level, x) for level, x in enumerate(merged.c))
        other = Pyramid(projected, merged.ps0, merged.ps1, merged.ps2)
        ps2 = fused(list(self.backbones["refined"](self.placement.put(image))), other)
        found, taps = self._read_ps3("refined", ps2, other.ps2, logits, ensemble)
        return GlobalMaps(found, None, taps)

    def ensemble_logits(self, half: Tensor, taps: Tensor, grid: Patches, patches: slice) -> Tensor:
        """Return the ensemble's logits of n patches, (n, n_class, h, w), from `half`, as `local_maps` gives it.

        `taps` are of the image's last global maps, (1, 9 * n_class, size_g / 4, size_g / 4).
        """
        return half + ensemble_global_half(taps, grid, patches, map_size(half))

    def _read_ps3(
        self, name: str, own: Levels, other: Levels | None, logits: bool, ensemble: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return logits (1, n_class, H, W) and taps (1, 9 * n_class, H, W) of a ps3; None if not requested.

        `own` and, in the fused form, `other` are the two branches' ps2, coarsest first.
        """
        outputs = [k for k, requested in enumerate((logits, ensemble)) if requested]
        if not outputs:
            return None, None
        every = self._taps(name, outputs, own, other).unflatten(1, (9, len(outputs), self.n_class))
        taps = [x.flatten(1, 2) for x in every.unbind(2)]  # (1, 9 * n_class, H, W) each
        found = add_taps(taps.pop(0)) + self.biases[name].view(-1, 1, 1) if logits else None
        return found, taps.pop() if ensemble else None

    def _taps(self, name: str, outputs: list[int], own: Levels, other: Levels | None) -> Tensor:
        """Compute taps of ps3, (N, 9 * outputs * n_class, H, W) at the size of p2, the places outermost.

        `outputs` are 0 for the head, 1 for the ensemble; `own` and `other` the two branches' ps2, coarsest first.
        """
        size = map_size(own[-1])
        maps, chains = (list(own), [[size]] * len(own)) if other is None else interleaved(own, other)
        groups, shift = self.ends[name]
        weights = [group[:, outputs].flatten(0, 2) for group in groups]
        return joint_conv(maps, chains, weights, shift[:, outputs].flatten())
