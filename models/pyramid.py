"""The feature maps that one branch computes from one image, or from a batch of patches."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Levels = tuple[Tensor, ...]
"""Four maps, coarsest first: p5, p4, p3, p2, at 1/32, 1/16, 1/8 and 1/4 of the input."""

OnMap = Callable[[int, int, Tensor], None]
"""A callback that gets each map as soon as it is computed: its depth (0: c, 1: ps0, 2: ps1, 3: ps2), its level (0: p5,
... 3: p2), and the map. So it can be used before the next maps take memory, and need not be kept."""


@dataclass(frozen=True)
class Pyramid:
    """All maps that branches share, level by level in the order of computation (coarsest first).

    Attributes:
        c: the backbone's c5, c4, c3, c2.
        ps0: top-down sums, 256 channels.
        ps1, ps2: smoothed once and twice, 256 and 128 channels.
        ps3: all of ps2 at 1/4 scale, 512 channels; None where it is not computed.
    """

    c: Levels
    ps0: Levels
    ps1: Levels
    ps2: Levels
    ps3: Tensor | None = None

    @property
    def levels(self) -> tuple[Levels, Levels, Levels, Levels]:
        """What a fused pyramid reads of another branch: c, ps0, ps1, ps2."""
        return self.c, self.ps0, self.ps1, self.ps2

    def map(self, change: Callable[..., Tensor], *others: "Pyramid") -> "Pyramid":
        """Apply `change` to each map of `levels` (and the same map of `others`); ps3 is left out."""
        every = zip(*(pyramid.levels for pyramid in (self, *others)), strict=True)
        return Pyramid(*(tuple(map(change, *levels)) for levels in every))

    def visit(self, on_map: OnMap) -> None:
        """Call `on_map` with every map of `levels`."""
        for depth, levels in enumerate(self.levels):
            for level, x in enumerate(levels):
                on_map(depth, level, x)
