"""The network prepared for inference: computed once from the weights, without gradients.

It gives the scores of the plain form, up to rounding, for about a third of the work. Its parts, each exact:

*Norm layers* whose statistics are fixed are affine, so each folds into the convolution before it (`models/folding.py`,
`folded_kernel`).

*A convolution of a concatenation* is the sum of convolutions of its parts, and a *1x1 convolution commutes* with
resizing and cropping. So the global branch's half of every local lateral is computed once per image, on the whole
global map, and cropped.

*A 3x3 convolution of a resized map needs no resized map* (`add_resized_conv`). Each of its nine taps is a 1x1
convolution, done at the map's own size; what remains, bilinear resizing, shifting by the tap and padding with zeros,
is linear in rows and columns separately, so it is one matrix for rows and one for columns. Resizes in a row multiply
into one.

*The end of the pyramid folds.* From ps2 to the scores there is only: resize, concatenate, smooth (1024 -> 512), and a
3x3 convolution to n_class scores. That last one is its nine taps of ps3, each shifted and added (`add_taps`), and a tap
of ps3 is one channel of smooth followed by a 1x1 convolution: one 3x3 convolution from 1024 to 9 n_class channels. So
ps3 is never built. Shifting after the fold keeps the border exact: outside ps3 a tap is 0, like the padding.
The head and the local half of the ensemble are folded alike; of the global half of the ensemble, taps of the global
ps3 are computed once per image and cropped.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.efficient import ensemble_global_half, folded_kernel, interleaved
from models.folding import Placement, fold_norms
from models.fpn import FPN
from models.glnet import GLNet
from models.pyramid import Levels, OnMap, Pyramid, fitted
from models.resized import add_resized_conv, add_taps, conv, joint_conv, taps_of
from models.sharing import crop_pyramid
from utils.stages import Stage
from utils.tiling import Patches, map_size


@dataclass(frozen=True)
class GlobalMaps:
    """The maps that a global branch computes from a whole image; None for a map that was not requested.

    Attributes:
        logits: (1, n_class, size_g / 4, size_g / 4).
        context: the maps that the local pyramid reads, (1, C, h, w) each; `c` is projected to its laterals already.
        taps: `ensemble_taps`, (1, 9 * n_class, size_g / 4, size_g / 4).
    """

    logits: Tensor | None
    context: Pyramid | None
    taps: Tensor | None


class PreparedPyramid:
    """A pyramid from backbone maps to ps2.

    The convolutions of the fused form are split into the own half and the other branch's half.

    Attributes:
        own: [depth][level]: weight and bias of the own half.
        other: [depth][level]: weight of the other branch's half; no levels in the plain form.
    """

    def __init__(self, fpn: FPN, placement: Placement) -> None:
        self.own: list[list[tuple[Tensor, Tensor]]] = []
        self.other: list[list[Tensor]] = []
        for convs in (fpn.lateral, fpn.smooth1, fpn.smooth2):
            kernels = [folded_kernel(layer) for layer in convs]
            halves = [weight.chunk(2 if fpn.fused else 1, dim=1) for weight, _ in kernels]
            biases = [placement.put(bias) for _, bias in kernels]
            self.own.append([(placement.put(own), bias) for (own, *_), bias in zip(halves, biases, strict=True)])
            self.other.append([placement.put(other) for _, *others in halves for other in others])

    def project(self, level: int, c: Tensor) -> Tensor:
        """Return the other branch's half of a lateral, (N, C', h, w), from the other branch's map `c` (N, C, h, w)."""
        return conv(c, self.other[0][level])

    def __call__(self, c: list[Tensor], other: Pyramid | None = None, on_map: OnMap | None = None) -> Levels:
        """Compute ps2 of backbone maps (N, C, h, w), coarsest first, each removed from the list when it was read.

        `other` is the other branch's pyramid in the fused form; its `c` is projected already, see `project`. `on_map`
        gets every map as soon as it is computed, coarsest level first.
        """
        maps: list[Any] = c
        for depth, layers in enumerate(self.own):
            for level, (weight, bias) in enumerate(layers):
                own, maps[level] = maps[level], None
                if on_map is not None:
                    on_map(depth, level, own)
                x = conv(own, weight, bias)
                del own
                if other is not None:
                    y, size = other.levels[depth][level], map_size(x)
                    if depth:
                        x = add_resized_conv(x, y, self.other[depth][level], [size])
                    else:
                        x += fitted(y, size)
                if depth == 0 and level > 0:
                    x += fitted(maps[level - 1], map_size(x))
                maps[level] = x
        if on_map is not None:
            for level, x in enumerate(maps):
                on_map(len(self.own), level, x)
        return tuple(maps)


