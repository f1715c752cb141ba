"""torchvision's ResNet as a feature extractor."""

from pathlib import Path
from urllib.error import URLError

import torch
import torchvision
from torch import Tensor, nn

from models.pyramid import Levels
from utils.errors import InputError

BACKBONES = ("resnet18", "resnet34", "resnet50", "resnet101")


class Backbone(nn.Module):
    """A ResNet without average pooling and classifier; its parameters have torchvision's names.

    Attributes:
        channels: of c5, c4, c3, c2, coarsest first as in `Pyramid`.
    """

    def __init__(self, name: str = "resnet50") -> None:
        """Make a backbone with torchvision's initial weights; `name` is one of `BACKBONES`."""
        super().__init__()
        net = getattr(torchvision.models, name)(weights=None)
        self.conv1, self.bn1, self.relu, self.maxpool = net.conv1, net.bn1, net.relu, net.maxpool
        self.layer1, self.layer2, self.layer3, self.layer4 = net.layer1, net.layer2, net.layer3, net.layer4
        self.channels = tuple(net.fc.in_features // k for k in (1, 2, 4, 8))

    def forward(self, image: Tensor) -> Levels:
        """Return c5, c4, c3, c2 of images (N, bands, H, W), (N, C, h, w) each: 1/32 to 1/4, sides rounded up."""
        c2 = self.layer1(self.maxpool(self.relu(self.bn1(self.conv1(image)))))
        c3 = self.layer2(c2)
        c4 = self.layer3(c3)
        return self.layer4(c4), c4, c3, c2


def backbone_weights(name: str, source: str) -> dict[str, Tensor] | None:
    """Return the initial weights of a backbone.

    Args:
        name: one of `BACKBONES`.
        source: `imagenet`, which torchvision downloads once; `none`; or a file with a torchvision state dict, with or
            without `fc`.

    Returns:
        A state dict for `Backbone(name)`; None for `none`.

    Raises:
        InputError: the weights cannot be downloaded or read.
    """
    if source == "none":
        return None
    if source == "imagenet":
        weights = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"]
        try:
            state = weights.get_state_dict(progress=True, check_hash=True)
        except (URLError, OSError) as error:
            raise InputError(
                f"the ImageNet weights of {name} could not be downloaded from {weights.url} ({error}); "
                "fetch that file elsewhere and pass --backbone_weights FILE, or --backbone_weights none"
            ) from error
    else:
        if not Path(source).is_file():
            raise InputError(f"--backbone_weights {source}: no such file (or one of: imagenet, none)")
        try:
            state = torch.load(source, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load raises many kinds; each means that the file cannot be used
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InputError(f"--backbone_weights {source} is not a torch weight file: {reason}") from error
        if not isinstance(state, dict):
            raise InputError(f"--backbone_weights {source} holds a {type(state).__name__}, not a state dict")
    return {key: value for key, value in state.items() if not key.startswith("fc.")}
