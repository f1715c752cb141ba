"""Trains a usual network on patches by GLNet's data path, loss and schedule: python -m experiments.baselines --help

The networks are those of the package segmentation_models_pytorch. They see patches of `--size_p` pixels with overlap,
and nothing of the image around them, unless `--scores_of` adds what a network of stage 1 finds in the shrunk image.
Encoders start from `--backbone_weights`, as GLNet's do; scores of overlapping patches are added, as GLNet's are. The
result is an evaluation's JSON file with the confusion matrix of every image, in which the prediction is called
"global", as there is only one.

`--model glnet` evaluates GLNet itself for the same file. `--late_fusion` replaces the ensemble of stage 2 by the mean
of the softmaxes of its global and its local prediction: late fusion, if the branches were trained without sharing.
"""

import json
import logging
import sys
import time
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from dataset.base import Sample, SegmentationDataset
from dataset.layout import TRAIN
from dataset.loader import BatchPart, EpochSampler, SampleLoader
from dataset.registry import Description
from engine.patches import ImagePatches, TrainingPatches, computed_together, joint_sub_batches
from engine.predictor import Predictor
from evaluation.report import evaluation_table
from evaluation.run import SegmentsImages, evaluate_images
from imaging.sources import Source
from models.backbone import build_backbone
from models.header import Header
from models.timm_backbone import PREFIX
from prediction.segmenter import Segmenter
from training import options as command_line
from training import setup
from training.average import WeightAverage
from training.optimizer import build_optimizer, build_schedule
from utils.arguments import Parser
from utils.canvas import RESULT_ROWS, FiniteScores, Sink
from utils.classes import Classes
from utils.distributed import pick_device
from utils.errors import InputError, exit_code, required
from utils.files import load_torch, save_torch, write_json
from utils.memory import keep_freed_memory
from utils.metrics import ConfusionMatrix, StageMetrics
from utils.precision import autocast
from utils.selection import Coverage
from utils.settings import ContextScale, Settings, TrainingSettings
from utils.stages import STAGES, Stage
from utils.tiling import Size, map_size

GLNET = "glnet"
MODELS = {"unet": "Unet", "deeplab": "DeepLabV3Plus", "fpn": "FPN"}
"""The package's names by `--model`."""

MULTIPLE = 32
"""What the sides of the package's inputs are multiples of."""


def build_parser() -> Parser:
    """Return the parser of `train_deep_globe.py` with `--model`; on others than GLNet its own options do nothing."""
    parser = command_line.build_parser()
    parser.prog, parser.description = "python -m experiments.baselines", (__doc__ or "").splitlines()[0]
    add = parser.group("baseline")
    models = (*MODELS, GLNET)
    add("--model", choices=models, default="unet", help=f"{GLNET} is evaluated only (default: %(default)s)")
    help_ = f"--model {GLNET}, mode 2: the mean of both branches' softmaxes takes the ensemble's place"
    add("--late_fusion", action="store_true", help=help_)
    help_ = (
        "checkpoint of stage 1 inside --model_path: its scores of the whole image, enlarged and cropped to each\n"
        "patch, are further input channels"
    )
    add("--scores_of", metavar="FILE", help=help_)
    return parser


def build_network(model: str, backbone: str, n_class: int, weights: str = "none", further: int = 0) -> nn.Module:
    """Build a network that gives logits (N, n_class, h, w) of (N, 3 + further, h, w).

    `backbone` and `weights` are as GLNet's options. The encoder's first convolution reads `further` input channels
    after the image's, with zeros at first.

    Raises:
        InputError: the package is missing, or the weights cannot be used.
    """
    try:
        import segmentation_models_pytorch as smp  # type: ignore[import-untyped]
    except ImportError as error:
        raise InputError("experiments.baselines needs a package: pip install segmentation-models-pytorch") from error
    timm = backbone.startswith(PREFIX)
    name = f"tu-{backbone.removeprefix(PREFIX)}" if timm else backbone
    network: Any = getattr(smp, MODELS[model])(name, encoder_weights=None, in_channels=3 + further, classes=n_class)
    if weights != "none":
        state = build_backbone(backbone, weights).state_dict()
        if timm:
            state = {name.replace("net.", "model.", 1): tensor for name, tensor in state.items()}
        for name, own in network.encoder.state_dict().items():
            if further and own.dim() == 4 and own.shape[1] == 3 + further and state[name].shape[1] == 3:
                state[name] = F.pad(state[name], (0, 0, 0, 0, 0, further))
        network.encoder.load_state_dict(state)
    built: nn.Module = network
    return built


