"""Times evaluation and training steps beside the released implementation.

Times are in units, so that they carry over between machines: one unit is a 3x3 convolution 1024 -> 512 at 127 x 127,
batch 1, float32, without gradients, the mean of three calls after one that warms up, timed just before and after each
measurement and averaged. Evaluation: one 1000 x 1000 image, patch 508, sub-batch 6 (9 patches), all predictions of the
mode. Training: one step on two 1000 x 1000 images, patch 252, sub-batch 5 (25 patches each). Images and labels are
random and decoded already. The released figures were measured in the same way. Which size_g they trained with is not on
record; 252 is taken here, as a step of mode 1 at 508 would cost more in convolutions alone than was measured.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from dataset.base import Sample
from dataset.deep_globe import DEEP_GLOBE
from engine.predictor import Predictor
from evaluation.run import SegmentsImages
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
SIDE = 1000

RELEASED = {"eval": {1: 1.2, 2: 26.8, 3: 27.7}, "train": {1: 2.5, 2: 110.0, 3: 78.0}}
"""Units of the released implementation, float32 on a CPU."""


def random_sample(side: int, size_g: int = 508) -> Sample:
    """Return an image of side x side random pixels with random labels; `size_g` is the side of the shrunk image."""
    image, whole = (torch.randint(0, 256, (3, n, n), dtype=torch.uint8) for n in (side, size_g))
    label, small = (torch.randint(0, N_CLASS, (n, n), dtype=torch.uint8) for n in (side, size_g // 4))
    return Sample("random", image, label, whole, small)


def save_random(path: Path, mode: int, backbone: str, **sizes: Any) -> None:
    """Write a checkpoint with random weights for DeepGlobe's classes; `sizes` are entries of its header."""
    header = Header(stage=mode, classes=DEEP_GLOBE, backbone=backbone, **sizes)
    checkpoint.save(path, build_network(header), header)


def add_sizes(add: AddOption, **several: Any) -> None:
    """Add `--side`, `--size_p` and `--backbone` to a benchmark's options; `several` changes the last."""
    add("--side", type=whole(64), default=2448, help="of the image, in pixels (default: %(default)s)")
    add("--size_p", type=whole(51), default=508, help="of a patch, in pixels (default: %(default)s)")
    backbone = {"type": backbone_name, "default": "resnet50", "metavar": "NAME", "help": "(default: resnet50)"}
    add("--backbone", **{**backbone, **several})


def prepared(model: GLNet, mode: int, settings: Settings) -> Predictor:
    """Return the predictor of a mode, for samples that hold the shrunk image."""
    return Predictor.prepare(model, STAGES[mode], settings, size_g=0)


@dataclass
class Inference:
    """Segments an image by all predictions of a predictor."""

    predictor: SegmentsImages

    def __call__(self, sample: Sample) -> dict[str, ArgmaxSink]:
        """Return the class ids of `sample` by prediction."""
        source = MemorySource(required(sample.image, "image"))
        device = self.predictor.settings.device
        found = {name: ArgmaxSink(source.size, device) for name in self.predictor.stage.predictions}
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


@torch.no_grad()
def unit(device: torch.device) -> float:
    """Return the seconds of one unit."""
    x, weight = torch.randn(1, 1024, 127, 127, device=device), torch.randn(512, 1024, 3, 3, device=device)
    return seconds(lambda: F.conv2d(x, weight, padding=1), device, calls=3)


def elapsed(work: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """Return the seconds of `calls` calls of `work`, until the device has done them."""
    start = time.perf_counter()
    for _ in range(calls):
        work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def seconds(work: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """Return the mean seconds of `calls` calls of `work`, after one that warms up."""
    elapsed(work, device)
    return elapsed(work, device, calls) / calls


def measure(kind: str, mode: int, settings: TrainingSettings, calls: int) -> dict[str, float]:
    """Measure an evaluation (`eval`) or a training step (`train`), of which `calls` are timed.

    Returns:
        `units`, `seconds`, `released` (units) and `ratio`: the released implementation's units over these.
    """
    torch.manual_seed(0)
    model, device = GLNet(N_CLASS), settings.device
    work: Callable[[], object]
    if kind == "eval":
        inference = Inference(prepared(model.eval(), mode, replace(settings, size_p=508, sub_batch_size=6)))
        work = partial(inference, random_sample(SIDE))
    else:
        step = TrainingStep(model.to(device), mode, replace(settings, size_p=252, sub_batch_size=5))
        work = partial(step, [random_sample(SIDE, size_g=252) for _ in range(2)])
    before = unit(device)
    taken = seconds(work, device, calls)
    units = taken / ((before + unit(device)) / 2)
    released = RELEASED[kind][mode]
    return {"units": units, "seconds": taken, "released": released, "ratio": released / units}


COLUMNS = {
    "work": "work",
    "precision": "precision",
    "units": "units",
    "released": "released",
    "ratio": "times as fast",
    "seconds": "seconds",
}


def add_options(add: AddOption) -> None:
    add("--precisions", nargs="+", choices=("fp32", "bf16"), default=("fp32", "bf16"), help="(default: both)")
    add("--quick", action="store_true", help="one call of each evaluation instead of three")


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row for each kind of work, mode and precision."""
    for kind, mode, precision in product(RELEASED, MODES, options.precisions):
        settings = TrainingSettings(device=options.device, precision=precision)
        found = measure(kind, mode, settings, 1 if options.quick or kind == "train" else 3)
        yield {"work": f"{kind} mode {mode}", "precision": precision, **found}
