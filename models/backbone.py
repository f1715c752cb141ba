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
    """A ResNet without average pooling and classifier; parameters carry torchvision's names.

    `channels`: of c5, c4, c3, c2, coarsest first as in `Pyramid`.
    """

    def __init__(self, name: str = "resnet50") -> None:
        super().__init__()
        net = getattr(torchvision.models, name)(weights=None)
        self.conv1, self.bn1, self.relu, self.maxpool = net.conv1, net.bn1, net.relu, net.maxpool
        self.layer1, self.layer2, self.layer3, self.layer4 = net.layer1, net.layer2, net.layer3, net.layer4
        self.channels = tuple(net.fc.in_features // k for k in (1, 2, 4, 8))

    def forward(self, image: Tensor) -> Levels:
        """(c5, c4, c3, c2) of `image` (N, 3, H, W): at 1/32, 1/16, 1/8 and 1/4, sides rounded up."""
        c2 = self.layer1(self.maxpool(self.relu(self.bn1(self.conv1(image)))))
        c3 = self.layer2(c2)
        c4 = self.layer3(c3)
        return self.layer4(c4), c4, c3, c2


def backbone_weights(name: str, source: str) -> dict[str, Tensor] | None:
    """State dict for `Backbone(name)` from `source`: `imagenet` (torchvision downloads it once), `none`, or a file.

    The file is a torchvision state dict, with or without `fc`. Raises InputError when it cannot be had.
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
        except Exception as error:  # torch.load raises many kinds; all mean that this is no weight file
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InputError(f"--backbone_weights {source} is not a torch weight file: {reason}") from error
        if not isinstance(state, dict):
            raise InputError(f"--backbone_weights {source} holds a {type(state).__name__}, not a state dict")
    return {key: value for key, value in state.items() if not key.startswith("fc.")}
