"""The network prepared for inference: computed once from the weights, nothing in it learns.

It gives what the plain form gives, up to rounding, for about a third of the work. What is exact and why:

*Norm layers* in evaluation are affine, so each folds into the convolution before it.

*A convolution of a concatenation* is the sum of convolutions of its parts, and a *1x1 convolution commutes* with
resizing and cropping. So the part of every local lateral that reads the global branch is computed once per image, on
the whole global map, and cropped.

*A 3x3 convolution of a resized map needs no resized map* (`add_resized_conv`). Each of its nine taps is a 1x1
convolution, done at the map's own size; what remains, bilinear resizing, shifting by the tap and padding with zeros,
is linear in rows and columns separately, so it is one matrix for rows and one for columns. Resizes in a row multiply
into one.

*The end of the pyramid folds.* From ps2 to the scores there is only: resize, concatenate, smooth (1024 -> 512), and a
3x3 convolution to n_class scores. That last one is its nine taps of ps3, each shifted and added (`add_taps`), and a tap
of ps3 is one channel of smooth followed by a 1x1 convolution: one 3x3 convolution from 1024 to 9 n_class channels. So
ps3 is never built. Shifting after the fold keeps the border exact: what a tap reads outside ps3 is 0, as the padding.
The head and the local half of the ensemble are folded alike; of the global half of the ensemble, taps of the global
ps3 are computed once per image and cropped.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from models.fpn import FPN, PS2_CHANNELS, PS3_CHANNELS, interleaved
from models.glnet import GLNet, PatchMaps, WholeMaps, spread_crop
from models.pyramid import Levels, Pyramid, See
from models.resized import add_resized_conv, add_taps, conv, joint_conv, resize, taps_of
from models.sharing import crop_pyramid
from utils.stages import Stage
from utils.tiling import Patches


@dataclass(frozen=True)
class Form:
    """Where and how the prepared network computes."""

    device: torch.device
    dtype: torch.dtype = torch.float32

    def put(self, x: Tensor) -> Tensor:
        """`x` on the device, in the precision and, where it has rows and columns, the layout of this form."""
        x = x.detach().to(self.device, self.dtype)
        return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.contiguous()


def fold_norms(module: nn.Module, form: Form) -> nn.Module:
    """A copy of a ResNet (or a part of one) in `form`, every norm layer folded into the convolution before it."""
    folded = copy.copy(module)
    folded._modules, folded._parameters = {}, {}
    before = ""
    for name, child in module.named_children():  # in the order of registration: a norm layer follows its convolution
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            layer, statistics = getattr(module, before), (child.running_mean, child.running_var, child.eps)
            weights = fuse_conv_bn_weights(layer.weight, layer.bias, *statistics, child.weight, child.bias)
            weight, bias = (nn.Parameter(form.put(x), requires_grad=False) for x in weights)
            folded._modules[before].weight, folded._modules[before].bias = weight, bias
            folded._modules[name] = nn.Identity()
        else:
            folded._modules[name] = fold_norms(child, form)
        before = name
    return folded


class PreparedPyramid:
    """A pyramid from backbone maps to ps2; in the fused form each convolution in an own and another branch's half."""

    def __init__(self, fpn: FPN, form: Form) -> None:
        self.fused = fpn.fused
        self.own, self.other = [], []
        for convs in (fpn.lateral, fpn.smooth1, fpn.smooth2):
            halves = [layer.weight.chunk(2 if fpn.fused else 1, dim=1) for layer in convs]
            biases = [form.put(layer.bias) for layer in convs]
            self.own.append([(form.put(own), bias) for (own, *_), bias in zip(halves, biases, strict=True)])
            self.other.append([form.put(other) for _, *others in halves for other in others])

    def project(self, level: int, c: Tensor) -> Tensor:
        """The other branch's half of a lateral, at the size of its map `c`: 256 channels."""
        return conv(c, self.other[0][level])

    def __call__(self, c: list[Tensor], other: Pyramid | None = None, see: See | None = None) -> Levels:
        """ps2 of the backbone maps `c`; in the fused form `other.c` is projected already.

        `see` is shown every map, coarsest level first. None is held longer than needed: `c` itself is emptied.
        """
        maps: list[Tensor | None] = c
        for depth, layers in enumerate(self.own):
            for level, layer in enumerate(layers):
                own, maps[level] = maps[level], None
                if see is not None:
                    see(depth, level, own)
                x = conv(own, *layer)
                del own
                if self.fused:
                    theirs, size = other.levels[depth][level], tuple(x.shape[-2:])
                    if depth:
                        x = add_resized_conv(x, theirs, self.other[depth][level], [size])
                    else:
                        x += resize(theirs, size)
                if depth == 0 and level > 0:
                    x += resize(maps[level - 1], x.shape[-2:])
                maps[level] = x
        for level, x in enumerate(maps if see is not None else ()):
            see(len(self.own), level, x)
        return tuple(maps)


