"""Trains and evaluates GLNet: global only (mode 1), global to local (2), local to global (3)."""

import argparse
import logging
import os
import sys
from typing import Any

import torch

from dataset.base import SegmentationDataset
from dataset.check import Problem, check
from dataset.layout import TRAIN
from dataset.registry import Description
from evaluation.run import run_evaluation
from imaging.image_file import View
from models.header import Header
from training import limits
from training import options as command_line
from training.recipe import parse
from training.run import TrainingRun
from training.setup import described_by, plan_evaluation, plan_training, resolve
from utils import distributed
from utils.diagnosis import diagnose
from utils.errors import InputError, Interrupted, RunError, allow_all_names
from utils.memory import keep_freed_memory
from utils.precision import disable_tf32
from utils.selection import CoarseToFine
from utils.settings import TrainingSettings


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit code.

    0: done; 1: the run failed; 2: the input is at fault; 128 + n: signal n stopped it, and it can be resumed.
    """
    allow_all_names()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    known: dict[str, Any] = {}
    try:
        options = parse(command_line.build_parser(), arguments)
        command_line.check(options)
        known |= vars(options)
        run(options, known)
    except (InputError, RunError) as error:
        return complain(error, 2 if isinstance(error, InputError) else 1)
    except Interrupted as error:
        print(error, file=sys.stderr)
        return 128 + error.number
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (RuntimeError, MemoryError) as error:
        message = diagnose(error, known, distributed.world_size())
        if message is None:
            raise
        return complain(message, 1)
    return 0


def complain(message: object, code: int) -> int:
    """Print the one line of a failure, with this process's number if there are several; return `code`."""
    rank = os.environ.get("RANK", "0") if distributed.world_size() > 1 else ""
    print(f"error: {f'process {rank}: ' if rank else ''}{message}", file=sys.stderr)
    return code


def run(options: argparse.Namespace, known: dict[str, Any]) -> None:
    """Check the data, evaluate or train, according to the options. For what it raises see `main`.

    `known` gets the values of options that were not given, as soon as they are known, for messages.
    """
    described = described_by(options)
    if options.check_data:
        check_data(options, described)
        return
    ranks = distributed.start(options.device)
    if not ranks.main:
        logging.getLogger().setLevel(logging.ERROR)
    keep_freed_memory()
    torch.manual_seed(options.seed)
    if options.deterministic:  # torch warns of an operation that is not
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False
    disable_tf32()
    if options.evaluation:
        evaluation = plan_evaluation(options, described, ranks.device)
        known |= evaluation.record
        run_evaluation(evaluation, ranks)
    else:
        training = plan_training(options, described, ranks)
        known |= training.record
        TrainingRun(training).run()
    distributed.stop()


def check_data(options: argparse.Namespace, described: Description) -> None:
    """Read every file of every split once and print the report. Raises InputError if anything is wrong."""
    options, header = resolve(options, {}, described)
    opened, problems = {}, []
    for split in described.splits:
        try:
            opened[split] = described.open(split, 4, header.classes, seed=options.seed)
            if options.max_pixels:
                opened[split].max_pixels = options.max_pixels
            opened[split].view = View.parse(header.bands, header.stretch)
        except InputError as error:
            # a data set may lack the splits that training does not need
            if split in (TRAIN, described.validation) or error.kind != "empty split":
                problems.append(Problem(split, error.kind, str(error)))
    if TRAIN in opened:
        problems += size_problems(options, header, opened[TRAIN])
    report = check(opened, options.num_workers)
    print(report.text(problems))
    if count := len(problems) + len(report.problems):
        raise InputError(f"{count} of the files above cannot be used" if count > 1 else "one file above cannot be used")


def size_problems(options: argparse.Namespace, header: Header, data: SegmentationDataset) -> list[Problem]:
    """Return what training on `data` would refuse for its size: images in mode 2, and a batch of one."""
    settings = TrainingSettings(
        header.size_p,
        options.sub_batch_size,
        header.min_overlap,
        selection=CoarseToFine(0) if header.coarse_to_fine else None,
        patches=options.patches,
    )
    errors = [limits.problem_of(item, size, settings) for item, size, _ in limits.headers(data)]
    problems = [Problem(TRAIN, error.kind, str(error)) for error in errors if error is not None]
    try:
        if header.context == "square":
            limits.check_batches(len(data), options.batch_size, header.size_g)
    except InputError as error:
        problems.append(Problem(TRAIN, "too small", str(error)))
    return problems


if __name__ == "__main__":
    sys.exit(main())
