"""The layers of ResNets (He et al., CVPR 2016), with the names, initial weights and values of torchvision's.

torchvision takes as long to import as torch, so only downloads of its weights import it.
"""

from torch import Tensor, nn

DEPTHS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3), "resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}
"""By name, the number of blocks of each of the four layers."""

CHANNELS = (64, 128, 256, 512)
"""Of the 3x3 convolutions of each layer's blocks."""


def expansion(name: str) -> int:
    """Return how many times the channels of its 3x3 convolutions a block gives: 4 where blocks are bottlenecks."""
    return 1 if name in ("resnet18", "resnet34") else 4


class Block(nn.Module):
    """A residual block: two 3x3 convolutions, or a bottleneck: 1x1, 3x3 with the stride, 1x1."""

    def __init__(self, inputs: int, channels: int, stride: int, factor: int) -> None:
        """Make a block from `inputs` to `factor * channels` channels; with a factor above 1 it is a bottleneck."""
        super().__init__()
        outputs, is_bottleneck = factor * channels, factor > 1
        reshapes = stride != 1 or inputs != outputs
        # made first and registered last, as in torchvision: the order decides which initial weights are drawn
        shortcut = nn.Sequential(_conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs)) if reshapes else None
        self.conv1 = _conv(inputs, channels, 1) if is_bottleneck else _conv(inputs, channels, 3, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = _conv(channels, channels, 3, stride if is_bottleneck else 1)
        self.bn2 = nn.BatchNorm2d(channels)
        if is_bottleneck:
            self.conv3, self.bn3 = _conv(channels, outputs, 1), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut
        self.is_bottleneck = is_bottleneck

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, outputs, H / stride, W / stride), sides rounded up."""
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if self.is_bottleneck:
            y = self.bn3(self.conv3(self.relu(y)))
        y += x if self.downsample is None else self.downsample(x)
        return self.relu(y)


def resnet_layers(name: str) -> list[nn.Sequential]:
    """Return the four layers of a network of `DEPTHS`, with torch's initial weights."""
    layers: list[nn.Sequential] = []
    inputs, factor = CHANNELS[0], expansion(name)
    for channels, depth in zip(CHANNELS, DEPTHS[name], strict=True):
        blocks = []
        for stride in (1 if not layers else 2, *[1] * (depth - 1)):
            blocks.append(Block(inputs, channels, stride, factor))
            inputs = factor * channels
        layers.append(nn.Sequential(*blocks))
    return layers


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
