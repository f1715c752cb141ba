"""The work that speed and memory are measured on, the same as was measured of the released implementation."""

from pathlib import Path
from typing import Any

import torch

from dataset.base import Sample
from dataset.deep_globe import DEEP_GLOBE
from engine.predictor import Predictor
from helper import TRAINING_STEPS
from imaging.sources import MemorySource
from models import checkpoint
from models.backbone import backbone_name
from models.glnet import GLNet
from models.header import Header
from models.recompute import recomputed_activations
from models.restore import build_network
from utils.arguments import AddOption, whole
from utils.canvas import ArgmaxSink
from utils.errors import required
from utils.metrics import StageMetrics
from utils.precision import autocast
from utils.settings import Settings, TrainingSettings
from utils.stages import STAGES

N_CLASS = 7
MODES = (1, 2, 3)


def build_shapes(backbone: str = "resnet50") -> GLNet:
    """Return a network on torch's meta device: shapes without weights."""
    with torch.device("meta"):
        return GLNet(N_CLASS, backbone)


def random_sample(side: int, size_g: int = 508) -> Sample:
    """Return an image of side x side random pixels with random labels; `size_g` is the side of the shrunk image."""
    image, whole = (torch.randint(0, 256, (3, n, n), dtype=torch.uint8) for n in (side, size_g))
    label, small = (torch.randint(0, N_CLASS, (n, n), dtype=torch.uint8) for n in (side, size_g // 4))
    return Sample("random", image, label, whole, small)


def save_random(path: Path, mode: int, backbone: str, **sizes: Any) -> None:
    """Write a checkpoint with random weights for DeepGlobe's classes; `sizes` are entries of its header."""
    header = Header(stage=mode, classes=DEEP_GLOBE, backbone=backbone, **sizes)
    checkpoint.save(path, build_network(header), header)


def add_sizes(add: AddOption, *, several: bool = False) -> None:
    """Add `--side`, `--size_p` and `--backbone` to a benchmark's options; with `several`, of several encoders."""
    add("--side", type=whole(64), default=2448, help="of the image, in pixels (default: %(default)s)")
    add("--size_p", type=whole(51), default=508, help="of a patch, in pixels (default: %(default)s)")
    more: dict[str, Any] = {"nargs": "+", "default": ["resnet50"]} if several else {"default": "resnet50"}
    add("--backbone", type=backbone_name, metavar="NAME", help="(default: resnet50)", **more)


class Inference:
    """Segments an image in one mode and precision."""

    def __init__(self, model: GLNet, mode: int, settings: Settings) -> None:
        self.stage = STAGES[mode]
        self.settings = settings
        self.predictor = Predictor.prepare(model, self.stage, settings, size_g=0)  # samples hold the shrunk image

    def __call__(self, sample: Sample, names: tuple[str, ...] = ()) -> dict[str, ArgmaxSink]:
        """Return the class ids of `sample` by prediction: those in `names`, by default all of the mode."""
        source = MemorySource(required(sample.image, "image"))
        found = {name: ArgmaxSink(source.size, self.settings.device) for name in names or self.stage.predictions}
        self.predictor.segment(source, found, global_image=sample.global_image)
        return found


class TrainingStep:
    """Takes training steps of one mode: gradients and the optimizer's step."""

    def __init__(self, model: GLNet, mode: int, settings: TrainingSettings) -> None:
        self.model = model
        self.stage = STAGES[mode]
        self.settings = settings
        model.learn(self.stage.trains)
        model.train()
        learned = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(learned, lr=1e-5, weight_decay=5e-4)

    def __call__(self, batch: list[Sample]) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        recomputed = recomputed_activations(self.model, self.settings.checkpoint_activations)
        with autocast(self.settings.device, self.settings.precision), recomputed:
            TRAINING_STEPS[self.stage.number](self.model, batch, self.settings, StageMetrics(self.stage, N_CLASS))
        self.optimizer.step()
