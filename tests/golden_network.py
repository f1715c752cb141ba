"""The golden network and pictures (see golden/README.md): every weight follows from its released name and a seed."""

import json
import os
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import torch
from builders import image_tensor, shrink_image
from PIL import Image
from torch import Tensor

from dataset.base import Sample
from models import checkpoint
from models.checkpoint import Checkpoint
from models.glnet import GLNet
from utils.resize import shrink_label
from utils.settings import TrainingSettings

GOLDEN = Path(os.environ.get("GLNET_GOLDEN", Path(__file__).parent / "golden"))
META = json.loads((GOLDEN / "meta.json").read_text())
STATE = [(name, tuple(shape), dtype) for name, shape, dtype in json.loads((GOLDEN / "state_dict.json").read_text())]


@cache
def arrays(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


def golden_tensor(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """The value of the released tensor `name` (without `module.`); first match wins."""
    if name.endswith("num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.int64)
    rng = np.random.RandomState((zlib.crc32(name.encode()) + seed) % 2**32)
    if name.endswith("running_mean"):
        value = rng.normal(0.0, 0.1, shape)
    elif name.endswith("running_var"):
        value = rng.uniform(0.5, 1.5, shape)
    elif len(shape) == 4:
        value = rng.normal(0.0, np.sqrt(2.0 / np.prod(shape[1:])), shape)
    elif name.endswith("bias"):
        value = rng.normal(0.0, 0.05, shape)
    elif name.endswith("bn3.weight"):
        value = rng.uniform(0.2, 0.4, shape)
    else:
        value = rng.uniform(0.5, 1.0, shape)
    return torch.from_numpy(np.asarray(value, dtype=np.float32))


@cache
def golden_state(seed: int) -> dict[str, Tensor]:
    """The released state dict of the network with `seed`, `module.` included."""
    return {name: golden_tensor(name.removeprefix("module."), shape, seed) for name, shape, _ in STATE}


def golden_file(seed: int) -> Checkpoint:
    """The same as `models.checkpoint.read` gives it."""
    tensors = {name.removeprefix("module."): tensor for name, tensor in golden_state(seed).items()}
    return Checkpoint(Path(f"golden_{seed}.pth"), None, tensors)


def golden_model(mode: int) -> GLNet:
    """The network as the golden numbers of `mode` were made with, in evaluation mode."""
    model = GLNet(META["n_class"])
    checkpoint.load_whole(model, golden_file(META["weight_seed"]), mode)
    if mode == 3:
        checkpoint.load_context(model, golden_file(META["fixed_weight_seed"]))
    return model.eval()


def golden_settings() -> TrainingSettings:
    return TrainingSettings(META["size_p"], META["sub_batch_size"], lamb_fmreg=META["lamb_fmreg"])


def golden_sample(index: int, mirrored: bool = False) -> Sample:
    """Picture `index` as a data set would give it."""
    pixels, ids = (arrays("pictures")[f"{kind}{index}"] for kind in ("image", "label"))
    if mirrored:
        pixels, ids = pixels[:, ::-1], ids[:, ::-1]
    image, label = Image.fromarray(np.ascontiguousarray(pixels)), torch.from_numpy(ids.copy())
    small = image_tensor(shrink_image(image, META["size_g"]))
    quarter = META["size_g"] // 4
    return Sample(str(index), image_tensor(image), label, small, shrink_label(label, (quarter, quarter)))
