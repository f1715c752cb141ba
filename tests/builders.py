"""Small networks, images and settings that tests share; everything random follows from a seed."""

import functools
import json
import math
import zlib
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dataset.base import Item, Sample
from engine.predictor import Predictor
from helper import TRAINING_STEPS, train_one_epoch
from imaging.sources import MemorySource
from models import checkpoint
from models.glnet import GLNet, Predictions
from models.header import Header
from utils.canvas import ScoreCanvas, Sink, enlarge
from utils.classes import IGNORED, Classes
from utils.files import save_torch
from utils.metrics import StageMetrics
from utils.resize import shrink_label
from utils.settings import Settings, TrainingSettings
from utils.stages import STAGES
from utils.tiling import PatchGrid, Size
from utils.turns import TURNS, Turn

BACKBONE = "resnet18"
N_CLASS = 5
SIDE = 64
"""Of the shrunk image and of a patch."""

MIN_OVERLAP = 16


def image_tensor(image: Image.Image) -> Tensor:
    """(3, H, W) uint8 of an RGB image, by Pillow and numpy alone."""
    return torch.from_numpy(np.array(image).transpose(2, 0, 1).copy())


def shrink_image(image: Image.Image, size_g: int) -> Image.Image:
    """The whole image at size_g x size_g, bilinear and antialiased."""
    return image.resize((size_g, size_g), Image.Resampling.BILINEAR)


def build_settings(**changes) -> TrainingSettings:
    return TrainingSettings(**{"size_p": SIDE, "sub_batch_size": 4, "min_overlap": MIN_OVERLAP, **changes})


