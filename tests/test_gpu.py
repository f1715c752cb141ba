"""The same results on a GPU as on the CPU; skipped without one.

`GLNET_TEST_DEVICE=cpu` runs them on the CPU, which proves the tests themselves; `cuda:1` names another GPU.
"""

import os
import signal
from copy import deepcopy
from functools import partial

import builders
import pytest
import torch
from builders import N_CLASS, SIDE, build_model, build_sample, shared_model
from pictures import Whole, random_image, write_checkpoint
from test_sharing import maps, random_pyramid

import helper
import train_deep_globe
from engine.predictor import Predictor
from helper import TRAINING_STEPS, train_one_epoch
from imaging.sources import MemorySource
from models.sharing import Mosaic, crop_pyramid
from predict import Segmenter
from prediction.scenes import segment_scenes
from utils.metrics import StageMetrics
from utils.precision import autocast
from utils.settings import TrainingSettings
from utils.stages import STAGES
from utils.tiling import PatchGrid

CHOSEN = os.environ.get("GLNET_TEST_DEVICE", "cuda")
DEVICE = torch.device(CHOSEN)
GPU = DEVICE.type != "cpu"
MODES = pytest.mark.parametrize("mode", [1, 2, 3])
LIKENESS = {"fp32": 0.999, "bf16": 0.9}
"""The least cosine between gradients of the device and those of the CPU in fp32."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(GPU and not torch.cuda.is_available(), reason="needs a GPU, or GLNET_TEST_DEVICE=cpu"),
]


def settings_of(device: torch.device, precision: str = "fp32") -> TrainingSettings:
    """In fp16 with a scaler that starts low enough for its search to end in the first steps."""
    torch.backends.cudnn.allow_tf32 = False
    scaler = torch.amp.GradScaler(device.type, init_scale=256.0, enabled=precision == "fp16")
    return builders.build_settings(device=device, precision=precision, scaler=scaler)


@MODES
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("bf16", 5e-2)])
def test_scores_are_those_of_the_cpu(mode, precision, tolerance) -> None:
    sample = build_sample((100, 150))
    expected = builders.segment_scores(shared_model(), mode, sample, builders.build_settings())
    sinks = {name: builders.Scores((100, 150)) for name in STAGES[mode].predictions}
    model = build_model().to(DEVICE)
    predictor = Predictor.prepare(model, STAGES[mode], settings_of(DEVICE, precision), SIDE)
    predictor.segment(MemorySource(sample.image), sinks, global_image=sample.global_image)
    for name, scores in expected.items():
        found = sinks[name].whole()
        assert found.device.type == DEVICE.type
        assert (found.float().cpu() - scores).abs().max() <= tolerance * (scores.max() - scores.min()), name


def gradients(device: torch.device, mode: int, precision: str) -> tuple[dict[str, float], torch.Tensor]:
    """The terms of the loss, and all gradients in one vector, of the first step."""
    model = builders.learning_model(mode).to(device)
    metrics, batch = StageMetrics(STAGES[mode], N_CLASS), [build_sample((80, 100), 0), build_sample((64, 64), 1)]
    with autocast(device, precision):
        terms = TRAINING_STEPS[mode](model, batch, settings_of(device, precision), metrics)
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return {name: float(value) for name, value in terms.items()}, found.float().cpu()


@MODES
@pytest.mark.parametrize("precision", LIKENESS)
def test_gradients_of_a_step_are_those_of_the_cpu(mode, precision) -> None:
    terms, found = gradients(DEVICE, mode, precision)
    expected_terms, expected = gradients(torch.device("cpu"), mode, "fp32")
    assert found.isfinite().all()
    assert torch.nn.functional.cosine_similarity(found, expected, dim=0) > LIKENESS[precision]
    assert terms == pytest.approx(expected_terms, rel=1e-4 if precision == "fp32" else 0.1)


@MODES
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_an_optimizer_step_changes_what_learns_and_nothing_else(mode, precision) -> None:
    model, stage = builders.learning_model(mode).to(DEVICE), STAGES[mode]
    before = deepcopy(model.state_dict())
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1)
    batches = [[build_sample((64, 90), 0), build_sample((70, 64), 1)]] * (3 if precision == "fp16" else 1)
    train_one_epoch(model, stage, batches, optimizer, scheduler, settings_of(DEVICE, precision), on_step=lambda _: None)
    for name, tensor in model.state_dict().items():
        assert tensor.isfinite().all(), name
        assert torch.equal(tensor, before[name]) != (name.split(".")[0] in stage.trains), name


def test_merged_maps_are_those_of_the_cpu() -> None:
    grid, frame = PatchGrid.cover((100, 230), SIDE, 16), random_pyramid((100, 230))
    merged = []
    for device in (torch.device("cpu"), DEVICE):
        there = frame.map(lambda x, device=device: x.to(device))
        mosaic = Mosaic(1, there)
        for patches in grid.sub_batches(3):
            crop_pyramid(there, grid, patches).visit(partial(mosaic.add, 0, grid, patches))
        merged.append(mosaic.merged())
    expected, found = map(maps, merged)
    torch.testing.assert_close([x.cpu() for x in found], [*expected], rtol=1e-5, atol=1e-5)


def test_a_large_scene_is_segmented_as_on_the_cpu(tmp_path) -> None:
    """In scenes that are read ahead, with probabilities."""
    checkpoint, image = write_checkpoint(tmp_path / "three.pth", 3), random_image((300, 420))
    found = []
    for device in ("cpu", CHOSEN):
        segmenter, whole = Segmenter.from_checkpoint(checkpoint, device=device), Whole()
        segment_scenes(segmenter.predictor, MemorySource(image), whole, scene_size=160, probabilities=True)
        found.append(whole)
    assert (found[0].ids.cpu() == found[1].ids.cpu()).float().mean() > 0.999
    torch.testing.assert_close(found[0].probabilities.cpu(), found[1].probabilities.cpu(), rtol=0, atol=5e-3)


@MODES
def test_a_stopped_run_is_resumed(reference, tmp_path, monkeypatch, mode) -> None:
    """It ends with the weights of one that was not stopped: bit by bit on the CPU, on a GPU up to its order of sums."""
    options = [f"--device={CHOSEN}", "--deterministic"]
    whole, parts = (reference.folders.beside(tmp_path / name) for name in ("whole", "parts"))
    assert train_deep_globe.main(whole.arguments(mode, *options)) == 0
    step, left = helper._joint_step, [2]

    def stopping(*arguments, **more):
        left[0] -= 1
        if left[0] == 0:
            signal.raise_signal(signal.SIGTERM)
        return step(*arguments, **more)

    monkeypatch.setattr(helper, "_joint_step", stopping)
    assert train_deep_globe.main(parts.arguments(mode, *options)) == 143
    assert train_deep_globe.main(parts.arguments(mode, *options, "--resume=auto")) == 0
    torch.testing.assert_close(parts.weights(mode), whole.weights(mode), rtol=1e-3 * GPU, atol=1e-3 * GPU)
