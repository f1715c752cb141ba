"""Trains and evaluates GLNet: global only (mode 1), global to local (2), local to global (3)."""

import argparse
import logging
import os
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import helper
from dataset.base import Sample, SampleLoader, SegmentationDataset
from dataset.check import Problem, check
from dataset.layout import TRAIN, SplitChoice, shortened
from dataset.reading import MAX_PIXELS
from dataset.registry import NAMES, Description, describe
from models import checkpoint
from models.backbone import BACKBONES, backbone_weights
from models.checkpoint import Checkpoint, Header
from models.glnet import GLNet
from models.inference import PreparedGLNet
from resuming import source
from segmenting import segment_averaged
from training import Job, Training
from utils import distributed
from utils import options as command_line
from utils.classes import Classes
from utils.distributed import Ranks
from utils.errors import InputError, Interrupted, RunError
from utils.faults import explain
from utils.files import check_writable
from utils.loss import Loss, build_loss, check_class_weights
from utils.patches import STATISTICS, Settings
from utils.precision import gradient_scaler, keep_freed_memory, set_switches
from utils.report import evaluation_record, evaluation_table, peak_memory_mb, write_json
from utils.stages import STAGES, Stage
from utils.tally import Tally
from utils.turns import TURNS
from utils.visualize import save_colors


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    0: done; 1: the run failed; 2: the input is at fault; 128 + n: signal n stopped it, and it can be resumed.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = command_line.build_parser(BACKBONES, tuple(STATISTICS), NAMES)
    options = parser.parse_args(arguments)
    processes = int(os.environ.get("WORLD_SIZE", 1))
    try:
        command_line.check(options)
        run(options)
    except InputError as error:
        return complain(error, 2)
    except RunError as error:
        return complain(error, 1)
    except Interrupted as error:
        print(error, file=sys.stderr)
        return 128 + error.number
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (RuntimeError, MemoryError) as error:
        message = explain(error, options, processes)
        if message is None:
            raise
        return complain(message, 1)
    return 0


def complain(message: object, code: int) -> int:
    """Print `message` as the one line that a failure gives, with this process's number where there are several."""
    rank = os.environ.get("RANK", "0") if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
    print(f"error: {f'process {rank}: ' if rank else ''}{message}", file=sys.stderr)
    return code


def run(options: argparse.Namespace) -> None:
    """Do what the options say."""
    described = describe(options.dataset, options.data_path, SplitChoice(options.split_lists, options.split_seed))
    if options.check_data:
        check_data(options, described)
        return
    ranks = distributed.start(options.device)
    if not ranks.main:
        logging.getLogger().setLevel(logging.ERROR)
    keep_freed_memory()
    torch.manual_seed(options.seed)
    if options.deterministic:
        be_deterministic()
    prepare_and_run(options, described, ranks)
    distributed.stop()


