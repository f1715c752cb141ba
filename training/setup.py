"""From the options of `train_deep_globe.py` to a plan: files, header, initial weights, and all that a run needs."""

import json
import logging
import math
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from dataset.augmentation import Windows
from dataset.base import SegmentationDataset
from dataset.layout import TRAIN, SplitChoice
from dataset.registry import Description, describe
from dataset.statistics import count_values, statistics_of
from engine.predictor import Predictor
from evaluation.run import EvaluationPlan
from imaging.image_file import View
from imaging.planes import MAX_PIXELS
from models import checkpoint
from models.backbone import build_backbone, check_backbone
from models.bands import fit_kernels
from models.checkpoint import Checkpoint
from models.glnet import Branch, GLNet
from models.header import Header, TrainedOn
from models.restore import build_network, check_serves, restore
from models.tensors import children_of
from models.timm_backbone import TimmBackbone, convert_sync_batchnorm
from training import limits, state
from training.options import RELEASED
from training.run import TrainingPlan
from training.state import RunFiles, resume_source
from utils.classes import Classes
from utils.distributed import Ranks
from utils.errors import InputError, shortened
from utils.loss import build_loss, check_class_weights
from utils.precision import gradient_scaler, resolve_precision
from utils.run_record import options_record
from utils.settings import DATA, OF_WEIGHTS, RECORDED, Settings, Statistics, TrainingSettings, check_sizes
from utils.stages import STAGES, Stage
from utils.stretch import fit_bands, parse_bands, spell_bands
from utils.turns import TURNS

Files = Mapping[str, Checkpoint]
"""The checkpoints of a run, by the option that names them."""


def described_by(options: Namespace) -> Description:
    """Return the data set that the options of `training.options.add_data` name. Raises InputError, see `describe`."""
    choice = SplitChoice(options.split_lists, options.hold_out)
    return describe(options.dataset, options.data_path, choice)


def plan_training(options: Namespace, described: Description, ranks: Ranks) -> TrainingPlan:
    """Read the files that one stage starts from, and build its network on the device.

    Raises InputError if a file cannot be used, options do not fit it, or images are too small to learn from.
    """
    stage = STAGES[options.mode]
    run_files = RunFiles.of(options.model_path, options.task_name)
    resume = resume_source(run_files, options.resume, options.overwrite)
    files = read_checkpoints(options)
    options, described = take_over_split(options, files, described)
    options, header = resolve(options, files, described)
    settings = training_settings(options, header, ranks.device)
    train_data = open_data(options, described, TRAIN, header, training=True)
    train_data.whole = stage.number > 1  # stage 1 learns from shrunk images
    if header.context == "scale":
        header = header if header.scale else replace(header, scale=find_scale(header.size_g, train_data))
        train_data.context = header.context_scale()
    val_data = open_data(options, described, described.validation, header)
    val_data.keep_shrunk = True
    limits.check_images(train_data, settings if stage.number == 2 else None)
    if stage.number != 2 and header.context == "square":
        limits.check_batches(
            len(train_data), options.batch_size, header.size_g, world=ranks.world, joint=options.sync_bn
        )
    limits.check_views(val_data)
    if _awaits_statistics(header):
        header = replace(header, statistics=find_statistics(header, train_data, ranks, resume, options.num_workers))
    header = record_images(options, header, train_data)
    if val_data.context is not None:
        logging.info(f"Validation: {val_data.context}")
    model = build_training_model(header, files, start=options.start, resumed=resume is not None)
    for name in stage.uses:  # the other branches stay on the host
        getattr(model, name).to(ranks.device)
    if options.sync_bn:
        synchronize_norms(model, stage, ranks, header.context)
    known = {"precision": settings.precision, "processes": ranks.world, "training_images": train_data.fingerprint()}
    if header.context == "scale":
        known["scale"] = header.scale
    if header.statistics is not None:
        known["statistics"] = json.dumps(asdict(header.statistics))
    return TrainingPlan(
        stage=stage,
        model=model,
        header=header,
        settings=replace(settings, statistics=header.normalization()),
        train_data=train_data,
        val_data=val_data,
        validation=described.validation,
        children=saved_children(stage, files),
        ranks=ranks,
        files=run_files,
        resume=resume,
        options=options,
        record=options_record(options, **known),
    )


