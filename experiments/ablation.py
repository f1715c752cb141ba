"""Trains GLNet, its halves, and what a practitioner would take instead, at equal budgets; compares them image by image.

    python -m experiments.ablation --data pages --data_path pages_1792 --backbone_weights lite0.pth --jobs 2

Recipe, budgets, runs and variants are in `experiments/ablation_plan.py`. Every run is trained by the command line that
users have, once for each fold, and evaluated on the images that its fold holds back. A run that is finished is kept:
the same command goes on where it stopped. Tables are written anew after every run; `--table` writes them alone.

Trials go beside: `--only unet --folds 0 --trial rate2 --rate unet=2e-3` trains U-Net once more under another name, and
`trials_DATA.md` lists all trials with what they changed.
"""

import argparse
import math
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path

from dataset.folder import NAME
from experiments import ablation_data, ablation_tables
from experiments.ablation_data import SHRUNK, TRAINING
from experiments.ablation_plan import COMMON, NETWORK, RATES, RECIPES, Run, cost, plan
from utils.arguments import whole
from utils.errors import InputError, exit_code
from utils.files import read_json, write_json
from utils.results import RESULTS, run_measured
from utils.run_record import ROOT
from utils.stages import STAGES

NOT_RECORDED = {"backbone", "normalize", "min_overlap", "sub_batch_size", "precision", "size_g", "size_p", "model"}
"""What the file of a network of `experiments.baselines` does not record, and its evaluation needs."""