def be_deterministic() -> None:
    """Let torch take operations that repeat bit by bit, and warn where it has none."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False


def check_data(options: argparse.Namespace, described: Description) -> None:
    """Read every file of every split once and print what is found; InputError where something is wrong."""
    opened, problems = {}, []
    for split in described.splits:
        try:
            opened[split] = open_data(options, described, split, 4, described.classes_for(options.n_class))
        except InputError as error:
            # a data set may lack the splits that training does not need
            if split in (TRAIN, described.validation) or error.kind != "empty split":
                problems.append(Problem(split, error.kind, str(error)))
    report = check(opened, options.num_workers)
    print(report.text(problems))
    if count := len(problems) + len(report.problems):
        raise InputError(f"{count} of the files above cannot be used" if count > 1 else "one file above cannot be used")


def prepare_and_run(options: argparse.Namespace, described: Description, ranks: Ranks) -> None:
    """Build everything that the options name, then train or evaluate."""
    stage = STAGES[options.mode]
    going_on = not options.evaluation and source(options) is not None
    files = read_checkpoints(options, stage)
    header = resolve(options, stage, files, described)
    settings = header.settings(
        options.box_recall,
        sub_batch_size=options.sub_batch_size,
        loss=chosen_loss(options, header.classes, ranks.device),
        lamb_fmreg=options.lamb_fmreg,
        device=ranks.device,
        precision=options.precision,
        scaler=gradient_scaler(ranks.device, options.precision),
    )
    set_switches(options.tf32, options.cudnn_benchmark)
    if options.evaluation:
        data = open_data(options, described, options.split, header.size_g, header.classes)
        network = helper.prepare(build_model(options, stage, header, files), stage, settings)
        files.clear()  # the prepared network is a copy: one of them on the host is enough
        labelled = options.split not in described.unlabelled
        run_evaluation(options, stage, network, header, settings, data, labelled, ranks)
    else:
        train_data = open_data(options, described, TRAIN, header.size_g, header.classes, augment=True)
        val_data = open_data(options, described, described.validation, header.size_g, header.classes)
        model = build_model(options, stage, header, files)
        if stage.number == 1 and not going_on:
            start_weights(model, header, files, options.backbone_weights)
        place(model, stage, ranks.device)
        if options.sync_bn:
            join_norms(model, stage, ranks)
        Training(Job(options, stage, model, header, settings, train_data, val_data, ranks)).run()


def chosen_loss(options: argparse.Namespace, classes: Classes, device: torch.device) -> Loss:
    """The loss that the options name."""
    weights = options.class_weights
    if weights is not None:
        weights = check_class_weights(weights, classes.names).to(device)
    return build_loss(options.loss, options.gamma, weights)


def open_data(
    options: argparse.Namespace,
    described: Description,
    split: str,
    size_g: int,
    classes: Classes,
    augment: bool = False,
) -> SegmentationDataset:
    """The images of `split`."""
    data = described.open(split, size_g, classes, augment=augment, seed=options.seed)
    data.max_pixels = options.max_pixels or MAX_PIXELS
    return data


def join_norms(model: GLNet, stage: Stage, ranks: Ranks) -> None:
    """Let the norm layers that `stage` trains take their statistics over all processes; names stay what they are."""
    if ranks.device.type != "cuda" or stage.number == 2:
        reason = "mode 2 normalises every sub-batch alone" if stage.number == 2 else "torch has it for GPUs only"
        raise InputError(f"--sync_bn cannot be used: {reason}; leave it out")
    for name in stage.trains:
        setattr(model, name, nn.SyncBatchNorm.convert_sync_batchnorm(getattr(model, name)))


def read_checkpoints(options: argparse.Namespace, stage: Stage) -> dict[str, Checkpoint]:
    """The files that this run reads, by option: what it evaluates or starts from, and stage 1's for the context."""
    names = [stage.reads] if options.evaluation else list(stage.starts_from)
    files = {name: checkpoint.read(options.model_path / getattr(options, name)) for name in names}
    if options.init_from:
        files["init_from"] = checkpoint.read(options.init_from)
    path_g = options.model_path / options.path_g if options.path_g else None
    if options.evaluation:
        context = checkpoint.read_context(files[stage.reads], stage.number, path_g)
    else:
        context = checkpoint.read(path_g) if stage.number == 3 and path_g else None
    if context is not None:
        files["path_g"] = context
    outputs = [options.model_path / f"{options.task_name}{ending}" for ending in (".pth", ".best.pth")]
    for output in () if options.evaluation else outputs:
        if any(file.path.resolve() == output.resolve() for file in files.values()):
            raise InputError(f"--task_name {options.task_name} would overwrite {output}, which this run starts from")
    return files


def resolve(options: argparse.Namespace, stage: Stage, files: dict[str, Checkpoint], described: Description) -> Header:
    """What this run's network is: options that are given, else what the checkpoint records, else the defaults.

    Of the file that mode 1 starts from, its weights' backbone and normalisation are taken, and no more. Raises
    InputError where a given option contradicts the checkpoint's network, and where the data set has other classes.
    """
    first = next(iter(files.values()), None)
    recorded = {} if first is None or first.header is None else vars(first.header)
    if recorded and "init_from" in files:
        recorded = {name: recorded[name] for name in ("backbone", "normalize")}
    elif recorded:
        recorded = {**recorded, "n_class": len(recorded["classes"])}
    own = {"n_class": len(described.classes), "size_p": described.size_p}
    for name, default in {**command_line.FROM_CHECKPOINT, **own}.items():
        given = getattr(options, name)
        if given is None:
            setattr(options, name, recorded.get(name, default))
        elif name in recorded and given != recorded[name]:
            if name in ("backbone", "n_class"):
                raise InputError(f"--{name} {given}: {first.path} was made with {recorded[name]}")
            logging.info(f"note: --{name} {given}; {first.path} was made with {recorded[name]}")
    options.batch_size = options.batch_size or described.batch_size
    options.split = options.split or described.validation
    command_line.check_sizes(options)
    if "classes" in recorded:
        compare_classes(recorded["classes"], first.path, described)
    return Header(
        stage=stage.number,
        backbone=options.backbone,
        classes=described.classes_for(options.n_class),
        size_g=options.size_g,
        size_p=options.size_p,
        min_overlap=options.min_overlap,
        normalize=options.normalize,
        coarse_to_fine=options.coarse_to_fine,
        box_margin=options.box_margin,
    )