class GlobalScores:
    """What a network of stage 1 finds in the shrunk image: softmaxes, enlarged to the image."""

    def __init__(self, path: Path, settings: Settings) -> None:
        """Load the network. Raises InputError if the file cannot be used."""
        segmenter = Segmenter.from_checkpoint(path, device=settings.device, mode=1, precision=settings.precision)
        self.network, self.settings = segmenter.predictor.network, segmenter.predictor.settings

    @torch.no_grad()
    def of(self, global_image: Tensor, size: Size) -> Tensor:
        """Return the scores (n_class, H, W) of an image of `size`; `global_image` is (3, size_g, size_g) uint8."""
        x = self.settings.to_input(global_image[None])
        maps = self.network.global_maps(x, logits=True, context=False, ensemble=False)
        scores = required(maps.logits, "logits").float().softmax(1)
        return F.interpolate(scores, size, mode="bilinear")[0]


def with_scores(image: ImagePatches, patches: slice, x: Tensor, scores: Tensor | None) -> Tensor:
    """Return patches `x` (n, 3, h, w) of an image, with the crops of `scores` (n_class, H, W) as further channels."""
    if scores is None:
        return x
    return torch.cat([x, torch.stack([box.of(scores) for box in image.boxes[patches]]).to(x)], 1)


def padded(network: nn.Module, x: Tensor) -> Tensor:
    """Return the logits (N, n_class, H, W) of `x` (N, 3, H, W), whose sides are padded with zeros as far as needed."""
    height, width = map_size(x)
    x = F.pad(x, (0, -width % MULTIPLE, 0, -height % MULTIPLE))
    return network(x)[..., :height, :width]


def training_step(
    network: nn.Module, batch: list[Sample], settings: TrainingSettings, scores_of: GlobalScores | None
) -> list[float]:
    """Compute the gradients of a batch of images; return the loss of each sub-batch of their patches."""
    losses = []
    for samples in computed_together(batch, settings):
        images = [TrainingPatches(sample, settings) for sample in samples]
        for image in images:
            image.keep(image.draw())
        scores = [
            None if scores_of is None else scores_of.of(sample.global_image, image.size)
            for sample, image in zip(samples, images, strict=True)
        ]
        for chosen in joint_sub_batches(images, settings.sub_batch_size):
            x = torch.cat([with_scores(images[k], patches, x, scores[k]) for k, patches, x in chosen])
            with autocast(settings.device, settings.precision):
                logits = padded(network, x).float()
                target = torch.cat([images[k].targets(patches, logits) for k, patches, _ in chosen])
                loss = settings.loss(logits, target)
            loss.backward()
            losses.append(float(loss.detach()))
    return losses


@dataclass(frozen=True)
class PatchPredictor:
    """A network in evaluation mode that segments an image patch by patch; its prediction is called "global"."""

    network: nn.Module
    settings: Settings
    scores_of: GlobalScores | None = None
    stage: Stage = STAGES[1]
    context: ContextScale | None = None  # patches see nothing around them

    @torch.inference_mode()
    def segment(
        self, image: Source, sinks: Mapping[str, Sink], *, check: FiniteScores | None = None, **images: Tensor | None
    ) -> Coverage:
        """Segment one image; its shrunk image is read for `scores_of` only. The rest is as in `Predictor.segment`."""
        patches = ImagePatches(image, self.settings, check=check)
        canvas = patches.canvas(sinks["global"])
        shrunk = images.get("global_image")
        further = self.scores_of.of(required(shrunk, "shrunk image"), image.size) if self.scores_of else None
        for which, x in patches:
            with autocast(self.settings.device, self.settings.precision):
                logits = padded(self.network, with_scores(patches, which, x, further))
            canvas.add(logits.float(), which)
        return patches.coverage()


class LateFusion:
    """A network of stage 2 or 3 whose ensemble is the mean of the softmaxes of its global and its local prediction."""

    def __init__(self, predictor: Predictor) -> None:
        self.predictor, self.stage, self.settings = predictor, predictor.stage, predictor.settings

    def segment(self, image: Source, sinks: Mapping[str, Sink], **images: Any) -> Coverage:
        """Segment one image; the parameters are those of `Predictor.segment`. `sinks` are all predictions of a stage.

        Local scores are means over the patches that cover a pixel, before their softmax.
        """
        totals: list[Tensor] = []  # one, (n_class, H, W), when the first rows are known

        def adding(sink: Sink) -> Sink:
            def take(top: int, scores: Tensor) -> None:
                if not totals:
                    totals.append(scores.new_zeros((len(scores), *image.size), dtype=torch.float32))
                totals[0][:, top : top + scores.shape[1]] += scores.float().softmax(0)
                sink(top, scores)

            return take

        own = {name: adding(sinks[name]) for name in ("global", "local")}
        coverage = self.predictor.segment(image, own, means=True, **images)
        for top in range(0, image.size[0], RESULT_ROWS):
            sinks["ensemble"](top, totals[0][:, top : top + RESULT_ROWS] / len(own))
        return coverage