class Experiment:
    """All runs of one data set, their files and their results.

    Attributes:
        options: of the command line.
        recipe: with the budgets of the command line.
        rates: by family of runs, those of the command line, too.
        folder: for data, checkpoints and logs.
        chosen: names of the runs that are asked for.
        runs: these and what they start from, of one fold, by name.
        folds: numbers of the folds, which are also their seeds.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        """Plan the runs that the options ask for. Raises InputError for names that do not exist."""
        self.options = options
        given = {name: getattr(options, name) for name in ("epochs", "images", "patches")}
        self.recipe = replace(RECIPES[options.data], **{name: value for name, value in given.items() if value})
        self.rates = {**RATES, **dict(options.rate)}
        self.folder: Path = options.folder.resolve() / options.data
        every = {run.name: run for run in plan(self.recipe)}
        if unknown := set(options.only).difference(every):
            raise InputError(f"--only {min(unknown)}: there is no such run; there are {', '.join(every)}")
        if options.trial and not options.only:
            raise InputError(f"--trial {options.trial} needs --only: the runs that it tries")
        self.chosen = set(options.only or every)
        needed = set(self.chosen)
        for run in reversed(every.values()):  # each after all that start from it
            if run.name in needed:
                needed |= {other for _, other in run.starts}
        self.runs = {name: run for name, run in every.items() if name in needed}
        self.folds: list[int] = list(range(self.recipe.folds)) if options.folds is None else options.folds
        if max(self.folds) >= self.recipe.folds:
            raise InputError(f"--folds {max(self.folds)}: {options.data} has the folds 0 to {self.recipe.folds - 1}")

    def trial(self, run: Run) -> str:
        """Return the name of the trial that a run is of; empty for the experiment itself."""
        return self.options.trial if run.name in self.chosen else ""

    def name(self, run: Run, fold: int) -> str:
        """Return the name of a run's files."""
        return f"{run.name}{'.' if self.trial(run) else ''}{self.trial(run)}_{fold}"

    def result(self, run: Run, fold: int) -> Path:
        """Return the JSON file that a run leaves; it is written after training and after each evaluation."""
        return self.folder / "results" / f"{self.name(run, fold)}.json"

    def finished(self, run: Run, fold: int) -> bool:
        """Return whether a run is trained and all its evaluations are there."""
        path = self.result(run, fold)
        return path.exists() and read_json(path)["evaluations"].keys() >= run.evaluations.keys()

    def places(self, fold: int, data: str = NAME) -> list[str]:
        """Return the arguments of data and folders; `data` is the file of the fold's data set."""
        return [
            "--dataset=folder",
            f"--data_path={self.folder / 'data' / str(fold) / data}",
            f"--model_path={self.folder / 'models'}",
            f"--log_path={self.folder / 'runs'}",
            "--num_workers=0",
        ]

    def changed(self, run: Run) -> list[str]:
        """Return the arguments of training that differ between runs, whatever the fold."""
        read, recipe = cost(self.recipe, run), self.recipe
        return [
            *recipe.arguments,
            *recipe.windows,
            *(() if run.released or run.mode == 0 else NETWORK),
            *run.options,
            f"--size_p={run.side or recipe.patch}",
            *([f"--patches={read.patches}"] if run.phase else []),
            f"--num_epochs={read.epochs}",
            f"--batch_size={read.images}",
            f"--lr={self.rates[run.family]}",
            *(recipe.on_patches if run.phase == 1 else ()),
            *(self.options.more if run.name in self.chosen else ()),
        ]

    def training(self, run: Run, fold: int) -> list[str]:
        """Return the command that trains."""
        program = (
            [sys.executable, "-m", "experiments.baselines"]
            if run.mode == 0
            # nothing is validated before the end
            else [sys.executable, str(ROOT / "train_deep_globe.py"), f"--mode={run.mode}", "--val_every=100000"]
        )
        return [
            *program,
            f"--task_name={self.name(run, fold)}",
            *(["--resume=auto"] if run.mode else []),
            *self.starts(run, fold),
            *self.places(fold, SHRUNK if run.mode == 1 else TRAINING),
            f"--backbone_weights={self.options.backbone_weights}",
            *COMMON,
            *self.changed(run),
            f"--seed={fold}",
        ]

    def checkpoint(self, run: Run, fold: int) -> str:
        """Return the file that a run is read from: its averaged weights, if it is trained with `--ema`."""
        averaged = any(one.startswith("--ema=") for one in (*COMMON, *self.changed(run)))
        return f"{self.name(run, fold)}{'.ema' if averaged else ''}.pth"

    def starts(self, run: Run, fold: int) -> list[str]:
        """Return the arguments that name the checkpoints of other runs."""
        return [f"--{option}={self.checkpoint(self.runs[other], fold)}" for option, other in run.starts]

    def evaluation(self, run: Run, fold: int, evaluation: str) -> list[str]:
        """Return the command of one of a run's evaluations."""
        name = self.name(run, fold)
        where = [f"--task_name=eval_{name}_{evaluation}", *self.places(fold), "--evaluation"]
        more = [*self.recipe.evaluation, *run.evaluations[evaluation]]
        if run.mode:
            file = f"--{STAGES[run.mode].reads}={self.checkpoint(run, fold)}"
            program = [sys.executable, "-m", "experiments.baselines", "--model=glnet", f"--mode={run.mode}", file]
            return [*program, *where, "--upsample=bilinear", *more]
        known = [one for one in (*COMMON, *self.changed(run)) if one.removeprefix("--").split("=")[0] in NOT_RECORDED]
        file = f"--path_g={self.checkpoint(run, fold)}"
        program = [sys.executable, "-m", "experiments.baselines", file, *self.starts(run, fold)]
        return [*program, *where, *known, *more]

    def execute(self, command: list[str], name: str) -> tuple[float, float]:
        """Run a command; return its seconds of CPU time and its peak memory, in MB.

        Raises:
            InputError: the command fails; the message names its log.
        """
        log = self.folder / "logs" / f"{name}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        threads = self.options.threads or max(1, (os.cpu_count() or 1) // self.options.jobs)
        with log.open("a") as output:
            code, usage = run_measured(command, output, output, OMP_NUM_THREADS=str(threads), OMP_WAIT_POLICY="passive")
        if code:
            raise InputError(f"{name} failed with exit code {code}; see {log}")
        return usage.cpu_seconds, usage.memory_mb

    def work(self, run: Run, fold: int) -> None:
        """Train and evaluate, as far as that is not done, and write the result after each part.

        The seconds of a training that was interrupted are not known.
        """
        name, path = self.name(run, fold), self.result(run, fold)
        if path.exists():
            record = read_json(path)
        else:
            interrupted = (self.folder / "models" / f"{name}.resume.pth").exists()
            seconds, peak_mb = self.execute(self.training(run, fold), name)
            record = {
                "run": run.name,
                "fold": fold,
                "trial": self.trial(run),
                "arguments": self.changed(run),
                "training_seconds": None if interrupted else seconds,
                "training_peak_mb": peak_mb,
                "evaluations": {},
            }
            write_json(path, record)
        for evaluation in run.evaluations.keys() - record["evaluations"].keys():
            self.execute(self.evaluation(run, fold, evaluation), name)
            found = self.folder / "runs" / f"eval_{name}_{evaluation}.json"
            record["evaluations"][evaluation] = read_json(found)
            write_json(path, record)

    def run(self) -> None:
        """Execute all runs that are not finished, each after those that it starts from, until the hours are spent.

        Tables are written after every run. After an error no further run is started, and the first one is raised.
        """
        deadline = math.inf if self.options.hours is None else time.monotonic() + 3600 * self.options.hours
        every = sorted(((run, fold) for fold in self.folds for run in self.runs.values()), key=lambda one: one[0].extra)
        waiting = [(run, fold) for run, fold in every if not self.finished(run, fold)]
        unfinished = {(run.name, fold) for run, fold in waiting}
        running: dict[Future[None], tuple[Run, int]] = {}
        failed: BaseException | None = None
        with ThreadPoolExecutor(self.options.jobs) as pool:
            while True:
                ready = [
                    (run, fold)
                    for run, fold in waiting
                    if not any((other, fold) in unfinished for _, other in run.starts)
                ]
                if failed is None and time.monotonic() <= deadline:
                    for run, fold in ready[: self.options.jobs - len(running)]:
                        print(f"{time.strftime('%H:%M')} {self.name(run, fold)}", flush=True)
                        waiting.remove((run, fold))
                        running[pool.submit(self.work, run, fold)] = run, fold
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    run, fold = running.pop(future)
                    if (error := future.exception()) is None:
                        unfinished.remove((run.name, fold))
                    failed = failed or error
                self.write()
        if failed is not None:
            raise failed
        if waiting:
            print(f"The hours are spent; {len(waiting)} runs are left. The same command goes on.")

    def write(self) -> None:
        """Write the tables of all results, of trials too; names that begin with a dot are being written."""
        found = [read_json(path) for path in sorted((self.folder / "results").glob("[!.]*.json"))]
        ablation_tables.write(self.options.output, self.options.data, RECIPES[self.options.data], found)