def compare_classes(recorded: Classes, path: Path, described: Description) -> None:
    """Say where the file `path` was made with other names of classes than the data set's, which are taken.

    Raises InputError where it has another number of them, but for classes that `--n_class` numbered.
    """
    own = described.classes
    if len(recorded) == len(own):
        if recorded.names != own.names:
            logging.info(
                f"note: {path} was made with the classes {', '.join(recorded.names)}; here {', '.join(own.names)}"
            )
    elif not (described.labels_are_ids and recorded.names == Classes.generic(len(recorded)).names):
        raise InputError(
            f"{path} was made with {len(recorded)} classes ({shortened(recorded.names)}), but {described.title} has "
            f"{len(own)} ({shortened(own.names)}): give the --dataset that it was made with, or train anew, with "
            "--init_from in mode 1"
        )


def build_model(options: argparse.Namespace, stage: Stage, header: Header, files: dict[str, Checkpoint]) -> GLNet:
    """The network as `stage` evaluates it or starts to train it."""
    model = GLNet(len(header.classes), header.backbone)
    context = files.get("path_g") if stage.number == 3 else None
    if options.evaluation:
        checkpoint.load_whole(model, files[stage.reads], stage.number)
        if context is not None:
            checkpoint.load_context(model, context)
    elif stage.number > 1:
        start = files[stage.starts_from[0]]
        checkpoint.load_whole(model, start, stage.number - 1)
        if context is not None:
            checkpoint.check_context(model, context, start.path)
        if stage.number == 3:
            model.start_refined()
    model.learn(() if options.evaluation else stage.trains)
    return model


def start_weights(model: GLNet, header: Header, files: dict[str, Checkpoint], source: str) -> None:
    """Load what stage 1 starts from, if anything: a checkpoint that may have other classes, or both backbones."""
    if "init_from" in files:
        path = files["init_from"].path
        checkpoint.load_but_classes(model, files["init_from"])
        logging.info(
            f"Starting from {path}: backbones and pyramids are kept; heads and ensemble are new, for "
            f"{len(header.classes)} classes ({', '.join(header.classes.names)})"
        )
        return
    state = backbone_weights(header.backbone, source)
    for branch in (model.global_, model.local) if state is not None else ():
        checkpoint.load(branch.backbone, state, Path(source), ("",))


def place(model: GLNet, stage: Stage, device: torch.device) -> None:
    """Move the branches that `stage` uses to `device`; the others stay on the host."""
    for name in stage.uses:
        getattr(model, name).to(device)


def refuse_data_folder(folder: Path, data: SegmentationDataset) -> None:
    """Raise InputError where predictions, which have the labels' names, would fall on the data set's own files."""
    own = {path.parent.resolve() for item in data.items for path in (item.image, item.label) if path is not None}
    if folder.resolve() in own:
        raise InputError(f"--save_predictions {folder} would overwrite the labels there; name another folder")


def run_evaluation(
    options: argparse.Namespace,
    stage: Stage,
    network: PreparedGLNet,
    header: Header,
    settings: Settings,
    data: SegmentationDataset,
    labelled: bool,
    ranks: Ranks,
) -> None:
    """Evaluate one split; print the table, write it as JSON, if it is `labelled`, and the predictions where asked.

    Every process writes the predictions of its images, and the main one the rest.
    """

    def save(sample: Sample, found: dict[str, Tensor]) -> None:
        if options.save_predictions:
            ids: np.ndarray = found[stage.predictions[-1]].cpu().numpy()
            save_colors(options.save_predictions / f"{sample.id}_mask.png", ids, header.classes.palette)

    check_writable(options.log_path)
    if options.save_predictions:
        refuse_data_folder(options.save_predictions, data)
    own = range(ranks.rank, len(data), ranks.world)
    loader = SampleLoader(data, sampler=own, num_workers=options.num_workers, pin=settings.device.type == "cuda")
    segment = segment_averaged(TURNS[options.tta])
    title = f"evaluate {options.split}"
    tally = Tally(stage, header.classes)
    result = helper.evaluate(network, stage, loader, settings, save, title, ranks, tally=tally, segment=segment)
    if not ranks.main:
        return
    if options.save_predictions:
        logging.info(f"Predictions: {options.save_predictions}")
    if not labelled:
        return
    record = evaluation_record(
        stage.number,
        header.classes,
        result.tally.matrices,
        result.images,
        result.seconds_per_image,
        peak_memory_mb(settings.device),
        result.effort if header.coarse_to_fine and stage.number > 1 else None,
    )
    target = options.log_path / f"{options.task_name}.json"
    print(evaluation_table(record))
    write_json(target, record)
    logging.info(f"The same as JSON: {target}")


if __name__ == "__main__":
    sys.exit(main())
