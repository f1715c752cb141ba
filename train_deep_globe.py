"""Trains and evaluates GLNet on DeepGlobe: global only (mode 1), global to local (2), local to global (3)."""

import argparse
import logging
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import helper
from dataset.base import EpochSampler, Sample, SampleLoader
from dataset.deep_globe import DEEP_GLOBE, SPLITS, UNLABELLED, DeepGlobe
from models import checkpoint
from models.backbone import BACKBONES, backbone_weights
from models.checkpoint import Checkpoint, Header
from models.glnet import GLNet
from utils import options as command_line
from utils.classes import Classes
from utils.errors import InputError
from utils.logger import RunLog
from utils.patches import STATISTICS, Settings
from utils.report import evaluation_record, evaluation_table, peak_memory_mb, write_json
from utils.schedule import poly
from utils.stages import STAGES, Stage
from utils.visualize import colorize, save_colors

WEIGHT_DECAY = 5e-4


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, or 2 where the input is at fault."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = command_line.build_parser(BACKBONES, tuple(STATISTICS), SPLITS)
    options = parser.parse_args(arguments)
    try:
        command_line.check(options)
        run(options)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def run(options: argparse.Namespace) -> None:
    """Build everything that the options name, then train or evaluate."""
    torch.manual_seed(options.seed)
    stage = STAGES[options.mode]
    device = pick_device(options.device)
    files = read_checkpoints(options, stage)
    header = resolve(options, stage, files)
    settings = Settings(
        size_p=header.size_p,
        sub_batch_size=options.sub_batch_size,
        min_overlap=header.min_overlap,
        lamb_fmreg=options.lamb_fmreg,
        normalize=header.normalize,
        device=device,
    )
    if options.evaluation:
        data = DeepGlobe(options.data_path, options.split, header.size_g, header.classes)
        model = build_model(options, stage, header, files)
        place(model, stage, device)
        run_evaluation(options, stage, model, header, settings, data)
    else:
        train_data = DeepGlobe(
            options.data_path, "train", header.size_g, header.classes, augment=True, seed=options.seed
        )
        val_data = DeepGlobe(options.data_path, "crossvali", header.size_g, header.classes)
        model = build_model(options, stage, header, files)
        place(model, stage, device)
        run_training(options, stage, model, header, settings, train_data, val_data)


def pick_device(name: str | None) -> torch.device:
    """The device called `name`, or the best there is."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def read_checkpoints(options: argparse.Namespace, stage: Stage) -> dict[str, Checkpoint]:
    """The files that this run reads, by option: what it evaluates or starts from, and stage 1's for the context."""
    names = [stage.reads] if options.evaluation else list(stage.starts_from)
    files = {name: checkpoint.read(options.model_path / getattr(options, name)) for name in names}
    if stage.number == 3 and options.path_g:
        # a file of ours holds its own context: stage 1's is read only for a released one, and to train
        if not options.evaluation or files["path_l2g"].header is None:
            files["path_g"] = checkpoint.read(options.model_path / options.path_g)
    elif stage.number == 3 and options.evaluation and files["path_l2g"].header is None:
        raise InputError(
            f"{files['path_l2g'].path} is a released file, which lacks the frozen global branch: "
            "evaluating mode 3 needs --path_g, the file of mode 1, too"
        )
    output = options.model_path / f"{options.task_name}.pth"
    if not options.evaluation and any(file.path == output for file in files.values()):
        raise InputError(f"--task_name {options.task_name} would overwrite {output}, which this run starts from")
    return files


def resolve(options: argparse.Namespace, stage: Stage, files: dict[str, Checkpoint]) -> Header:
    """What this run's network is: options that are given, else what the checkpoint records, else the defaults.

    Raises InputError where a given option contradicts the checkpoint's network.
    """
    first = next(iter(files.values()), None)
    recorded = {} if first is None or first.header is None else vars(first.header)
    if recorded:
        recorded = {**recorded, "n_class": len(recorded["classes"])}
    for name, default in command_line.FROM_CHECKPOINT.items():
        given = getattr(options, name)
        if given is None:
            setattr(options, name, recorded.get(name, default))
        elif recorded and given != recorded[name]:
            if name in ("backbone", "n_class"):
                raise InputError(f"--{name} {given}: {first.path} was made with {recorded[name]}")
            logging.info(f"note: --{name} {given}; {first.path} was made with {recorded[name]}")
    command_line.check_sizes(options)
    classes = recorded.get("classes") or (
        DEEP_GLOBE if options.n_class == len(DEEP_GLOBE) else Classes.generic(options.n_class)
    )
    return Header(
        stage=stage.number,
        backbone=options.backbone,
        classes=classes,
        size_g=options.size_g,
        size_p=options.size_p,
        min_overlap=options.min_overlap,
        normalize=options.normalize,
    )