def work(options: argparse.Namespace) -> None:
    """Write the data, execute the runs and write their tables, or the tables alone."""
    experiment = Experiment(options)
    if options.table:
        experiment.write()
        return
    ablation_data.prepare(
        options.data, experiment.recipe, options.data_path, experiment.folder / "data", options.shrunk
    )
    experiment.run()


def rate(text: str) -> tuple[str, float]:
    """Parse `--rate`."""
    family, _, value = text.partition("=")
    try:
        if family in RATES:
            return family, float(value)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text} must be FAMILY=RATE, FAMILY one of {', '.join(RATES)}")


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.ablation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--data", choices=tuple(RECIPES), default="synthetic", help="default: %(default)s")
    add("--data_path", type=Path, metavar="DIR", help="pages: what dataset.alto wrote; dubai: the published set")
    add("--shrunk", type=Path, metavar="DIR", help="pages: the same set, less high, which stage 1 reads faster")
    where = "for data, checkpoints and logs (default: %(default)s)"
    add("--folder", type=Path, default=Path("ablation"), metavar="DIR", help=where)
    add("--output", type=Path, default=RESULTS, metavar="DIR", help="of the tables (default: experiments/results)")
    add("--table", action="store_true", help="train nothing; write the tables of what is finished")
    source = "of all encoders: imagenet, none, or a file (default: %(default)s)"
    add("--backbone_weights", default="imagenet", metavar="SOURCE", help=source)
    add("--only", nargs="+", default=[], metavar="RUN", help="these runs and what they start from (default: all)")
    add("--folds", type=whole(0), nargs="+", metavar="N", help="which folds; their numbers are the seeds, too")
    add("--hours", type=float, help="start no run after so many hours; the same command goes on later")
    add("--jobs", type=whole(1), default=1, help="runs at a time (default: 1)")
    add("--threads", type=whole(1), help="of each run (default: the cores, shared by the jobs)")
    phases = ("STAGE1", "PATCHES", "STAGE3")
    add("--epochs", type=whole(1), nargs=3, metavar=phases, help="(default: the recipe's, as those below)")
    add("--images", type=whole(1), nargs=3, metavar=phases, help="in a step")
    add("--patches", type=whole(1), help="of each image in a step, for patches of the recipe's side")
    add("--rate", type=rate, nargs="+", default=[], metavar="FAMILY=RATE", help=f"of {', '.join(RATES)}")
    add("--trial", default="", metavar="NAME", help="train the runs of --only once more, under this name")
    add("--more", nargs=argparse.REMAINDER, default=[], metavar="ARG", help="last: further arguments of --only's runs")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code: 0, or 2 if the input is at fault."""
    options = build_parser().parse_args(arguments)
    return exit_code(lambda: work(options))


if __name__ == "__main__":
    sys.exit(main())