def plan_evaluation(options: Namespace, described: Description, device: torch.device) -> EvaluationPlan:
    """Prepare the network of the checkpoint that the options name, and open the images of one split.

    Raises InputError if a file cannot be used, or options do not fit it.
    """
    stage = STAGES[options.mode]
    files = read_checkpoints(options)
    options, described = take_over_split(options, files, described)
    options, header = resolve(options, files, described)
    settings = evaluation_settings(options, header, device)
    data = open_data(options, described, options.split, header)
    data.share = header.share
    limits.check_images(data, None)
    limits.check_views(data)
    # the prepared network is a copy; the files' tensors and the plain network are freed
    file = files.pop(stage.reads)
    model = restore(file, header, files.pop("path_g", None))
    del file
    if data.context is not None:
        logging.info(f"{options.model_path / getattr(options, stage.reads)}: {data.context}")
    return EvaluationPlan(
        predictor=Predictor.prepare(model, stage, settings, header.size_g, TURNS[options.tta], data.context),
        header=header,
        data=data,
        labelled=options.split not in described.unlabelled,
        num_workers=options.num_workers,
        log_path=options.log_path,
        save_predictions=options.save_predictions,
        report=options.report,
        record=options_record(options, precision=settings.precision),
    )


def read_checkpoints(options: Namespace) -> dict[str, Checkpoint]:
    """Return the files that a run evaluates or starts from, and stage 1's file if it is needed, by option.

    Raises InputError if a file cannot be used, or the run would overwrite it.
    """
    stage = STAGES[options.mode]
    names = [stage.reads] if options.evaluation else list(stage.starts_from)
    files = {name: checkpoint.read(options.model_path / getattr(options, name)) for name in names}
    if options.init_from:
        files["init_from"] = checkpoint.read(options.init_from)
    path_g = options.model_path / options.path_g if options.path_g else None
    if options.evaluation:
        check_serves(files[stage.reads], stage.number)
        context = checkpoint.read_context(files[stage.reads], stage.number, path_g)
    else:
        context = checkpoint.read(path_g) if stage.number == 3 and path_g else None
    if context is not None:
        files["path_g"] = context
    written = RunFiles.of(options.model_path, options.task_name)
    for output in () if options.evaluation else (written.last, written.best, written.average):
        if any(file.path.resolve() == output.resolve() for file in files.values()):
            raise InputError(f"--task_name {options.task_name} would overwrite {output}, which this run starts from")
    return files


