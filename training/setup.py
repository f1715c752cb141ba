"""From options to a network: the files that are read, the network's header, and its initial weights."""

import argparse
import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dataset.augmentation import Windows
from dataset.base import SegmentationDataset
from dataset.layout import SplitChoice
from dataset.registry import Description, describe
from dataset.statistics import count_values, statistics_of
from engine.predictor import Predictor
from imaging.image_file import View
from imaging.planes import MAX_PIXELS
from models import checkpoint
from models.backbone import build_backbone, check_backbone
from models.bands import fit_kernels
from models.checkpoint import Checkpoint
from models.glnet import GLNet
from models.header import Header, TrainedOn
from models.restore import build_network, check_serves, restore
from models.timm_backbone import TimmBackbone, convert_sync_batchnorm
from training import state
from training.limits import check_images
from training.options import RELEASED
from training.state import resume_source
from utils.classes import Classes
from utils.distributed import Ranks
from utils.errors import InputError, shortened
from utils.loss import Loss, build_loss, check_class_weights
from utils.precision import gradient_scaler
from utils.settings import DATA, RECORDED, Settings, Statistics, check_sizes
from utils.stages import STAGES, Stage
from utils.stretch import fit_bands, parse_bands, spell_bands
from utils.turns import TURNS

Files = Mapping[str, Checkpoint]
"""The checkpoints of a run, by the option that names them."""


def read_checkpoints(options: argparse.Namespace) -> dict[str, Checkpoint]:
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
    outputs = [options.model_path / f"{options.task_name}{ending}" for ending in (".pth", ".best.pth", ".ema.pth")]
    for output in () if options.evaluation else outputs:
        if any(file.path.resolve() == output.resolve() for file in files.values()):
            raise InputError(f"--task_name {options.task_name} would overwrite {output}, which this run starts from")
    return files


def resolve(options: argparse.Namespace, files: Files, described: Description) -> Header:
    """Fill in all options that were not given, and return the header of the run's network.

    An option takes the given value, else the checkpoint's, else the default of the data set or the mode.
    From the file of `--init_from` only backbone, pyramid and normalisation are taken. The header has no statistics yet
    where stage 1 will measure them.

    Args:
        options: changed in place.
        files: by `read_checkpoints`; the header of the first one is used.
        described: the data set.

    Raises:
        InputError: a given option contradicts the checkpoint's network, sizes do not fit together, or the data set has
            other classes than the checkpoint.
    """
    stage = STAGES[options.mode]
    first = next(iter(files.values()), None)
    size_g_given = options.size_g is not None
    recorded = {} if first is None or first.header is None else vars(first.header)
    if recorded and "init_from" in files:
        recorded = {name: recorded[name] for name in ("backbone", "normalize", "pyramid_width", "pyramid_norm")}
    elif recorded:
        recorded = {**recorded, "n_class": len(recorded["classes"])}
    defaults = {**RECORDED, "n_class": len(described.classes), "size_p": described.size_p, **view_options(described)}
    if first is not None and "init_from" not in files:
        _fit_bands(options, first, defaults)
    for name, default in defaults.items():
        given = getattr(options, name)
        if given is None:
            setattr(options, name, recorded.get(name, default))
        elif first is not None and name in recorded and given != recorded[name]:
            if name in ("backbone", "n_class", "pyramid_width", "pyramid_norm"):
                raise InputError(f"--{name} {given}: {first.path} was made with {recorded[name]}")
            logging.info(f"note: --{name} {given}; {first.path} was made with {recorded[name]}")
    others = {
        "num_epochs": stage.epochs,
        "lr": stage.lr,
        "batch_size": described.batch_size,
        "split": described.validation,
        **RELEASED,
    }
    for name, default in others.items():
        if getattr(options, name) is None:
            setattr(options, name, default)
    check_sizes(options.size_g, options.size_p, options.min_overlap)
    check_backbone(options.backbone, options.size_g, options.size_p)
    if first is not None and "classes" in recorded:
        _compare_classes(recorded["classes"], first.path, described)
    values = {name: getattr(options, name) for name in RECORDED}
    statistics = recorded.get("statistics") if options.normalize == DATA else None
    return Header(
        stage=stage.number,
        classes=described.classes_for(options.n_class),
        statistics=statistics,
        trained_on=None if first is None or first.header is None else first.header.trained_on,
        scale=_scale(options, first, size_g_given),
        **values,
    )


