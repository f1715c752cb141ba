"""The learning curves of training runs, from the logs that train_deep_globe.py writes."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from utils.errors import InputError


def read_curves(log: Path) -> dict[str, Any]:
    """Return the curves of one training run.

    Args:
        log: `LOG_PATH/TASK_NAME.jsonl`; the folder `TASK_NAME` lies beside it. If several runs of the name are in the
            log, the last one is read.

    Returns:
        `run` (its name), `stage`, `seed`, `epochs` (their numbers, from 1), and under `train` and `validation` the mIoU
        (0..1, None where no class counts, and without a validation) after each epoch, by prediction.

    Raises:
        InputError: the log or the record of its run is missing, or is something else.
    """
    try:
        options = json.loads((log.with_suffix("") / "run.json").read_text(encoding="utf-8"))["options"]
        lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        lines = [line for line in lines if line["started"] == lines[-1]["started"]]
        return {
            "run": log.stem,
            "stage": options["mode"],
            "seed": options["seed"],
            "epochs": [line["epoch"] for line in lines],
            **{part: _by_prediction([line[part] for line in lines]) for part in ("train", "validation")},
        }
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read: {error.strerror or error}") from error
    except (ValueError, LookupError, TypeError) as error:
        raise InputError(
            f"{log} is no training's log: give LOG_PATH/TASK_NAME.jsonl, which train_deep_globe.py writes beside the "
            "folder TASK_NAME"
        ) from error


def _by_prediction(epochs: Sequence[dict[str, Any] | None]) -> dict[str, list[float | None]]:
    """Return the mIoU of each epoch by prediction."""
    known = [scores for scores in epochs if scores]
    return {name: [None if scores is None else scores[name]["mIoU"] for scores in epochs] for name in known[0]}