def resolve(options: Namespace, files: Files, described: Description) -> tuple[Namespace, Header]:
    """Return the options with all that were not given filled in, and the header of the run's network.

    An option takes the given value, else that of the first of the checkpoints, else the default of the data set or the
    mode. From the file of `--init_from` only backbone, pyramid and normalisation are taken. The header has no
    statistics yet where stage 1 will measure them.

    Raises InputError if a given option contradicts the checkpoint's network, sizes do not fit together, or the data set
    has other classes than the checkpoint.
    """
    options, stage = Namespace(**vars(options)), STAGES[options.mode]
    first = next(iter(files.values()), None)
    trained = None if first is None else first.header
    size_g_given = options.size_g is not None
    own = {"bands": described.bands, "stretch": described.stretch}  # those of the data set's file
    defaults = {**RECORDED, "n_class": len(described.classes), "size_p": described.size_p}
    defaults |= {name: value for name, value in own.items() if value is not None}
    others = {"num_epochs": stage.epochs, "lr": stage.lr, "batch_size": described.batch_size, **RELEASED}
    others |= {"split": described.validation, "backbone_weights": "imagenet"}
    recorded: dict[str, Any] = {}
    if trained is not None and "init_from" in files:
        recorded = {name: getattr(trained, name) for name in (*OF_WEIGHTS, "backbone_weights", "normalize")}
    elif trained is not None:
        recorded = {**vars(trained), "n_class": len(trained.classes)}
    if first is not None and "init_from" not in files:
        options.bands = _fitting_bands(options.bands, first, defaults["bands"])
    for name, default in {**defaults, **others}.items():
        given = getattr(options, name)
        if given is None:
            setattr(options, name, recorded.get(name, default))
        elif first is not None and name in defaults and name in recorded and given != recorded[name]:
            if name in (*OF_WEIGHTS, "n_class"):
                raise InputError(f"--{name} {given}: {first.path} was made with {recorded[name]}")
            logging.info(f"note: --{name} {given}; {first.path} was made with {recorded[name]}")
    check_sizes(options.size_g, options.size_p, options.min_overlap)
    check_backbone(options.backbone, options.size_g, options.size_p)
    if first is not None and "classes" in recorded:
        _compare_classes(recorded["classes"], first.path, described)
    header = Header(
        stage=stage.number,
        classes=described.classes_for(options.n_class),
        statistics=recorded.get("statistics") if options.normalize == DATA else None,
        trained_on=None if trained is None else trained.trained_on,
        scale=_scale(options, first, options.size_g if size_g_given else None),
        backbone_weights=options.backbone_weights,
        **{name: getattr(options, name) for name in RECORDED},
    )
    return options, header


def _scale(options: Namespace, first: Checkpoint | None, size_g: int | None) -> float | None:
    """Return how far images are shrunk, see `Header.scale`: as in training, unless an evaluation names `--size_g`.

    `size_g` is the given one, None if none is. With `--context scale`, None says that training has still to measure it.
    """
    trained = None if first is None or options.init_from else first.header
    recorded = None if trained is None else trained.scale_for(options.context, size_g)
    if options.evaluation or (options.context == "scale" and recorded is not None):
        return recorded
    if options.window is not None:
        return float(options.window / options.size_g)
    if options.context == "scale":
        return None
    recorded = None if trained is None else trained.scale_for("square", None)
    if recorded is not None and first is not None:
        logging.info(
            f"note: {first.path} was trained on windows that were shrunk {recorded:.3g} times; without --window "
            f"whole images are shrunk to {options.size_g} x {options.size_g} here"
        )
    return None


def _fitting_bands(given: str | None, first: Checkpoint, of_data_set: str | None) -> str | None:
    """Return the given bands, fitted to the network of a checkpoint; a released file reads those of the data set.

    Raises InputError if the network reads another number of bands.
    """
    if given is None and first.header is None:
        given = of_data_set
    if given is not None:
        return spell_bands(fit_bands(parse_bands(given), first.n_bands, first.path))
    if first.header is not None and of_data_set not in (None, first.header.bands):
        logging.info(
            f"note: the data set's file names the bands {of_data_set}; {first.path} was made with "
            f"{first.header.bands or 'RGB'}, which is taken"
        )
    return None