def _scale(options: argparse.Namespace, first: Checkpoint | None, size_g_given: bool) -> float | None:
    """Return how far images are shrunk, see `Header.scale`: as in training, unless an evaluation names `--size_g`."""
    recorded = None if first is None or first.header is None else first.header.scale
    if options.evaluation:
        return None if size_g_given else recorded
    if options.window is None:
        if recorded is not None and first is not None and not options.init_from:
            logging.info(
                f"note: {first.path} was trained on windows that were shrunk {recorded:.3g} times; without --window "
                f"whole images are shrunk to {options.size_g} x {options.size_g} here"
            )
        return None
    return float(options.window / options.size_g)


def take_over_split(options: argparse.Namespace, files: Files, described: Description) -> Description:
    """Return the data set, split as it was when the checkpoint that a run starts from, or evaluates, was trained.

    Args:
        options: those that choose the split are changed in place, if none of them is given.
        files: by `read_checkpoints`; the first one counts.
        described: the data set, split as the options say.

    Raises:
        InputError: the recorded split cannot be made here.
    """
    first = next(iter(files.values()), None)
    record = None if first is None or first.header is None or "init_from" in files else first.header.trained_on
    if first is None or record is None or record.dataset != options.dataset:
        return described
    given = {name: None if value is None else str(value) for name, value in split_options(options).items()}
    wanted = {name: None if value is None else str(value) for name, value in record.choice.items()}
    if given == wanted:
        return described
    trained = " ".join(f"--{name} {value}" for name, value in wanted.items() if value is not None) or "no such option"
    if any(value is not None for value in given.values()):
        chosen = " ".join(f"--{name} {value}" for name, value in given.items() if value is not None)
        logging.info(f"note: {chosen}; {first.path} was trained with {trained}")
        return described
    if record.split_lists is not None and not Path(record.split_lists).is_dir():
        logging.warning(f"{first.path} was trained with {trained}, a folder that is not here; give --split_lists")
        return described
    logging.info(f"note: {first.path} was trained with {trained}, which is taken over")
    lists = None if record.split_lists is None else Path(record.split_lists)
    choice = SplitChoice(lists, record.split_seed, record.hold_out)
    options.split_lists, options.split_seed, options.hold_out = choice.lists, choice.seed, choice.hold_out
    return describe(options.dataset, options.data_path, choice)


