"""The model card: a page of Markdown beside a finished training's checkpoint that says what the file is."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from evaluation.report import per_cent
from models.header import Header
from training.options import RELEASED
from training.state import RunFiles, RunState
from utils.files import replacing
from utils.stages import Stage

Epoch = Mapping[str, Any]
"""A line of the `.jsonl` log."""


def read_epochs(path: Path, started: str) -> dict[int, Epoch]:
    """Return the lines of a run's `.jsonl` log by epoch, counted from 1.

    Args:
        path: the log; it may hold earlier runs of the same name. Lines that are no JSON are passed over.
        started: when the run began, as each of its lines says.
    """
    found: dict[int, Epoch] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        with suppress(ValueError):
            epoch = json.loads(line)
            if isinstance(epoch, dict) and epoch.get("started") == started:
                found[epoch["epoch"]] = epoch
    return found


def write_card(path: Path, text: str) -> None:
    """Write a card, beside and renamed. Raises InputError, naming `path`, when it cannot be written."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8", errors="backslashreplace")


def keep_previous_card(path: Path) -> None:
    """Rename the card of an earlier run, if any, to `.previous.md`: the new checkpoints are not what it describes."""
    if path.exists():
        path.replace(path.with_suffix(".previous.md"))


def model_card(
    *,
    files: RunFiles,
    stage: Stage,
    header: Header,
    run: RunState,
    record: Mapping[str, Any],
    data: Mapping[str, tuple[str, int]],
    epochs: Mapping[int, Epoch],
) -> str:
    """Return the card of a finished training, as Markdown; it states nothing that the run did not record.

    Args:
        files: the run's files.
        stage: what was trained.
        header: what the network is.
        run: where the run ended.
        record: what `records.run_record` returned.
        data: split and number of images, of `training` and of `validation`.
        epochs: lines of the `.jsonl` log by epoch, counted from 1; a run that was continued under another name lacks
            the first ones.
    """
    best, last = epochs.get(run.best_epoch), epochs.get(run.epoch)
    sections = [
        f"# {files.last.stem}\n",
        f"GLNet, stage {stage.number} ({stage.name}): a network that segments large images. The method is that of Chen "
        "et al., *Collaborative Global-Local Networks for Memory-Efficient Segmentation of Ultra-High Resolution "
        "Images* (CVPR 2019); the code is a reproduction.\n",
        _table("what", "value", _facts(files, stage, header, run, record, data)),
        _classes(header),
        _scores(stage, header, run, data["validation"], best, last),
        *([_averaged(files)] if record["options"].get("ema") else []),
        _usage(files, stage, record["options"]),
        _limits(stage, run, record["options"], data, epochs),
    ]
    return "\n".join(sections)


def _facts(
    files: RunFiles,
    stage: Stage,
    header: Header,
    run: RunState,
    record: Mapping[str, Any],
    data: Mapping[str, tuple[str, int]],
) -> list[tuple[str, str]]:
    """Return the rows of the first table."""
    options, versions = record["options"], record["versions"]
    network = [header.backbone, f"size_g {header.size_g}", f"size_p {header.size_p}"]
    network += [f"min_overlap {header.min_overlap}", f"normalize {header.normalize}"]
    network += [
        f"{name} {value}"
        for name in ("statistics", "scale", "bands", "stretch")
        if (value := getattr(header, name)) is not None
    ]
    if header.coarse_to_fine:
        network.append(f"coarse to fine, box_margin {header.box_margin:g}")
    names = ["num_epochs", "lr", "batch_size", "sub_batch_size", "loss", "gamma", "class_weights", "lamb_fmreg"]
    names += ["window", "windows", "augment", "precision", "seed", "sync_bn"]
    names += [name for name, value in RELEASED.items() if options.get(name) != value]
    settings = ", ".join(f"{name} {options[name]}" for name in names if options.get(name) not in (None, False))
    return [
        ("last epoch", f"`{files.last.name}`"),
        ("best epoch", f"`{files.best.name}`"),
        ("data set", f"`{_data_set(options)}`"),
        *((f"{part} images", f"{count}, split {split}") for part, (split, count) in data.items()),
        ("trained", " and ".join(stage.trains)),
        ("started from", _start(stage, options)),
        ("network", ", ".join(network)),
        ("settings", settings),
        ("epochs", f"{run.epoch}"),
        ("started", f"{run.started}{f', resumed {len(run.resumed)} times' if run.resumed else ''}"),
        ("device", f"{record['device']}; processes: {record['processes']}"),
        ("software", ", ".join(f"{name} {versions[name]}" for name in ("python", "torch", "torchvision"))),
        ("commit", str(record["git_commit"])),
    ]


def _data_set(options: Mapping[str, Any]) -> str:
    """Return the options that name the data set and its splits."""
    names = [name for name in ("dataset", "split_lists", "split_seed", "hold_out") if options.get(name) is not None]
    return " ".join(f"--{name} {options[name]}" for name in names)