def build_model(options: argparse.Namespace, stage: Stage, header: Header, files: dict[str, Checkpoint]) -> GLNet:
    """The network as `stage` evaluates it or starts to train it."""
    model = GLNet(len(header.classes), header.backbone)
    if options.evaluation:
        checkpoint.load_whole(model, files[stage.reads], stage.number)
    elif stage.number == 1:
        state = backbone_weights(header.backbone, options.backbone_weights)
        for branch in (model.global_, model.local) if state is not None else ():
            checkpoint.load(branch.backbone, state, Path(options.backbone_weights), ("",))
    else:
        checkpoint.load_whole(model, files[stage.starts_from[0]], stage.number - 1)
    if stage.number == 3 and not options.evaluation:
        model.start_refined()
    if stage.number == 3 and "path_g" in files:
        checkpoint.load_context(model, files["path_g"])
    model.learn(() if options.evaluation else stage.trains)
    return model


def place(model: GLNet, stage: Stage, device: torch.device) -> None:
    """Move the branches that `stage` uses to `device`; the others stay on the host."""
    for name in stage.uses:
        getattr(model, name).to(device)


def run_training(
    options: argparse.Namespace,
    stage: Stage,
    model: GLNet,
    header: Header,
    settings: Settings,
    train_data: DeepGlobe,
    val_data: DeepGlobe,
) -> None:
    """Train all epochs, validate after each, keep the last and the best."""
    sampler = EpochSampler(len(train_data), options.seed)
    loader = SampleLoader(train_data, options.batch_size, sampler, options.num_workers)
    val_loader = SampleLoader(val_data, num_workers=options.num_workers)
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(learned, lr=options.lr, weight_decay=WEIGHT_DECAY)
    steps = len(loader) * options.num_epochs
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: poly(t, steps))
    last, best = (options.model_path / f"{options.task_name}{ending}" for ending in (".pth", ".best.pth"))
    best_score, best_epoch = -1.0, 0
    logging.info(
        f"Stage {stage.number} ({stage.name}): {len(train_data)} training and {len(val_data)} validation images, "
        f"{options.num_epochs} epochs on {settings.device}, training {' and '.join(stage.trains)}"
    )
    with RunLog(options.log_path, options.task_name, header.classes) as log:
        step = 0

        def on_step(values: dict[str, float]) -> None:
            nonlocal step
            log.scalars(step, values)
            step += 1

        for epoch in range(options.num_epochs):
            sampler.set_epoch(epoch)
            title = f"epoch {epoch + 1}/{options.num_epochs}"
            trained = helper.train_one_epoch(model, stage, loader, optimizer, scheduler, settings, on_step, title)
            show = picture_of(epoch % len(val_data), log, epoch, header.classes)
            found = helper.evaluate(model, stage, val_loader, settings, show, "validate").tally
            log.epoch(epoch, options.num_epochs, trained.matrices, found.matrices)
            scores = [tally.matrices[tally.headline].mean_iou(header.classes.left_out) for tally in (trained, found)]
            logging.info(f"{title}: mIoU {100 * scores[0]:.2f} training, {100 * scores[1]:.2f} validation")
            if epoch == 0:
                checkpoint.keep_previous(last)
                checkpoint.keep_previous(best)
            checkpoint.save(last, model, header)
            if scores[1] > best_score:
                best_score, best_epoch = scores[1], epoch + 1
                checkpoint.save(best, model, header)
    logging.info(
        f"Best validation mIoU {100 * best_score:.2f} in epoch {best_epoch}: {best}\n"
        f"Last: {last}\nLog: {log.text}\nTensorBoard: tensorboard --logdir {log.folder}"
    )


def picture_of(index: int, log: RunLog, epoch: int, classes: Classes) -> Callable[[Sample, dict[str, Tensor]], None]:
    """A callback that shows the validation image of `index`: each epoch another one, as released."""
    seen = 0

    def show(sample: Sample, found: dict[str, Tensor]) -> None:
        nonlocal seen
        if seen == index:
            names = {"ensemble": "prediction", "local": "prediction_local", "global": "prediction_global"}
            pictures = {"image": sample.image.permute(1, 2, 0).numpy()}
            if sample.label is not None:
                pictures["mask"] = colorize(sample.label.numpy(), classes.palette)
            pictures |= {names[name]: colorize(ids.cpu().numpy(), classes.palette) for name, ids in found.items()}
            log.images(epoch, pictures)
        seen += 1

    return show


def run_evaluation(
    options: argparse.Namespace,
    stage: Stage,
    model: GLNet,
    header: Header,
    settings: Settings,
    data: DeepGlobe,
) -> None:
    """Evaluate one split; print the table, write it as JSON, and the predictions where asked."""

    def save(sample: Sample, found: dict[str, Tensor]) -> None:
        if options.save_predictions:
            ids: np.ndarray = found[stage.predictions[-1]].cpu().numpy()
            save_colors(options.save_predictions / f"{sample.id}_mask.png", ids, header.classes.palette)

    loader = SampleLoader(data, num_workers=options.num_workers)
    result = helper.evaluate(model, stage, loader, settings, save, f"evaluate {options.split}")
    if options.save_predictions:
        logging.info(f"Predictions: {options.save_predictions}")
    if options.split == UNLABELLED:
        return
    record = evaluation_record(
        stage.number,
        header.classes,
        result.tally.matrices,
        result.images,
        result.seconds_per_image,
        peak_memory_mb(settings.device),
    )
    target = options.log_path / f"{options.task_name}.json"
    write_json(target, record)
    print(evaluation_table(record))
    logging.info(f"The same as JSON: {target}")


if __name__ == "__main__":
    sys.exit(main())
