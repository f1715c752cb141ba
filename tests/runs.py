"""Whole training runs in processes of their own, on a tiny made-up set, that tests kill, stop and start again.

The processes come from a server that has imported everything, so that each starts at once.
"""

import io
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dataset import synthetic

ROOT = Path(__file__).parents[1]
LIMIT = 240  # seconds; a run that takes longer hangs
SIZES = ["--size_g=64", "--size_p=64", "--min_overlap=16", "--backbone=resnet18", "--backbone_weights=none"]
SMALL = ["--batch_size=2", "--sub_batch_size=4", "--num_workers=0", "--num_epochs=2"]
SAVE_OFTEN = "--save_every=1e-9"  # minutes: after every step, however short
STARTS = {1: ["--pyramid_width=32"], 2: ["--path_g=one.pth"], 3: ["--path_g=one.pth", "--path_g2l=two.pth"]}
"""What each stage starts from. The later ones take the narrow pyramid, which keeps files small, from the first."""

NAMES = {1: "one", 2: "two", 3: "three"}


@dataclass
class Result:
    code: int | None
    output: str


@dataclass
class Folders:
    """Where runs read and write: `data`, and below `root` checkpoints and logs."""

    root: Path
    data: Path

    @property
    def models(self) -> Path:
        return self.root / "models"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    def arguments(self, mode: int, *more: str) -> list[str]:
        where = [f"--data_path={self.data}", f"--model_path={self.models}", f"--log_path={self.logs}"]
        return [*where, *SIZES, *SMALL, f"--mode={mode}", f"--task_name={NAMES[mode]}", *STARTS[mode], *more]

    def beside(self, root: Path) -> "Folders":
        """Other folders on the same data, whose runs start from the same checkpoints."""
        other = Folders(root, self.data)
        other.models.mkdir(parents=True)
        for name in NAMES.values():
            (other.models / f"{name}.pth").hardlink_to(self.models / f"{name}.pth")
        return other

    def epochs(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.logs / f"{name}.jsonl").read_text().splitlines()]

    def weights(self, mode: int) -> dict[str, torch.Tensor]:
        return torch.load(self.models / f"{NAMES[mode]}.pth", weights_only=True)["model"]


def generate(path: Path, images: int = 7, size: int = 80) -> Path:
    """A made-up set: three quarters of the images for training."""
    synthetic.generate(path, images, size, seed=0, prepared=True)
    return path


def read_events(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0}).Reload()


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return str(free.getsockname()[1])


def environment_of(rank: int, world: int, port: str) -> dict[str, str]:
    """What torchrun sets for one of several processes."""
    several = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": str(world)}
    return {**several, "RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {}


def run_python(code: str, *arguments: object, folder: Path = ROOT, flags: tuple[str, ...] = (), **more: str) -> str:
    """Run a program in a process of its own, in a folder; returns what it prints. It must succeed.

    `more` are variables of its environment.
    """
    command = [sys.executable, *flags, "-c", code, *map(str, arguments)]
    environment = {**os.environ, **more}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


def assert_equal_weights(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Bit by bit."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def die_while_saving(moment: str, count: int) -> None:
    """Let this process kill itself at the `count`-th file that it saves: in the middle, or around the renaming."""
    saved, save, replace = 0, torch.save, Path.replace

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def counted_save(content: object, path: Path) -> None:
        nonlocal saved
        saved += 1
        save(content, path)
        if moment == "middle" and saved == count:
            os.truncate(path, path.stat().st_size // 2)
            die()

    def counted_replace(self: Path, target: Path) -> Path:
        if moment == "before renaming" and saved == count:
            die()
        done = replace(self, target)
        if moment == "after renaming" and saved == count:
            die()
        return done

    torch.save, Path.replace = counted_save, counted_replace


def _main(arguments: list[str], output: Path, environment: Mapping[str, str], prepare: Callable | None, extra: tuple):
    """What a process of a run does; its output goes to a file."""
    os.environ.update(environment)
    os.fsync = lambda file: None  # a killed process loses nothing that it wrote; a dead machine is not tested
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of loaders' workers, as where a run starts by itself
    stream = io.TextIOWrapper(output.open("wb", buffering=0), write_through=True)
    with redirect_stdout(stream), redirect_stderr(stream):
        import train_deep_globe

        if prepare is not None:
            prepare(*extra)
        code = train_deep_globe.main(arguments)
    os._exit(code)


@dataclass
class Run:
    """One process, or `world` that work together, on the command line `arguments`.

    `prepare(*extra)` is called in each process before; it may patch what the test needs patched.
    """

    arguments: list[str]
    output: Path
    world: int = 1
    prepare: Callable | None = None
    extra: tuple = ()
    processes: list[BaseProcess] = field(default_factory=list)

    def start(self) -> "Run":
        port = free_port()
        for rank in range(self.world):
            environment = environment_of(rank, self.world, port)
            path = self.output.with_suffix(f".{rank}.txt")
            path.touch()
            process = _context.Process(target=_main, args=(self.arguments, path, environment, self.prepare, self.extra))
            process.start()
            self.processes.append(process)
        return self

    def signal(self, number: int) -> None:
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid, number)

    def text(self, rank: int = 0) -> str:
        return self.output.with_suffix(f".{rank}.txt").read_text()

    def wait(self, limit: float = LIMIT) -> list[Result]:
        """Each process's exit code (negative: of the signal that killed it) and output; none may hang."""
        for process in self.processes:
            process.join(limit)
        hung = [process.pid for process in self.processes if process.is_alive()]
        self.signal(signal.SIGKILL)
        for process in self.processes:
            process.join()
        assert not hung, [self.text(rank) for rank in range(self.world)]
        return [Result(process.exitcode, self.text(rank)) for rank, process in enumerate(self.processes)]


def run(arguments: list[str], output: Path, **others: Any) -> Result:
    return Run(arguments, output, **others).start().wait()[0]


_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["train_deep_globe", "runs", "timm"])  # one that is missing is left out