def build_sample(size: Size, seed: int = 0, id_: str = "1", left_out: float = 0.1) -> Sample:
    """A random image and label of `size`; a share of `left_out` of its pixels is of the ignored id."""
    rng = np.random.default_rng([seed, *size])
    image = Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8))
    label = rng.integers(0, N_CLASS, size, np.uint8)
    label[rng.random(size) < left_out] = IGNORED
    label = torch.from_numpy(label)
    return Sample(
        id_,
        image_tensor(image),
        label,
        image_tensor(shrink_image(image, SIDE)),
        shrink_label(label, (SIDE // 4,) * 2),
        seed,
    )


def build_empty_model(n_class: int = N_CLASS) -> GLNet:
    """A network of shapes alone: no memory for its weights, no time to draw them."""
    with torch.device("meta"):
        return GLNet(n_class, BACKBONE)


def _spread(name: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Random values that keep maps and logits around 1, norm layers neither equal nor neutral."""
    if tensor.dtype == torch.int64:
        return torch.zeros_like(tensor, device="cpu")
    normal = torch.randn(tensor.shape, generator=generator)
    if tensor.dim() == 4:
        gain = 2 if ".backbone." in name else 1  # only backbones have activations
        return normal * math.sqrt(gain / math.prod(tensor.shape[1:]))
    if name.endswith(("bias", "running_mean")):
        return normal * 0.1
    return 1 + 0.1 * normal.clamp(-3, 3)  # of norm layers: weight and variance


@functools.cache
def shared_model(n_class: int = N_CLASS) -> GLNet:
    """A network in evaluation mode whose weights are spread so that logits differ by far more than rounding.

    All tests get the same one: to be read only.
    """
    model, generator = build_empty_model(n_class), torch.Generator().manual_seed(0)
    state = {name: _spread(name, x, generator) for name, x in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    model.learn(())
    return model.eval()


def build_model(n_class: int = N_CLASS) -> GLNet:
    """A copy of `shared_model`, to be changed."""
    return deepcopy(shared_model(n_class))


def thin_tensor(name: str, tensor: Tensor, finite: bool = False) -> Tensor:
    """A tensor of the same shape, its values drawn from `name`, whose memory (and file) is no longer than its sides.

    Networks of `finite` tensors give finite scores. The others are those of the fixtures.

    Entries share memory: x[i, j, k, l] = values[i + 2 j + 3 k + 4 l].
    """
    if tensor.dtype == torch.int64:
        return torch.tensor(zlib.crc32(name.encode()) % 1000)
    strides = tuple(range(1, tensor.dim() + 1))
    length = 1 + sum(stride * (side - 1) for stride, side in zip(strides, tensor.shape, strict=True))
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    values = torch.randn(length, generator=generator)
    if finite and tensor.dim() == 4:
        values /= math.sqrt(math.prod(tensor.shape[1:]))
    elif finite and name.endswith("running_var"):
        values = 0.5 + values.abs()
    return values.as_strided(tensor.shape, strides)


def build_thin_model(n_class: int = N_CLASS, prefix: str = "", finite: bool = False) -> GLNet:
    """A network whose checkpoint takes kilobytes; another `prefix` gives other weights."""
    model = build_empty_model(n_class)
    thin = {name: thin_tensor(prefix + name, x, finite) for name, x in model.state_dict().items()}
    model.load_state_dict(thin, assign=True)
    return model


def build_header(stage: int, n_class: int = N_CLASS, **changes) -> Header:
    values = {
        "backbone": BACKBONE,
        "classes": Classes.generic(n_class),
        "size_g": SIDE,
        "size_p": SIDE,
        "min_overlap": MIN_OVERLAP,
        "normalize": "none",
    }
    return Header(stage=stage, **{**values, **changes})


def write_thin_checkpoint(path: Path, stage: int, n_class: int = N_CLASS, **changes) -> GLNet:
    """Write a file of ours of `stage`; returns the network in it."""
    model = build_thin_model(n_class, prefix=f"stage{stage}.", finite=True)
    checkpoint.save(path, model, build_header(stage, n_class, **changes))
    return model


def write_released_checkpoint(path: Path, stage: int) -> GLNet:
    """Write the released file of `stage`; returns the network in it."""
    model = build_thin_model(prefix=f"stage{stage}.", finite=True)
    save_torch(path, checkpoint.to_released(model.state_dict(), stage))
    return model


class Scores:
    """A sink that keeps the scores of a whole image and checks that rows come once, from top to bottom."""

    def __init__(self, size: Size) -> None:
        self.size = size
        self.bands: list[Tensor] = []
        self.rows = 0

    def __call__(self, top: int, scores: Tensor) -> None:
        assert top == self.rows
        assert scores.shape[2] == self.size[1]
        self.rows += scores.shape[1]
        self.bands.append(scores.clone())

    def whole(self) -> Tensor:
        """(n_class, H, W)."""
        assert self.rows == self.size[0]
        return torch.cat(self.bands, dim=1)


def build_predictor(model: GLNet, mode: int, settings: Settings, turns: tuple[Turn, ...] = TURNS["none"]) -> Predictor:
    return Predictor.prepare(model, STAGES[mode], settings, SIDE, turns)


def segment_scores(model: GLNet, mode: int, sample: Sample, settings: Settings, **more) -> dict[str, Tensor]:
    """The scores (n_class, H, W) of each prediction of `mode`, by the prepared network."""
    sinks = {name: Scores(tuple(sample.image.shape[-2:])) for name in STAGES[mode].predictions}
    predictor = build_predictor(model, mode, settings)
    predictor.segment(MemorySource(sample.image), sinks, global_image=sample.global_image, **more)
    return {name: sink.whole() for name, sink in sinks.items()}


@torch.inference_mode()
def forward(model: GLNet, mode: int, sample: Sample, settings: Settings) -> tuple[Predictions, PatchGrid]:
    """The logits of `GLNet.forward` on all patches at once, and their grid."""
    grid = PatchGrid.cover(tuple(sample.image.shape[-2:]), settings.size_p, settings.min_overlap)
    patches = settings.to_input(torch.stack([box.of(sample.image) for box in grid.boxes()]))
    return model.eval()(settings.to_input(sample.global_image[None]), patches, grid, mode), grid


def forward_into(model: GLNet, mode: int, sample: Sample, settings: Settings, sinks: dict[str, Sink]) -> None:
    """The plain reference: `forward`, and the released sums over patches."""
    found, grid = forward(model, mode, sample, settings)
    if "global" in sinks:
        enlarge(found.global_, grid.image, sinks["global"])
    for name in ("local", "ensemble"):
        if name in sinks:
            ScoreCanvas(grid, sinks[name]).add(getattr(found, name), slice(0, len(grid)))


def forward_scores(model: GLNet, mode: int, sample: Sample, settings: Settings) -> dict[str, Tensor]:
    """The scores (n_class, H, W) of each prediction of `mode`, by the plain network."""
    sinks = {name: Scores(tuple(sample.image.shape[-2:])) for name in STAGES[mode].predictions}
    forward_into(model, mode, sample, settings, sinks)
    return {name: sink.whole() for name, sink in sinks.items()}


def learning_model(mode: int, n_class: int = N_CLASS) -> GLNet:
    """A copy of `shared_model` of which what a stage trains learns."""
    model = build_model(n_class)
    model.learn(STAGES[mode].trains)
    return model.train()


def take_step(model: GLNet, mode: int, batch: list[Sample], **changes) -> tuple[dict[str, Tensor], StageMetrics]:
    """The loss terms and the training metric of one batch; gradients are added to the model's."""
    metrics = StageMetrics(STAGES[mode], model.n_class)
    return TRAINING_STEPS[mode](model, batch, build_settings(**changes), metrics), metrics


def train_epoch(model: GLNet, mode: int, batches: list[list[Sample]], optimizer=None, **more) -> list[dict[str, float]]:
    """Take an optimizer step for each batch, by default Adam's; returns the values of each step.

    `more` are arguments of `train_one_epoch` and changes of the settings.
    """
    seen: list[dict[str, float]] = []
    optimizer = optimizer or torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    scheduler = more.pop("scheduler", None) or torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1.0)
    given = {name: more.pop(name) for name in ("epoch", "ranks", "on_step") if name in more}
    settings = build_settings(**more)
    given = {"on_step": seen.append, **given}
    train_one_epoch(model, STAGES[mode], batches, optimizer, scheduler, settings, **given)
    return seen


def gradients(model: GLNet) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def write_item(root: Path, id_: str, pixels: np.ndarray, label: np.ndarray | None = None, suffix: str = ".png") -> Item:
    """Write ID.png of pixels (H, W, 3) and ID_label.png of ids (H, W)."""
    path, label_path = root / f"{id_}{suffix}", root / f"{id_}_label.png"
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    if label is None:
        return Item(id_, path, None)
    Image.fromarray(label.astype(np.uint8)).save(label_path)
    return Item(id_, path, label_path)


def write_noise(root: Path, id_: str, size: Size, n_class: int = 2) -> Item:
    """Write an image and a label of noise, the same for the same folder and id."""
    rng = np.random.default_rng(zlib.crc32(f"{root.name} {id_}".encode()))
    return write_item(root, id_, rng.integers(0, 256, (*size, 3)), rng.integers(0, n_class, size))


def describe_set(root: Path, splits: dict | None = None, images: str = "{id}.png") -> Path:
    """Write the dataset.json of a set of two classes, as `write_item` names its files; returns `root`."""
    record = {"images": images, "labels": "{id}_label.png", "classes": [{"name": "a"}, {"name": "b"}]}
    (root / "dataset.json").write_text(json.dumps({**record, "splits": splits or {"fractions": {}}}))
    return root