class FoldedTail:
    """Everything from ps2 to what 3x3 convolutions read of ps3: the nine taps of each, and ps3 never built."""

    def __init__(self, fpn: FPN, kernels: list[Tensor], form: Form) -> None:
        """`kernels`: weights (n_class, 512, 3, 3), each one output to choose from."""
        # (9, outputs, n_class, 512): the places outermost, row by row
        taps = torch.stack([taps_of(kernel.double()).view(9, *kernel.shape[:2]) for kernel in kernels], 1)
        if fpn.fused:  # (9, outputs, n_class, 512) by (512, 1024, 3, 3)
            weight = torch.tensordot(taps, fpn.smooth.weight.double(), dims=1)
            self.bias = form.put(torch.tensordot(taps, fpn.smooth.bias.double(), dims=1))
        else:  # ps3 is the concatenation itself
            weight = taps[..., None, None]
            self.bias = form.put(taps.new_zeros(taps.shape[:-1]))
        # one group for each map that is read: of each level the own, then in the fused form the other branch's
        self.groups = [form.put(group) for group in weight.split(PS2_CHANNELS, dim=3)]

    def __call__(self, outputs: list[int], own: Levels, other: Levels | None = None) -> Tensor:
        """(N, 9 * K, H, W): the taps of ps3 for the `outputs` chosen (K classes in all), at the size of p2."""
        maps, chains = (own, [[tuple(own[-1].shape[-2:])]] * len(own)) if other is None else interleaved(own, other)
        weights = [group[:, outputs].flatten(0, 2) for group in self.groups]
        return joint_conv(maps, chains, weights, self.bias[:, outputs].flatten())


class PreparedGLNet:
    """GLNet as `stage` evaluates it, with GLNet's four methods of inference; see there for what they take and give.

    `WholeMaps.context.c` is projected to the local laterals, and `WholeMaps.ensemble` holds taps of ps3.
    Only what the stage uses is copied, to the form's device. The plain network is not changed and not kept.
    """

    def __init__(self, model: GLNet, stage: Stage, form: Form) -> None:
        self.n_class = model.n_class
        self.form = form
        joint = [branch for branch in ("local", "refined") if branch in stage.uses]
        local_kernel, global_kernel = model.ensemble.weight.split(PS3_CHANNELS, dim=1)
        kernels = {"global_": global_kernel, "local": local_kernel, "refined": global_kernel}
        self.backbones, self.pyramids, self.tails, self.biases = {}, {}, {}, {}
        with torch.no_grad():
            for name in ("global_", *joint):
                branch = getattr(model, name)
                self.backbones[name] = fold_norms(branch.backbone, form)
                self.pyramids[name] = PreparedPyramid(branch.pyramid, form)
                self.tails[name] = FoldedTail(branch.pyramid, [branch.head.weight, kernels[name]], form)
                self.biases[name] = branch.head.bias.detach().float().to(form.device)
            self.ensemble_bias = model.ensemble.bias.detach().float().to(form.device)

    def read_whole(self, image: Tensor, logits: bool, context: bool, ensemble: bool) -> WholeMaps:
        kept: list[list[Tensor]] = [[], [], [], []]

        def keep(depth: int, level: int, x: Tensor) -> None:
            kept[depth].append(x if depth else self.pyramids["local"].project(level, x))

        c = list(self.backbones["global_"](self.form.put(image)))
        ps2 = self.pyramids["global_"](c, see=keep if context else None)
        found, taps = self._read_ps3("global_", ps2, None, logits, ensemble)
        return WholeMaps(found, Pyramid(*map(tuple, kept)) if context else None, taps)

    def read_patches(
        self,
        x: Tensor,
        whole: WholeMaps,
        grid: Patches,
        patches: slice,
        logits: bool,
        ensemble: bool,
        see: See | None = None,
    ) -> PatchMaps:
        other = crop_pyramid(whole.context, grid, patches)
        ps2 = self.pyramids["local"](list(self.backbones["local"](self.form.put(x))), other, see)
        outputs = [k for k, asked in enumerate((logits, ensemble)) if asked]
        if not outputs:
            return PatchMaps(None, None)
        scores = list(add_taps(self.tails["local"](outputs, ps2, other.ps2)).split(self.n_class, dim=1))
        found = scores.pop(0) + self.biases["local"].view(-1, 1, 1) if logits else None
        half = scores.pop(0) + self.ensemble_bias.view(-1, 1, 1) if ensemble else None
        return PatchMaps(found, half)

    def refine(self, image: Tensor, merged: Pyramid, logits: bool, ensemble: bool) -> WholeMaps:
        fused = self.pyramids["refined"]
        projected = tuple(fused.project(level, x) for level, x in enumerate(merged.c))
        other = Pyramid(projected, merged.ps0, merged.ps1, merged.ps2)
        ps2 = fused(list(self.backbones["refined"](self.form.put(image))), other)
        found, taps = self._read_ps3("refined", ps2, other.ps2, logits, ensemble)
        return WholeMaps(found, None, taps)

    def join(self, half: Tensor, whole: WholeMaps, grid: Patches, patches: slice) -> Tensor:
        return half + spread_crop(whole.ensemble, grid, patches, half)

    def _read_ps3(
        self, name: str, own: Levels, other: Levels | None, logits: bool, ensemble: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Of a global branch: its logits, and the taps that the ensemble reads of its ps3."""
        outputs = [k for k, asked in enumerate((logits, ensemble)) if asked]
        if not outputs:
            return None, None
        every = self.tails[name](outputs, own, other).unflatten(1, (9, len(outputs), self.n_class))
        taps = [x.flatten(1, 2) for x in every.unbind(2)]
        found = add_taps(taps.pop(0)) + self.biases[name].view(-1, 1, 1) if logits else None
        return found, taps.pop() if ensemble else None
