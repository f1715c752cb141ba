"""Trains variants of GLNet, and what a practitioner would take instead, at equal budgets.

    python -m benchmarks.ablation --data dubai --data_path dubai --budget small

Every variant is trained by the command line that users have, with the same data, loss, encoder and number of epochs,
once for each seed, and evaluated on the validation images. A run that is finished is kept: the same command goes on
where it stopped, and more seeds are added to what is there. The table is written anew after every run.

What each variant is:

- `global`: the global branch alone.
- `local`: the local branch alone. No maps are shared, and the regulariser is off.
- `global to local`: stage 2; on Dubai also `longer`, with the epochs of U-Net.
- `local to global`: stage 3 on a local branch that was trained alone.
- `both`: GLNet. `both, no regulariser`: GLNet with lambda 0. `both, patches of N`: with another size of patches.
- `both, parts as images` (dubai): the published parts of each scene are images of their own, in training and in
  evaluation.
- `U-Net`, `DeepLabV3+`: of segmentation_models_pytorch, on the same patches, with labels at full resolution; on Dubai
  U-Net also with the steps and the learning rate of stage 2, to tell the network from its training.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import ablation_data
from benchmarks.ablation_plan import BATCH, BUDGETS, COMMON, RECIPES, Run, plan, variants
from benchmarks.records import RESULTS, command_of, write_results
from utils.errors import InputError, exit_code
from utils.files import write_json
from utils.stages import STAGES

ROOT = Path(__file__).parents[1]


class Experiment:
    """All runs of one data set, their files and their results.

    Attributes:
        data: a key of `RECIPES`.
        folder: for data, checkpoints and logs.
        runs: of one seed, by name.
        seeds: how often everything is trained.
        threads: of each process.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.data: str = options.data
        self.recipe = RECIPES[options.data]
        self.folder: Path = options.folder.resolve() / options.data
        self.runs = {run.name: run for run in plan(self.recipe, BUDGETS[options.budget])}
        self.seeds: list[int] = options.seeds
        self.threads = options.threads or max(1, (os.cpu_count() or 1) // options.jobs)

    def result(self, run: Run, seed: int) -> Path:
        """Return the JSON file that a finished run leaves."""
        return self.folder / "results" / f"{run.name}_{seed}.json"

    def places(self, run: Run) -> list[str]:
        """Return the arguments of data and folders."""
        return [
            "--dataset=folder",
            f"--data_path={self.folder / 'data' / run.data}",
            f"--model_path={self.folder / 'models'}",
            f"--log_path={self.folder / 'runs'}",
            "--num_workers=0",
        ]

    def program(self, run: Run) -> list[str]:
        """Return the beginning of a run's commands."""
        if run.mode == 0:
            return [sys.executable, "-m", "benchmarks.baselines"]
        return [sys.executable, str(ROOT / "train_deep_globe.py"), f"--mode={run.mode}"]

    def training(self, run: Run, seed: int) -> list[str]:
        """Return the command that trains."""
        recipe = self.recipe
        windows = recipe.windows if run.data == "scenes" else ()
        return [
            *self.program(run),
            f"--task_name={run.name}_{seed}",
            *(["--resume=auto"] if run.mode else []),
            *(f"--{option}={other}_{seed}.pth" for option, other in run.starts),
            *self.places(run),
            *COMMON,
            f"--size_p={recipe.patch}",
            *recipe.arguments,
            *windows,
            *run.options,
            f"--seed={seed}",
            f"--num_epochs={run.epochs}",
            f"--lr={run.learning_rate}",
            f"--batch_size={BATCH[run.mode]}",
        ]

    def evaluation(self, run: Run, seed: int) -> list[str]:
        """Return the command that evaluates."""
        reads = STAGES[run.mode or 1].reads
        name = f"{run.name}_{seed}"
        arguments = ["--evaluation", f"--task_name=eval_{name}", f"--{reads}={name}.pth", "--precision=bf16"]
        if run.mode == 0:  # nothing is recorded in its file
            arguments += [*COMMON, f"--size_p={self.recipe.patch}", *run.options]
        elif run.data == "scenes":
            arguments += self.recipe.evaluation
        return [*self.program(run), *arguments, *self.places(run)]

    def execute(self, command: list[str], run: Run, seed: int, threads: int) -> tuple[float, float]:
        """Run a command; return its seconds of CPU time and its peak memory, in MB.

        Raises:
            InputError: the command fails; the message names its log.
        """
        log = self.folder / "logs" / f"{run.name}_{seed}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
        with log.open("a") as output:
            process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, env=environment)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise InputError(f"{run.name}, seed {seed}, failed with exit code {process.returncode}; see {log}")
        return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024

    def train(self, run: Run, seed: int) -> None:
        """Train and evaluate, and write the result. The seconds of a training that was interrupted are not known."""
        interrupted = (self.folder / "models" / f"{run.name}_{seed}.resume.pth").exists()
        seconds, peak_mb = self.execute(self.training(run, seed), run, seed, self.threads)
        training = {"training_seconds": None if interrupted else seconds, "training_peak_mb": peak_mb}
        self.evaluate(run, seed, self.threads, training)

    def evaluate(self, run: Run, seed: int, threads: int, training: dict[str, float | None]) -> None:
        """Evaluate, and write the result with what its training took."""
        self.execute(self.evaluation(run, seed), run, seed, threads)
        record = json.loads((self.folder / "runs" / f"eval_{run.name}_{seed}.json").read_text())
        write_json(self.result(run, seed), {**record, **training})

    def evaluate_again(self) -> None:
        """Evaluate all finished runs again, one at a time."""
        for seed in self.seeds:
            for run in self.runs.values():
                path = self.result(run, seed)
                if path.exists():
                    print(f"{time.strftime('%H:%M')} seed {seed}: {run.name}", flush=True)
                    old = json.loads(path.read_text())
                    training = {name: old[name] for name in ("training_seconds", "training_peak_mb")}
                    self.evaluate(run, seed, os.cpu_count() or 1, training)

    def chain(self, run: Run) -> set[str]:
        """Return the names of a run and of all runs that it starts from."""
        return {run.name}.union(*(self.chain(self.runs[other]) for _, other in run.starts))

    def records(self) -> list[dict[str, Any]]:
        """Return the result of each variant and seed that is finished."""
        found = []
        for variant in variants(self.recipe):
            for seed in self.seeds:
                path = self.result(self.runs[variant.run], seed)
                if not path.exists():
                    continue
                record = json.loads(path.read_text())
                chain = [self.result(self.runs[name], seed) for name in self.chain(self.runs[variant.run])]
                spent = [json.loads(one.read_text())["training_seconds"] for one in chain]
                found.append(
                    {
                        "variant": variant.title,
                        "seed": seed,
                        "classes": record["classes"],
                        "mIoU": record[variant.prediction]["mIoU"],
                        "iou": [value or 0.0 for value in record[variant.prediction]["iou"]],
                        "training_seconds": None if None in spent else sum(spent),
                        "training_peak_mb": record["training_peak_mb"],
                        "seconds_per_image": record["seconds_per_image"],
                        "peak_memory_mb": record["peak_memory_mb"],
                    }
                )
        return found

    def write(self, output: Path) -> None:
        """Write JSON and table of all finished runs."""
        records = self.records()
        if not records:
            return
        rows = [mean_of([one for one in records if one["variant"] == title]) for title in titles(records)]
        command = command_of("ablation")
        classes = records[0]["classes"]
        runs = [{key: value for key, value in one.items() if key != "classes"} for one in records]
        record = {"command": command, "classes": classes, "rows": rows, "runs": runs}
        write_results(output / f"ablation_{self.data}.json", record, as_markdown(rows, classes, command))


