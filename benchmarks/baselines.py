"""Trains a usual network on patches by GLNet's data path, loss and schedule: python -m benchmarks.baselines --help

The networks are those of the package segmentation_models_pytorch. They see patches of `--size_p` pixels with overlap,
and nothing of the image around them; scores of overlapping patches are added, as GLNet's are. The result is an
evaluation's JSON file, in which the prediction is called "global", as there is only one.
"""

import json
import sys
import time
from argparse import Namespace
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import helper
from dataset.base import Sample
from dataset.layout import TRAIN, SplitChoice
from dataset.loader import BatchPart, EpochSampler, SampleLoader
from dataset.registry import Description, describe
from engine.patches import ImagePatches, TrainingPatches
from models.header import Header
from training import options as command_line
from training import setup
from training.memory import keep_freed_memory, peak_memory_mb
from training.report import evaluation_record, evaluation_table
from training.run import WEIGHT_DECAY, poly
from utils.arguments import Parser
from utils.canvas import FiniteScores, Sink
from utils.distributed import pick_device
from utils.errors import InputError, exit_code
from utils.files import load_torch, save_torch, write_json
from utils.metrics import StageMetrics
from utils.precision import autocast
from utils.selection import Coverage
from utils.settings import Settings
from utils.sources import Source
from utils.stages import STAGES, Stage
from utils.tiling import map_size

MODELS = {"unet": "Unet", "deeplab": "DeepLabV3Plus", "fpn": "FPN"}
"""The package's names by `--model`."""

MULTIPLE = 32
"""What the sides of the package's inputs are multiples of."""


def build_parser() -> Parser:
    """Return the parser of `train_deep_globe.py` with `--model`; options that GLNet alone has do nothing."""
    parser = command_line.build_parser()
    parser.prog, parser.description = "python -m benchmarks.baselines", (__doc__ or "").splitlines()[0]
    parser.group("baseline")("--model", choices=tuple(MODELS), default="unet", help="default: %(default)s")
    return parser


def build_network(model: str, backbone: str, n_class: int) -> nn.Module:
    """Return a network that gives logits (N, n_class, h, w) of (N, 3, h, w). InputError without the package."""
    try:
        import segmentation_models_pytorch as smp  # type: ignore[import-untyped]
    except ImportError as error:
        raise InputError("benchmarks.baselines needs a package: pip install segmentation-models-pytorch") from error
    return getattr(smp, MODELS[model])(backbone, encoder_weights=None, classes=n_class)


def padded(network: nn.Module, x: Tensor) -> Tensor:
    """Return the logits (N, n_class, H, W) of `x` (N, 3, H, W), whose sides are padded with zeros as far as needed."""
    height, width = map_size(x)
    x = F.pad(x, (0, -width % MULTIPLE, 0, -height % MULTIPLE))
    return network(x)[..., :height, :width]


def train_one_epoch(
    network: nn.Module,
    loader: Iterable[list[Sample]],
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    settings: Settings,
    title: str,
) -> float:
    """Train on every batch, one optimizer step for each; return the mean loss of a sub-batch of patches."""
    network.train()
    total, count = 0.0, 0
    bar = tqdm(loader, desc=title, unit="batch", dynamic_ncols=True)
    for batch in bar:
        optimizer.zero_grad(set_to_none=True)
        for sample in batch:
            image = TrainingPatches(sample, settings)
            for patches, x in image:
                with autocast(settings.device, settings.precision):
                    logits = padded(network, x).float()
                    loss = settings.loss(logits, image.targets(patches, logits))
                loss.backward()
                total, count = total + float(loss.detach()), count + 1
        optimizer.step()
        scheduler.step()
        bar.set_postfix(loss=f"{total / count:.3f}")
    return total / max(1, count)


@dataclass(frozen=True)
class PatchPredictor:
    """A network that segments an image patch by patch, for `helper.evaluate`; its prediction is called "global".

    Attributes:
        network: in evaluation mode.
        settings: patches, device, precision.
        stage: gives the prediction its name.
    """

    network: nn.Module
    settings: Settings
    stage: Stage = STAGES[1]

    @torch.inference_mode()
    def segment(
        self,
        image: Source,
        sinks: Mapping[str, Sink],
        *,
        global_image: Tensor | None = None,
        check: FiniteScores | None = None,
    ) -> Coverage:
        """Segment one image; `global_image` is not read. The rest is as in `Predictor.segment`."""
        patches = ImagePatches(image, self.settings, check=check)
        canvas = patches.canvas(sinks["global"])
        for which, x in patches:
            with autocast(self.settings.device, self.settings.precision):
                scores = padded(self.network, x)
            canvas.add(scores.float(), which)
        return patches.coverage()


def train(network: nn.Module, options: Namespace, header: Header, described: Description, settings: Settings) -> None:
    """Train with GLNet's optimizer, schedule and samples; write a line of the log after each epoch."""
    data = setup.open_data(options, described, TRAIN, header, training=True)
    parts = BatchPart(EpochSampler(len(data), options.seed), options.batch_size)
    loader = SampleLoader(data, sampler=parts, num_workers=options.num_workers, persistent=True)
    optimizer = torch.optim.Adam(network.parameters(), lr=options.lr, weight_decay=WEIGHT_DECAY)
    steps = parts.batches * options.num_epochs
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: poly(t, steps))
    log = options.log_path / f"{options.task_name}.jsonl"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    for epoch in range(options.num_epochs):
        parts.set_epoch(epoch)
        start = time.perf_counter()
        title = f"epoch {epoch + 1}/{options.num_epochs}"
        loss = train_one_epoch(network, loader, optimizer, scheduler, settings, title)
        with log.open("a") as file:
            file.write(json.dumps({"epoch": epoch + 1, "loss": loss, "seconds": time.perf_counter() - start}) + "\n")
    loader.close()


def work(options: Namespace) -> None:
    """Train and save a network, or with `--evaluation` evaluate it."""
    described = describe(options.dataset, options.data_path, SplitChoice(options.split_lists, options.split_seed))
    header = setup.resolve(options, {}, described)
    device = pick_device(options.device)
    keep_freed_memory()
    torch.manual_seed(options.seed)
    settings = setup.build_settings(options, header, device)
    network = build_network(options.model, header.backbone, len(header.classes)).to(device)
    if options.precision != "fp32":
        network = network.to(memory_format=torch.channels_last)
    if not options.evaluation:
        train(network, options, header, described, settings)
        save_torch(options.model_path / f"{options.task_name}.pth", network.state_dict())
        return
    network.load_state_dict(load_torch(options.model_path / options.path_g))
    predictor = PatchPredictor(network.eval(), settings)
    loader = SampleLoader(setup.open_data(options, described, options.split, header))
    found = helper.evaluate(predictor, loader, StageMetrics(predictor.stage, header.classes))
    record = evaluation_record(
        0,
        header.classes,
        found.metrics.matrices,
        images=found.images,
        seconds_per_image=found.seconds_per_image,
        peak_memory_mb=peak_memory_mb(device),
    )
    print(evaluation_table(record))
    write_json(options.log_path / f"{options.task_name}.json", {"model": options.model, **record})


def main(arguments: list[str] | None = None) -> int:
    return exit_code(lambda: work(build_parser().parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
