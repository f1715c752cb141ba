"""The work of workload.py on fake tensors, for benchmarks that count instead of measuring."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from benchmarks.fake_accelerator import MemoryCount, allocate, fake_accelerator, host_tensors, no_metric, put_on_device
from benchmarks.workload import Inference, TrainingStep, build_shapes, random_sample
from dataset.base import Sample
from utils.metrics import StageMetrics
from utils.settings import Settings, TrainingSettings
from utils.stages import STAGES


@contextmanager
def fake_inference(
    mode: int, settings: Settings, side: int, *, size_g: int = 508, backbone: str = "resnet50"
) -> Iterator[tuple[MemoryCount, Inference, Sample]]:
    """A context in which all tensors are fake; yields their count, an inference, and an image on the host.

    Args:
        mode: 1, 2 or 3.
        settings: of the inference.
        side: of the image, in pixels.
        size_g: side of the shrunk image, in pixels.
        backbone: of the network.
    """
    model = build_shapes(backbone).eval()
    with fake_accelerator() as count:
        with host_tensors(count):
            allocate(model)
            sample = random_sample(side, size_g)
        work = Inference(model, mode, settings)
        del model  # the prepared network is a copy
        gc.collect()
        yield count, work, sample


@contextmanager
def fake_training(
    mode: int, settings: TrainingSettings, side: int, *, images: int = 1, size_g: int = 508, backbone: str = "resnet50"
) -> Iterator[tuple[MemoryCount, TrainingStep, list[Sample]]]:
    """A context in which all tensors are fake; yields their count, a training step, and its images on the host.

    Args:
        mode: 1, 2 or 3.
        settings: of the step. Predictions, whose values fake tensors lack, are not counted.
        side: of the images, in pixels.
        images: how many there are.
        size_g: side of the shrunk images, in pixels.
        backbone: of the network.
    """
    model = build_shapes(backbone)
    with fake_accelerator() as count, patch.object(StageMetrics, "update", no_metric):
        with host_tensors(count):
            allocate(model)
            samples = [random_sample(side, size_g) for _ in range(images)]
        put_on_device(count, [getattr(model, name) for name in STAGES[mode].uses])
        yield count, TrainingStep(model, mode, settings), samples