def titles(records: Sequence[dict[str, Any]]) -> list[str]:
    """Return the variants of `records`, each once, in their order."""
    return list(dict.fromkeys(record["variant"] for record in records))


def mean_of(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return one row: means over the seeds of one variant, and the sample deviation of its mIoU (None for one seed).

    The seconds of training are the mean over the runs that were not interrupted, None if there is no such run.
    """
    scores = [record["mIoU"] for record in records]
    measured = ("training_peak_mb", "seconds_per_image", "peak_memory_mb")
    spent = [record["training_seconds"] for record in records if record["training_seconds"] is not None]
    return {
        "variant": records[0]["variant"],
        "seeds": len(records),
        "mIoU": statistics.mean(scores),
        "spread": statistics.stdev(scores) if len(scores) > 1 else None,
        "iou": [statistics.mean(values) for values in zip(*(record["iou"] for record in records), strict=True)],
        "training_seconds": statistics.mean(spent) if spent else None,
        **{key: statistics.mean(record[key] for record in records) for key in measured},
    }


def as_markdown(rows: Sequence[dict[str, Any]], classes: Sequence[str], command: str) -> str:
    """Return the table, with the command that made it."""
    heads = [
        "variant",
        "seeds",
        "mIoU, %",
        *classes,
        "training, CPU min",
        "training, MB",
        "s per image",
        "evaluation, MB",
    ]
    lines = [f"`{command}`", "", f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for row in rows:
        spread = "" if row["spread"] is None else f" ± {100 * row['spread']:.1f}"
        cells = [row["variant"], str(row["seeds"]), f"{100 * row['mIoU']:.1f}{spread}"]
        cells += [f"{100 * value:.1f}" for value in row["iou"]]
        minutes = "" if row["training_seconds"] is None else f"{row['training_seconds'] / 60:.1f}"
        cells += [minutes, f"{row['training_peak_mb']:.0f}"]
        cells += [f"{row['seconds_per_image']:.2f}", f"{row['peak_memory_mb']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


class Schedule:
    """Hands out runs to threads, each after those that it starts from.

    Attributes:
        waiting: runs and seeds that nobody has taken, in order.
        done: names and seeds of finished runs.
        failed: the first error; nothing more is handed out after it.
    """

    def __init__(self, experiment: Experiment, deadline: float | None) -> None:
        every = [(run, seed) for seed in experiment.seeds for run in experiment.runs.values()]
        every.sort(key=lambda item: item[0].extra)
        self.experiment = experiment
        self.deadline = deadline
        self.waiting = [(run, seed) for run, seed in every if not experiment.result(run, seed).exists()]
        self.done = {(run.name, seed) for run, seed in every if (run, seed) not in self.waiting}
        self.failed: BaseException | None = None
        self.changed = threading.Condition()

    def take(self) -> tuple[Run, int] | None:
        """Wait for the next run whose starts are done and return it; None if there is none, or the hours are spent."""
        with self.changed:
            while self.waiting and self.failed is None:
                if self.deadline is not None and time.monotonic() > self.deadline:
                    return None
                for item in self.waiting:
                    run, seed = item
                    if all((other, seed) in self.done for _, other in run.starts):
                        self.waiting.remove(item)
                        return item
                self.changed.wait()
            return None

    def finish(self, run: Run, seed: int, error: BaseException | None) -> None:
        """Count a run as done, or as failed."""
        with self.changed:
            if error is None:
                self.done.add((run.name, seed))
            else:
                self.failed = self.failed or error
            self.changed.notify_all()


def work(options: argparse.Namespace) -> None:
    """Execute all runs that are not finished, seed by seed, until the budget of hours is spent."""
    experiment = Experiment(options)
    ablation_data.prepare(options.data, options.data_path, experiment.folder / "data")
    if options.evaluate_again:
        experiment.evaluate_again()
        experiment.write(options.output)
        return
    deadline = None if options.hours is None else time.monotonic() + 3600 * options.hours
    schedule = Schedule(experiment, deadline)
    writing = threading.Lock()

    def worker() -> None:
        while (item := schedule.take()) is not None:
            run, seed = item
            print(f"{time.strftime('%H:%M')} seed {seed}: {run.name}, {run.epochs} epochs", flush=True)
            error: BaseException | None = None
            try:
                experiment.train(run, seed)
            except Exception as caught:
                error = caught
            schedule.finish(run, seed, error)
            with writing:
                experiment.write(options.output)

    with ThreadPoolExecutor(options.jobs) as pool:
        for future in [pool.submit(worker) for _ in range(options.jobs)]:
            future.result()
    if schedule.failed is not None:
        raise schedule.failed
    experiment.write(options.output)
    if schedule.waiting:
        print(f"The hours are spent; {len(schedule.waiting)} runs are left. The same command goes on.")


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ablation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", choices=tuple(RECIPES), default="synthetic", help="default: %(default)s")
    parser.add_argument("--data_path", type=Path, metavar="DIR", help="dubai: folder of the published set")
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("ablation"),
        metavar="DIR",
        help="for data, checkpoints and logs (default: %(default)s)",
    )
    parser.add_argument(
        "--output", type=Path, default=RESULTS, metavar="DIR", help="for JSON and table (default: benchmarks/results)"
    )
    parser.add_argument(
        "--budget",
        choices=tuple(BUDGETS),
        default="small",
        help="how long all are trained (default: %(default)s)",
    )
    parser.add_argument("--hours", type=float, help="start no run after so many hours; the same command goes on later")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument(
        "--evaluate_again",
        action="store_true",
        help="train nothing; evaluate what is finished again, one run at a time, so that their seconds compare",
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    parser.add_argument("--threads", type=int, help="of each run (default: the cores, shared by the jobs)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code: 0, or 2 if the input is at fault."""
    options = build_parser().parse_args(arguments)
    return exit_code(lambda: work(options))


if __name__ == "__main__":
    sys.exit(main())
