"""The work that speed and memory are measured on, the same as was measured of the released implementation."""

import torch

from dataset.base import Sample
from helper import STEPS, prepare, segment
from models.glnet import GLNet
from utils.canvas import Ids
from utils.patches import Settings
from utils.precision import autocast
from utils.stages import STAGES
from utils.tally import Tally

N_CLASS = 7
MODES = (1, 2, 3)


def random_sample(side: int, size_g: int = 508) -> Sample:
    """An image of side x side of random pixels and labels."""
    image, whole = (torch.randint(0, 256, (3, n, n), dtype=torch.uint8) for n in (side, size_g))
    label, small = (torch.randint(0, N_CLASS, (n, n), dtype=torch.uint8) for n in (side, size_g // 4))
    return Sample("random", image, label, whole, small)


class Inference:
    """Segmenting an image in one mode and precision, all predictions of the mode asked for."""

    def __init__(self, model: GLNet, mode: int, settings: Settings) -> None:
        self.stage = STAGES[mode]
        self.settings = settings
        self.network = prepare(model, self.stage, settings)

    def __call__(self, sample: Sample, names: tuple[str, ...] = ()) -> dict[str, Ids]:
        """The class ids of `sample` by prediction; of those in `names` only, where there are any."""
        size = tuple(sample.image.shape[-2:])
        found = {name: Ids(size, self.settings.device) for name in names or self.stage.predictions}
        segment(self.network, self.stage, sample.image, sample.global_image, self.settings, found)
        return found


class TrainingStep:
    """The gradients and the optimizer step of one mode."""

    def __init__(self, model: GLNet, mode: int, settings: Settings) -> None:
        self.model = model
        self.stage = STAGES[mode]
        self.settings = settings
        model.learn(self.stage.trains)
        model.train()
        learned = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(learned, lr=1e-5, weight_decay=5e-4)

    def __call__(self, batch: list[Sample]) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.settings.device, self.settings.precision):
            STEPS[self.stage.number](self.model, batch, self.settings, Tally(self.stage, N_CLASS))
        self.optimizer.step()