class FoldedTail:
    """The end of the pyramid, from ps2 to the nine taps of 3x3 convolutions of ps3, which is never built.

    Attributes:
        groups: for each map that ps3 reads a kernel (9, outputs, n_class, C / 4, k, k), k being 3 in the fused form.
        bias: (9, outputs, n_class).
    """

    def __init__(self, fpn: FPN, kernels: list[Tensor], placement: Placement) -> None:
        """Fold convolutions of ps3 into the end of a pyramid: `kernels` (n_class, C, 3, 3), one for each output."""
        # (9, outputs, n_class, C): the places outermost, row by row
        taps = torch.stack([taps_of(kernel.double()).flatten(1).unflatten(0, (9, -1)) for kernel in kernels], 1)
        if fpn.smooth is not None:  # (9, outputs, n_class, C) by (C, 2 * C, 3, 3)
            smooth, bias = folded_kernel(fpn.smooth)
            weight = torch.tensordot(taps, smooth.double(), dims=1)
            self.bias = placement.put(torch.tensordot(taps, bias.double(), dims=1))
        else:  # ps3 is the concatenation itself
            weight = taps[..., None, None]  # (9, outputs, n_class, C, 1, 1)
            self.bias = placement.put(taps.new_zeros(taps.shape[:-1]))
        # one group for each map that is read: of each level the own, then in the fused form the other branch's
        self.groups = [placement.put(group) for group in weight.split(fpn.ps2_channels, dim=3)]

    def __call__(self, outputs: list[int], own: Levels, other: Levels | None = None) -> Tensor:
        """Compute taps of ps3, (N, 9 * outputs * n_class, H, W) at the size of p2, the places outermost.

        `outputs` are indices of kernels, `own` and `other` the two branches' ps2, coarsest first.
        """
        size = map_size(own[-1])
        maps, chains = (list(own), [[size]] * len(own)) if other is None else interleaved(own, other)
        weights = [group[:, outputs].flatten(0, 2) for group in self.groups]
        return joint_conv(maps, chains, weights, self.bias[:, outputs].flatten())


class PreparedGLNet:
    """GLNet as one stage evaluates it, in four parts: global maps, local maps, refined maps, ensemble.

    Each part computes only what is requested. The plain network, whose `forward` is the reference, is neither changed
    nor kept.
    """

    def __init__(self, model: GLNet, stage: Stage, placement: Placement) -> None:
        """Copy the branches of the plain network, in evaluation mode, that the stage uses."""
        self.n_class = model.n_class
        self.placement = placement
        joint = [branch for branch in ("local", "refined") if branch in stage.uses]
        local_kernel, global_kernel = model.ensemble.weight.chunk(2, dim=1)
        kernels = {"global_": global_kernel, "local": local_kernel, "refined": global_kernel}
        self.backbones: dict[str, nn.Module] = {}
        self.pyramids: dict[str, PreparedPyramid] = {}
        self.tails: dict[str, FoldedTail] = {}
        self.biases: dict[str, Tensor] = {}
        with torch.no_grad():
            for name in ("global_", *joint):
                branch = getattr(model, name)
                self.backbones[name] = fold_norms(branch.backbone, placement)
                self.pyramids[name] = PreparedPyramid(branch.pyramid, placement)
                self.tails[name] = FoldedTail(branch.pyramid, [branch.head.weight, kernels[name]], placement)
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
        scores = add_taps(self.tails["local"](list(outputs.values()), ps2, other.ps2)).split(self.n_class, dim=1)
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
        every = self.tails[name](outputs, own, other).unflatten(1, (9, len(outputs), self.n_class))
        taps = [x.flatten(1, 2) for x in every.unbind(2)]  # (1, 9 * n_class, H, W) each
        found = add_taps(taps.pop(0)) + self.biases[name].view(-1, 1, 1) if logits else None
        return found, taps.pop() if ensemble else None