def _compare_classes(recorded: Classes, path: Path, described: Description) -> None:
    """Compare the classes of the checkpoint at `path` with those of the data set, which are used.

    Other names are logged. Raises InputError if their numbers differ, unless `--n_class` numbered the checkpoint's.
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


def take_over_split(options: Namespace, files: Files, described: Description) -> tuple[Namespace, Description]:
    """Return options and data set, split as for the first checkpoint's training if no option chooses a split.

    Raises InputError if the recorded split cannot be made here.
    """
    first = next(iter(files.values()), None)
    record = None if first is None or first.header is None or "init_from" in files else first.header.trained_on
    if first is None or record is None or record.dataset != options.dataset:
        return options, described
    own = {name: getattr(options, name) for name in ("split_lists", "hold_out")}
    # a split by the seed 0 is that of no seed
    given, wanted = ({name: str(x) for name, x in y.items() if x} for y in (own, record.choice))
    if given == wanted:
        return options, described
    trained = " ".join(f"--{name} {value}" for name, value in wanted.items()) or "no such option"
    if given:
        chosen = " ".join(f"--{name} {value}" for name, value in given.items())
        logging.info(f"note: {chosen}; {first.path} was trained with {trained}")
    elif record.split_lists is not None and not Path(record.split_lists).is_dir():
        logging.warning(f"{first.path} was trained with {trained}, a folder that is not here; give --split_lists")
    elif record.split_seed:
        logging.warning(f"{first.path} was trained with {trained}, which there is no longer; give --split_lists")
    else:
        logging.info(f"note: {first.path} was trained with {trained}, which is taken over")
        choice = SplitChoice(None if record.split_lists is None else Path(record.split_lists), record.hold_out)
        options = Namespace(**{**vars(options), "split_lists": choice.lists, "hold_out": choice.hold_out})
        described = describe(options.dataset, options.data_path, choice)
    return options, described


def record_images(options: Namespace, header: Header, data: SegmentationDataset) -> Header:
    """Return the header with what the network is trained on: the images of `data`, and those of earlier stages."""
    before = set() if header.trained_on is None else header.trained_on.hashes()
    images = "".join(sorted(before | set(data.hashes())))
    lists = None if options.split_lists is None else str(options.split_lists)
    return replace(header, trained_on=TrainedOn(options.dataset, lists, hold_out=options.hold_out, images=images))


def _awaits_statistics(header: Header) -> bool:
    return header.stage == 1 and header.normalize == DATA and header.statistics is None


def find_statistics(
    header: Header, data: SegmentationDataset, ranks: Ranks, resume: Path | None, num_workers: int
) -> Statistics:
    """Return the statistics of the training images: those of the resume file, else measured by all processes together.

    Raises InputError if an image cannot be read, or the resume file is damaged.
    """
    saved = None if resume is None else state.read(resume)["options"].get("statistics")
    if saved is not None:
        try:
            return Statistics.from_record(json.loads(saved), header.n_bands)
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"{resume} is damaged: its statistics are {saved}") from error
    own = range(ranks.rank, len(data.items), ranks.world)
    counts = count_values(data, own, num_workers, quiet=not ranks.main)
    ranks.sum_([counts])
    statistics = statistics_of(counts)
    logging.info(f"Pixels of the training images, in [0, 1], by bands: {statistics}")
    return statistics


def find_scale(size_g: int, data: SegmentationDataset) -> float:
    """Return how far images are shrunk to the side `size_g`: the median over images, of both axes' geometric mean.

    Raises InputError if a header cannot be read.
    """
    sizes = (data.reader.size(item) for item in data.items)
    scale = median(math.sqrt(height * width) / size_g for height, width in sizes)
    logging.info(f"Images are shrunk {scale:.3g} times: the median of the training images for --size_g {size_g}")
    return scale


def evaluation_settings(options: Namespace, header: Header, device: torch.device) -> Settings:
    """Return the settings of an evaluation. Raises InputError, see `Header.settings`."""
    names = ("refine_share", "blend", "upsample", "sub_batch_size")
    own = {name: getattr(options, name) for name in names}
    return header.settings(**own, device=device, precision=resolve_precision(options.precision, device))


def training_settings(options: Namespace, header: Header, device: torch.device) -> TrainingSettings:
    """Return the settings of a training, without the statistics that stage 1 has still to measure.

    Raises InputError if class weights do not fit the classes, the classes are not fit for coarse to fine, or the
    normalisation does not fit the bands.
    """
    known = replace(header, normalize="none") if _awaits_statistics(header) else header
    weights = None
    if options.class_weights is not None:
        weights = check_class_weights(options.class_weights, header.classes.names).to(device)
    precision = resolve_precision(options.precision, device)
    return known.training_settings(
        sub_batch_size=options.sub_batch_size,
        loss=build_loss(options.loss, options.gamma, weights),
        full_labels=options.loss_size == "full",
        lamb_fmreg=options.lamb_fmreg,
        patches=options.patches,
        mix_images=options.sub_batches == "step",
        device=device,
        precision=precision,
        scaler=gradient_scaler(device, precision),
        checkpoint_activations=options.checkpoint_activations,
    )


def open_data(
    options: Namespace, described: Description, split: str, header: Header, training: bool = False
) -> SegmentationDataset:
    """Open the images of a split; for `training` they are varied, and drawn as windows, as the options say."""
    data = described.open(
        split,
        header.size_g,
        header.classes,
        augment=training,
        seed=options.seed,
        jitter=training and options.augment,
        windows=Windows(options.window, options.windows) if training and options.window else None,
    )
    data.max_pixels = options.max_pixels or MAX_PIXELS
    if training:
        data.turns = options.turns
        data.full_labels = options.loss_size == "full"
    data.view = View.parse(header.bands, header.stretch)
    data.context = None if training else header.context_scale(options.view_pixels)
    return data


def build_training_model(header: Header, files: Files, *, start: str = "released", resumed: bool = False) -> GLNet:
    """Build the network as a stage starts to train it, on the CPU; if `resumed`, its weights come later.

    Raises InputError if a file does not fit, or `--path_g` holds another global branch than the file of stage 2.
    """
    stage = STAGES[header.stage]
    model = build_network(header)
    if stage.number > 1:
        before = files[stage.starts_from[0]]
        checkpoint.load_whole(model, before, stage.number - 1)
        if "path_g" in files and stage.number == 3:
            checkpoint.check_context(model, files["path_g"], before.path)
        if stage.number == 2 and "local" not in children_of(before.tensors_of(1)):
            _start_backbone(header, model.local)
        if stage.number == 3:
            model.start_refined()
        if start == "previous":
            (model.continue_global if stage.number == 2 else model.continue_refined)()
    elif "init_from" in files and not resumed:
        checkpoint.load_but_classes(model, files["init_from"])
        logging.info(
            f"Starting from {files['init_from'].path}: backbones and pyramids are kept; heads and ensemble are new, "
            f"for {len(header.classes)} classes ({', '.join(header.classes.names)})"
        )
    elif not resumed:
        _start_backbone(header, model.global_)
    model.learn(stage.trains)
    return model


def _start_backbone(header: Header, branch: Branch) -> None:
    """Start the backbone of a branch with the weights that `--backbone_weights` names, if any."""
    if header.backbone_weights != "none":
        weights = build_backbone(header.backbone, header.backbone_weights).state_dict()
        branch.backbone.load_state_dict(fit_kernels(branch.backbone, weights))


def saved_children(stage: Stage, files: Files) -> tuple[str, ...]:
    """Return the children of the network in a run's files: what the stage uses, and branches of `--init_from`."""
    if "init_from" not in files:
        return stage.uses
    brought = files["init_from"]
    number = 1 if brought.header is None else brought.header.stage
    return tuple({*stage.uses} | ({"local", "refined"} & children_of(brought.tensors_of(number))))


def synchronize_norms(model: GLNet, stage: Stage, ranks: Ranks, context: str) -> None:
    """Replace the norm layers that `stage` trains by layers whose statistics are those of all processes together.

    Their tensors keep their names. Raises InputError in mode 2, with `--context scale` and without GPUs.
    """
    reasons = {
        "mode 2 normalises every sub-batch alone": stage.number == 2,
        "with --context scale processes may have images of different sizes": context == "scale",
        "torch has it for GPUs only": ranks.device.type != "cuda",
    }
    for reason, holds in reasons.items():
        if holds:
            raise InputError(f"--sync_bn cannot be used: {reason}; leave it out")
    timm = isinstance(model.global_.backbone, TimmBackbone)
    convert = convert_sync_batchnorm if timm else nn.SyncBatchNorm.convert_sync_batchnorm
    for name in stage.trains:
        setattr(model, name, convert(getattr(model, name)))