def split_options(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options that choose a split, by name."""
    return {name: getattr(options, name) for name in ("split_lists", "split_seed", "hold_out")}


def record_images(options: argparse.Namespace, header: Header, data: SegmentationDataset) -> Header:
    """Return the header with what the network is trained on: these images, and those of earlier stages.

    Args:
        options: resolved.
        header: of the network.
        data: the training images.
    """
    before = set() if header.trained_on is None else header.trained_on.hashes()
    choice = split_options(options)
    if choice["split_lists"] is not None:
        choice["split_lists"] = str(choice["split_lists"])
    images = "".join(sorted(before | set(data.hashes())))
    return replace(header, trained_on=TrainedOn(options.dataset, images=images, **choice))


def view_options(described: Description) -> dict[str, Any]:
    """Return the defaults of `--bands` and `--stretch` for a data set: those of its own file, if it names any."""
    own = {"bands": described.bands, "stretch": described.stretch}
    return {name: RECORDED[name] if value is None else value for name, value in own.items()}


def _fit_bands(options: argparse.Namespace, first: Checkpoint, defaults: Mapping[str, Any]) -> None:
    """Fit given bands to the network of a checkpoint.

    Args:
        options: `bands` is changed in place.
        first: the checkpoint.
        defaults: the data set's bands, which a released file has to read.

    Raises:
        InputError: the network reads another number of bands.
    """
    given = options.bands
    if given is None and first.header is None:
        given = defaults["bands"]
    if given is not None:
        options.bands = spell_bands(fit_bands(parse_bands(given), first.n_bands, first.path))
    elif first.header is not None and defaults["bands"] not in (None, first.header.bands):
        logging.info(
            f"note: the data set's file names the bands {defaults['bands']}; {first.path} was made with "
            f"{first.header.bands or 'RGB'}, which is taken"
        )


def _compare_classes(recorded: Classes, path: Path, described: Description) -> None:
    """Compare the classes of a checkpoint with those of the data set. Other names are logged; the data set's are used.

    Args:
        recorded: of the checkpoint.
        path: of the checkpoint.
        described: the data set.

    Raises:
        InputError: their numbers differ, unless `--n_class` numbered the checkpoint's classes.
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


def _awaits_statistics(options: argparse.Namespace, header: Header) -> bool:
    """Return whether this run is to measure the statistics of its training images."""
    measures = header.stage == 1 and not options.evaluation
    return measures and header.normalize == DATA and header.statistics is None


def add_statistics(options: argparse.Namespace, header: Header, data: SegmentationDataset, ranks: Ranks) -> Header:
    """Return the header with the statistics of the training images, where stage 1 normalises by them.

    They are measured once. A resumed run takes them from its resume file.

    Args:
        options: resolved.
        header: of the network.
        data: the training images.
        ranks: the processes, which share the images.

    Raises:
        InputError: an image cannot be read, or the resume file is damaged.
    """
    if not _awaits_statistics(options, header):
        return header
    source = resume_source(options)
    saved = None if source is None else state.read(source).options.get("statistics")
    if saved is not None:
        try:
            return replace(header, statistics=Statistics.from_record(json.loads(saved), header.n_bands))
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"{source} is damaged: its statistics are {saved}") from error
    own = range(ranks.rank, len(data.items), ranks.world)
    counts = count_values(data, own, options.num_workers, quiet=not ranks.main)
    ranks.sum_([counts])
    statistics = statistics_of(counts)
    logging.info(f"Pixels of the training images, in [0, 1], by bands: {statistics}")
    return replace(header, statistics=statistics)


def build_settings(options: argparse.Namespace, header: Header, device: torch.device) -> Settings:
    """Return the settings of a run, without the statistics that `add_statistics` has still to measure.

    Args:
        options: resolved.
        header: of the network.
        device: of the network.

    Raises:
        InputError: class weights do not fit the classes, the classes are not fit for coarse to fine, or the
            normalisation does not fit the bands.
    """
    known = replace(header, normalize="none") if _awaits_statistics(options, header) else header
    return known.settings(
        box_recall=options.box_recall,
        refine_share=options.refine_share,
        blend=options.blend,
        upsample=options.upsample,
        sub_batch_size=options.sub_batch_size,
        loss=_chosen_loss(options, header.classes, device),
        full_labels=options.loss_size == "full",
        lamb_fmreg=options.lamb_fmreg,
        patches=options.patches,
        device=device,
        precision=options.precision,
        scaler=gradient_scaler(device, options.precision),
        clip_grad=options.clip_grad,
        checkpoint_activations=options.checkpoint_activations,
    )


def _chosen_loss(options: argparse.Namespace, classes: Classes, device: torch.device) -> Loss:
    """Return the loss that the options name. Raises InputError for class weights that do not fit the classes."""
    weights = None
    if options.class_weights is not None:
        weights = check_class_weights(options.class_weights, classes.names).to(device)
    return build_loss(options.loss, options.gamma, weights)


def open_data(
    options: argparse.Namespace, described: Description, split: str, header: Header, training: bool = False
) -> SegmentationDataset:
    """Open the images of a split.

    Args:
        options: resolved.
        described: the data set.
        split: of the data set.
        header: its `size_g` and classes are used.
        training: whether samples are varied, and drawn as windows, as training has them.
    """
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
    data.context = None if training else header.context()
    return data


