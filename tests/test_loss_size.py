"""`--loss_size full`: logits are enlarged to the labels, in all stages."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from builders import MIN_OVERLAP, SIDE, build_model, build_sample, build_settings, forward, take_step, write_item
from torch import Tensor

from dataset.base import SegmentationDataset
from models.glnet import GLNet
from utils.classes import Classes
from utils.loss import focal_loss
from utils.resize import shrink_label
from utils.stages import STAGES
from utils.tiling import PatchGrid

SIZE = (100, 64)
SAMPLE = build_sample(SIZE)
FULL = SAMPLE._replace(global_label=shrink_label(SAMPLE.label, (SIDE, SIDE)))


def terms_of(model: GLNet, mode: int, sample, **changes) -> dict[str, Tensor]:
    """The loss terms of a step, with norm layers in evaluation."""
    model.learn(STAGES[mode].trains)
    return take_step(model.eval(), mode, [sample], sub_batch_size=9, **changes)[0]


@pytest.mark.parametrize("mode", [1, 2, 3])
def test_logits_are_enlarged_bilinearly_to_labels_of_the_input_s_size(mode) -> None:
    settings = build_settings()
    found = terms_of(build_model(), mode, FULL, full_labels=True)
    logits = forward(build_model(), mode, SAMPLE, settings)[0]
    boxes = PatchGrid.cover(SIZE, SIDE, MIN_OVERLAP).boxes()
    targets = {"global": FULL.global_label[None], "local": torch.stack([box.of(SAMPLE.label) for box in boxes])}
    targets["ensemble"] = targets["local"]
    for name in STAGES[mode].supervised:
        scores = logits.global_ if name == "global" else getattr(logits, name)
        larger = F.interpolate(scores, targets[name].shape[1:], mode="bilinear", align_corners=False)
        expected = focal_loss(larger, targets[name])
        assert found[f"focal_{name}"] == pytest.approx(float(expected), rel=1e-4), name
        assert float(found[f"focal_{name}"]) != float(terms_of(build_model(), mode, SAMPLE)[f"focal_{name}"])


def test_the_shrunk_label_is_as_large_as_the_shrunk_image(tmp_path) -> None:
    label = (torch.arange(600).view(20, 30) % 5).byte()
    item = write_item(tmp_path, "a", np.zeros((20, 30, 3)), label.numpy())
    data = SegmentationDataset([item], Classes.generic(5), 16)
    assert torch.equal(data[0].global_label, shrink_label(label, (4, 4)))
    data.full_labels = True
    assert torch.equal(data[0].global_label, shrink_label(label, (16, 16)))