def score_images(predictor: SegmentsImages, data: SegmentationDataset, classes: Classes) -> dict[str, Any]:
    """Evaluate all images of `data`, which has labels, and print the table of scores.

    Returns:
        The record of `evaluation.report.evaluation_record`, and `matrices`: by prediction and id the confusion
        matrix of an image, row by row; rows are the truth.
    """
    matrices: dict[str, dict[str, list[int]]] = {name: {} for name in predictor.stage.predictions}

    def count(sample: Sample, found: dict[str, Tensor]) -> None:
        label = predictor.settings.to_device(required(sample.label, "label"))
        for name, ids in found.items():
            matrices[name][sample.id] = ConfusionMatrix(len(classes)).update(label, ids).flatten().tolist()

    metrics = StageMetrics(predictor.stage, classes)
    result = evaluate_images(predictor, SampleLoader(data), metrics, on_image=count)
    record = result.record(predictor, classes)
    print(evaluation_table(record))
    return {**record, "matrices": matrices}


def train(
    network: nn.Module,
    options: Namespace,
    header: Header,
    described: Description,
    settings: TrainingSettings,
    scores_of: GlobalScores | None,
) -> WeightAverage | None:
    """Train with GLNet's optimizer, schedule and samples; write a line of the log after each epoch.

    Return the average of the weights, with `--ema`.
    """
    data = setup.open_data(options, described, TRAIN, header, training=True)
    parts = BatchPart(EpochSampler(len(data), options.seed), options.batch_size)
    loader = SampleLoader(data, sampler=parts, num_workers=options.num_workers, persistent=True)
    optimizer = build_optimizer(network, options.lr)
    average = WeightAverage(network, options.ema, optimizer) if options.ema else None
    scheduler = build_schedule(optimizer, parts.batches * options.num_epochs)
    log = options.log_path / f"{options.task_name}.jsonl"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    network.train()
    for epoch in range(1, options.num_epochs + 1):
        parts.set_epoch(epoch - 1)
        start, loss = time.perf_counter(), 0.0
        losses: list[float] = []
        bar = tqdm(loader, desc=f"epoch {epoch}/{options.num_epochs}", unit="batch", dynamic_ncols=True)
        for batch in bar:
            optimizer.zero_grad(set_to_none=True)
            losses += training_step(network, batch, settings, scores_of)
            optimizer.step()
            scheduler.step()
            loss = sum(losses) / len(losses)
            bar.set_postfix(loss=f"{loss:.3f}")
        with log.open("a") as file:
            file.write(json.dumps({"epoch": epoch, "loss": loss, "seconds": time.perf_counter() - start}) + "\n")
    loader.close()
    return average


def evaluate_glnet(options: Namespace, described: Description, device: torch.device) -> None:
    """Evaluate GLNet, and write `LOG_PATH/TASK_NAME.json`."""
    command_line.check(options)
    if not options.evaluation:
        raise InputError(f"--model {GLNET} goes with --evaluation: train_deep_globe.py trains it")
    if options.late_fusion and options.mode != 2:
        raise InputError(f"--late_fusion fuses both branches of mode 2 and does nothing in mode {options.mode}")
    plan = setup.plan_evaluation(options, described, device)
    chosen = LateFusion(plan.predictor) if options.late_fusion else plan.predictor
    write_json(options.log_path / f"{options.task_name}.json", score_images(chosen, plan.data, plan.header.classes))


def run_baseline(options: Namespace, described: Description, device: torch.device) -> None:
    """Train and save a network of the package, or with `--evaluation` evaluate it."""
    if options.late_fusion:
        raise InputError(f"--late_fusion goes with --model {GLNET}")
    options, header = setup.resolve(options, {}, described)
    torch.manual_seed(options.seed)
    settings = setup.evaluation_settings(options, header, device)
    n_class = len(header.classes)
    scores_of = GlobalScores(options.model_path / options.scores_of, settings) if options.scores_of else None
    weights = "none" if options.evaluation else options.backbone_weights
    network = build_network(options.model, header.backbone, n_class, weights, n_class if scores_of else 0).to(device)
    if settings.precision != "fp32":
        network = network.to(memory_format=torch.channels_last)
    if not options.evaluation:
        training = setup.training_settings(options, header, device)
        average = train(network, options, header, described, training, scores_of)
        save_torch(options.model_path / f"{options.task_name}.pth", network.state_dict())
        if average is not None:
            with average.applied():
                save_torch(options.model_path / f"{options.task_name}.ema.pth", network.state_dict())
        return
    network.load_state_dict(load_torch(options.model_path / options.path_g))
    predictor = PatchPredictor(network.eval(), settings, scores_of)
    data = setup.open_data(options, described, options.split, header)
    record = score_images(predictor, data, header.classes)
    write_json(options.log_path / f"{options.task_name}.json", {"model": options.model, **record})


def work(options: Namespace) -> None:
    """Do what the options ask for."""
    described = setup.described_by(options)
    if options.evaluation:
        options.split = described.labelled_split(options.split)
    device = pick_device(options.device)
    keep_freed_memory()
    (evaluate_glnet if options.model == GLNET else run_baseline)(options, described, device)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit code: 0, or 2 if the input is at fault."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return exit_code(lambda: work(build_parser().parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
