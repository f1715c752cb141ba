"""The model card: a page of Markdown beside a finished training's checkpoint that says what the file is.

Settings, times, device, versions and commit are in the run's `run.json`, which the card names.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from string import Template
from typing import Any

from evaluation.report import per_cent
from models.header import Header
from training.state import RunFiles, RunState
from utils.files import replacing
from utils.stages import Stage

CARD = Template("""\
# $name

GLNet, stage $number ($stage): a network that segments large images. The method is that of Chen et al., *Collaborative \
Global-Local Networks for Memory-Efficient Segmentation of Ultra-High Resolution Images* (CVPR 2019); the code is a \
reproduction.

| what | value |
| --- | --- |
| last epoch | `$last` |
| best epoch | `$best` |
| data set | `$data_set` |
| training images | $training |
| validation images | $validation |
| started from | $start |
| network | $network |
| epochs | $epochs |
| settings, device, versions, commit | `$run` |

## Scores

On the validation images, in per cent. -: the class is neither labelled nor predicted, and counts 0 in the mIoU. The \
main prediction is $headline. The best mIoU was $score, in epoch $best_epoch.$averaged

$scores
## Use

```bash
python predict.py --checkpoint $file --input IMAGES --output masks
python train_deep_globe.py --evaluation --mode $number --dataset $dataset --data_path DATA --model_path $folder \
--$reads $file_name
```

## Limits

- The best epoch was chosen by these scores: they are not those of a test.$same
- Nothing was measured on images of other places, sensors, seasons or resolutions, nor with another seed.
- The file serves the modes $modes. $skipped steps were skipped because their loss or gradient was not finite.
- The terms of the data set are not recorded here; read them before you pass the weights on.
""")


def read_epochs(path: Path, started: str) -> dict[int, dict[str, Any]]:
    """Return the lines of the run that was `started` then from a `.jsonl` log, by epoch, counted from 1.

    Lines of other runs of the same name, and lines that are no JSON, are passed over.
    """
    found: dict[int, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        with suppress(ValueError):
            epoch = json.loads(line)
            if isinstance(epoch, dict) and epoch.get("started") == started:
                found[epoch["epoch"]] = epoch
    return found


def write_card(
    files: RunFiles,
    stage: Stage,
    header: Header,
    run: RunState,
    options: Mapping[str, Any],
    *,
    images: Sequence[tuple[str, int]],
    epochs: Mapping[int, Mapping[str, Any]],
) -> None:
    """Write the card of a finished training, beside and renamed; it states nothing that the run did not record.

    `options` are the run's record, `images` the split and number of the training images, then of the validation images,
    `epochs` what `read_epochs` returned; a run that was continued under another name lacks the first ones. Raises
    InputError if the card cannot be written.
    """
    file, chosen = files.average if options["ema"] else files.last, ("dataset", "split_lists", "hold_out")
    others = ("stage", "classes", "trained_on")
    network = [f"{name} {value}" for name, value in vars(header).items() if name not in others and value is not None]
    averaged = (
        f" The scores are of averaged weights: those of the best epoch are in `{files.best.name}`, of the last in "
        f"`{files.average.name}`; `{files.last.name}` holds the last weights themselves, which were not evaluated."
    )
    text = CARD.substitute(
        name=files.last.stem,
        number=stage.number,
        stage=stage.name,
        last=files.last.name,
        best=files.best.name,
        data_set=" ".join(f"--{name} {options[name]}" for name in chosen if options[name] is not None),
        training="{1}, split {0}".format(*images[0]),
        validation="{1}, split {0}".format(*images[1]),
        start=_start(stage, options),
        network=", ".join(network),
        epochs=f"{run.epoch} of {options['num_epochs']}",
        run=Path(options["log_path"]) / options["task_name"] / "run.json",
        headline=stage.headline,
        score=per_cent(run.best_score),
        best_epoch=run.best_epoch,
        averaged=averaged if options["ema"] else "",
        scores=_scores(stage, header, run, epochs),
        file=file,
        dataset=options["dataset"],
        folder=file.parent,
        reads=stage.reads,
        file_name=file.name,
        same=" **Training and validation have the same images.**" if images[0][0] == images[1][0] else "",
        modes=" and ".join(str(mode) for mode in sorted({1, stage.number})),
        skipped=sum(epoch["skipped_steps"] for epoch in epochs.values()),
    )
    with replacing(files.card) as part:
        part.write_text(text, encoding="utf-8", errors="backslashreplace")


def _start(stage: Stage, options: Mapping[str, Any]) -> str:
    """Return where the weights came from before this stage."""
    if stage.number > 1:
        names = ("path_g", "path_g2l")[: stage.number - 1]
        return " and ".join(f"`{options[name]}`" for name in names if options[name])
    if options["init_from"]:
        return f"`{options['init_from']}`, heads and ensemble new"
    source = options["backbone_weights"]
    return {"none": "random weights", "imagenet": "ImageNet weights of the backbones"}.get(source, f"`{source}`")


def _scores(stage: Stage, header: Header, run: RunState, epochs: Mapping[int, Mapping[str, Any]]) -> str:
    """Return the table of the best and the last epoch's scores, as far as they are on record."""
    classes = header.classes
    shown = {f"best, epoch {run.best_epoch}": run.best_epoch, f"last, epoch {run.epoch}": run.epoch}
    known = {name: epochs[epoch]["validation"] for name, epoch in shown.items() if epoch in epochs}
    found = [scores[one] for one in stage.predictions for scores in known.values()]
    rows = [["", "colour (RGB)", *(f"{one}, {name}" for one in stage.predictions for name in known)]]
    rows += [["---"] * len(rows[0]), ["mIoU", "", *(per_cent(one["mIoU"]) for one in found)]]
    for k, (name, color) in enumerate(zip(classes.names, classes.palette, strict=True)):
        left_out = ", not in the mIoU" if k in classes.left_out else ""
        values = [per_cent(one["iou"][k]) for one in found]
        rows.append([f"{k} {name}{left_out}", str(color).strip("()"), *values])
    rows += [[name.replace("_", " "), "", *(per_cent(one[name]) for one in found)] for name in classes.measures]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |\n" for row in rows)