def _start(stage: Stage, options: Mapping[str, Any]) -> str:
    """Return where the weights came from before this stage."""
    if stage.number == 1:
        if options.get("init_from"):
            return f"`{options['init_from']}`, heads and ensemble new"
        source = options["backbone_weights"]
        return {"none": "random weights", "imagenet": "ImageNet weights of the backbones"}.get(source, f"`{source}`")
    return " and ".join(f"`{options[name]}`" for name in ("path_g", "path_g2l")[: stage.number - 1] if options[name])


def _classes(header: Header) -> str:
    classes = header.classes
    rows = [
        (str(k), name, str(color).strip("()"), "no" if k in classes.left_out else "yes")
        for k, (name, color) in enumerate(zip(classes.names, classes.palette, strict=True))
    ]
    return "## Classes\n\n" + _table("id", "name", "colour (RGB)", "counts in the mIoU", rows)


def _scores(
    stage: Stage,
    header: Header,
    run: RunState,
    validation: tuple[str, int],
    best: Epoch | None,
    last: Epoch | None,
) -> str:
    """Return the tables of the best and the last epoch's scores."""
    shown = [(f"best, epoch {run.best_epoch}", best), (f"last, epoch {run.epoch}", last)]
    known = [(name, epoch["validation"]) for name, epoch in shown if epoch is not None]
    split, count = validation
    parts = [
        f"## Scores\n\nOn the {count} images of split {split}, in per cent. -: the class is neither labelled nor "
        "predicted, and counts 0 in the mIoU.\n"
    ]
    if best is None:
        parts.append(
            f"The best mIoU was {per_cent(run.best_score)}, in epoch {run.best_epoch}, of which there is no record.\n"
        )
    heads = [f"{prediction}, {name}" for prediction in stage.predictions for name, _ in known]
    columns = [scores[prediction] for prediction in stage.predictions for _, scores in known]
    rows = [("mIoU", *(per_cent(one["mIoU"]) for one in columns))]
    rows += [(name, *(per_cent(one["iou"][k]) for one in columns)) for k, name in enumerate(header.classes.names)]
    rows += [(name.replace("_", " "), *(per_cent(one[name]) for one in columns)) for name in header.classes.measures]
    parts.append(_table("", *heads, rows))
    parts.append(f"The main prediction of this stage is {stage.headline}.\n")
    return "\n".join(parts)


def _averaged(files: RunFiles) -> str:
    """Return which files the scores of a run with averaged weights are of."""
    return (
        f"The scores are of averaged weights: those of the best epoch are in `{files.best.name}`, those of the last in "
        f"`{files.average.name}`; `{files.last.name}` holds the last weights themselves, which were not evaluated.\n"
    )


def _usage(files: RunFiles, stage: Stage, options: Mapping[str, Any]) -> str:
    file = files.average if options.get("ema") else files.last
    return (
        "## Use\n\n```bash\n"
        f"python predict.py --checkpoint {file} --input IMAGES --output masks\n"
        f"python train_deep_globe.py --evaluation --mode {stage.number} --dataset {options['dataset']} "
        f"--data_path DATA --model_path {files.last.parent} --{stage.reads} {file.name}\n```\n\n"
        "Both commands are the project's; the file holds the whole network and its settings.\n"
    )


def _limits(
    stage: Stage,
    run: RunState,
    options: Mapping[str, Any],
    data: Mapping[str, tuple[str, int]],
    epochs: Mapping[int, Epoch],
) -> str:
    """Return what the scores do not say."""
    split, count = data["validation"]
    lines = [f"The best epoch was chosen on split {split}, {count} images: its scores there are not those of a test."]
    if data["training"][0] == split:
        lines.append("**Training and validation have the same images**: the scores say nothing about other images.")
    lines.append("Nothing was measured on images of other places, sensors, seasons or resolutions.")
    lines.append("The scores are of one run with one seed.")
    if stage.number == 1:
        lines.append("It is the first of three stages, and serves mode 1.")
    elif stage.number == 2:
        lines.append("It is the second of three stages, and serves modes 1 and 2.")
    if run.epoch < options["num_epochs"]:
        lines.append(f"Training stopped after epoch {run.epoch} of {options['num_epochs']}: the score no longer grew.")
    if skipped := sum(epoch["skipped_steps"] for epoch in epochs.values()):
        lines.append(f"{skipped} steps were skipped because their loss or gradient was not finite.")
    lines.append("The terms of the data set are not recorded here; read them before you pass the weights on.")
    return "## Limits\n\n" + "".join(f"- {line}\n" for line in lines)


def _table(*columns: Any) -> str:
    """Return a Markdown table: the heads of its columns, and last its rows."""
    *heads, rows = columns
    lines: Sequence[Sequence[str]] = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)