def build_training_model(options: argparse.Namespace, header: Header, files: Files, *, resumed: bool) -> GLNet:
    """Build the network as a stage starts to train it, on the CPU.

    Args:
        options: resolved.
        header: of the network.
        files: by `read_checkpoints`.
        resumed: whether all weights will come from a resume file.

    Raises:
        InputError: a file does not fit, or `--path_g` holds another global branch than the file of stage 2.
    """
    stage = STAGES[header.stage]
    model = build_network(header)
    if stage.number > 1:
        start = files[stage.starts_from[0]]
        checkpoint.load_whole(model, start, stage.number - 1)
        if "path_g" in files and stage.number == 3:
            checkpoint.check_context(model, files["path_g"], start.path)
        if stage.number == 3:
            model.start_refined()
        if options.start == "previous":
            (model.continue_global if stage.number == 2 else model.continue_refined)()
    elif not resumed:
        _load_initial_weights(model, header, files, options.backbone_weights)
    model.learn(stage.trains)
    return model


def _load_initial_weights(model: GLNet, header: Header, files: Files, source: str) -> None:
    """Load the weights that stage 1 starts from, if any.

    Args:
        model: the network.
        header: of the network.
        files: `init_from`, if it is among them, may have other classes.
        source: of the backbones' weights, see `build_backbone`; not read with `init_from`.
    """
    if "init_from" in files:
        path = files["init_from"].path
        checkpoint.load_but_classes(model, files["init_from"])
        logging.info(
            f"Starting from {path}: backbones and pyramids are kept; heads and ensemble are new, for "
            f"{len(header.classes)} classes ({', '.join(header.classes.names)})"
        )
        return
    if source != "none":
        state = build_backbone(header.backbone, source).state_dict()
        for branch in (model.global_, model.local):
            branch.backbone.load_state_dict(fit_kernels(branch.backbone, state))


def place(model: GLNet, stage: Stage, device: torch.device) -> None:
    """Move the branches that `stage` uses to `device`; the others stay on the host."""
    for name in stage.uses:
        getattr(model, name).to(device)


def synchronize_norms(model: GLNet, stage: Stage, ranks: Ranks) -> None:
    """Replace the norm layers that `stage` trains by layers whose statistics are those of all processes together.

    Their tensors keep their names. Raises InputError in mode 2 and without GPUs.
    """
    if ranks.device.type != "cuda" or stage.number == 2:
        reason = "mode 2 normalises every sub-batch alone" if stage.number == 2 else "torch has it for GPUs only"
        raise InputError(f"--sync_bn cannot be used: {reason}; leave it out")
    timm = isinstance(model.global_.backbone, TimmBackbone)
    convert = convert_sync_batchnorm if timm else nn.SyncBatchNorm.convert_sync_batchnorm
    for name in stage.trains:
        setattr(model, name, convert(getattr(model, name)))


def prepare_evaluation(
    options: argparse.Namespace, described: Description, device: torch.device
) -> tuple[Predictor, Header, SegmentationDataset]:
    """Return the predictor of the checkpoint that the options name, its network's header, and the images.

    Args:
        options: resolved in place.
        described: the data set.
        device: of the network.

    Raises:
        InputError: a file cannot be used, or options do not fit it.
    """
    stage = STAGES[options.mode]
    files = read_checkpoints(options)
    described = take_over_split(options, files, described)
    header = resolve(options, files, described)
    settings = build_settings(options, header, device)
    data = open_data(options, described, options.split, header)
    data.share = header.share
    check_images(data, None)
    # the prepared network is a copy; the files' tensors and the plain network are freed
    file = files.pop(stage.reads)
    model = restore(file, header, files.pop("path_g", None))
    del file
    context = header.context()
    if context is not None:
        logging.info(f"{options.model_path / getattr(options, stage.reads)}: {context}")
    predictor = Predictor.prepare(model, stage, settings, header.size_g, TURNS[options.tta], context)
    return predictor, header, data
