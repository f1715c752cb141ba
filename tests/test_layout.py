"""The layout of the code: imports go one way, and importing any module has no side effects."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FLOORS = [
    {"utils"},
    {"imaging"},
    {"models", "dataset"},
    {"engine"},
    {"helper", "evaluation"},
    {"training", "prediction"},
    {"train_deep_globe", "predict"},
    {"experiments", "examples", "hubconf"},
    {"benchmarks", "scripts"},
]
"""From the ground up: a module imports from its own package, or from floors below."""


def modules() -> dict[str, Path]:
    """Every module of the project but tests, by its dotted name."""
    paths = [path for name in set.union(*FLOORS) for path in (ROOT / name).rglob("*.py")]
    paths += ROOT.glob("*.py")
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in known else str(node.module) for name in names}
    return {name for name in found if name in known}


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    known = modules()
    return {module: imports(path, known) for module, path in known.items()}


def test_every_package_is_on_a_floor_and_no_import_goes_up_or_across_or_in_a_circle(graph) -> None:
    packages = {path.parent.name for path in ROOT.glob("*/*.py") if not path.parent.name.startswith(".")}
    assert packages - {"tests"} <= set.union(*FLOORS)
    floor = {package: k for k, packages in enumerate(FLOORS) for package in packages}
    pairs = [(module.split(".")[0], other.split(".")[0]) for module, others in graph.items() for other in others]
    assert not [f"{one} imports {other}" for one, other in pairs if one != other and floor[other] >= floor[one]]
    left = dict(graph)
    while leaves := [module for module, others in left.items() if not others & left.keys() - {module}]:
        for module in leaves:
            del left[module]
    assert not left


def test_the_definition_of_the_network_imports_no_other_form_of_it(graph) -> None:
    """Otherwise an error in the faster forms would be on both sides of every comparison."""
    reached = {"models.glnet"}
    while more := {other for module in reached for other in graph[module]} - reached:
        reached |= more
    assert "models.fpn" in reached
    assert not reached & {f"models.{name}" for name in ("efficient", "resized", "regulariser", "folding", "prepared")}


SIDE_EFFECTS = """
import atexit, json, os, random, signal, sys, threading
import numpy, torch, cv2, torchvision, tensorboardX, PIL.Image  # what libraries do is not counted
registered = []
register = atexit.register
atexit.register = lambda function, *more, **others: registered.append(function.__module__) or register(function)

def state():
    return {
        "environment": dict(os.environ), "folder": os.getcwd(), "path": sys.path, "files": sorted(os.listdir()),
        "signals": [str(signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)],
        "threads": threading.active_count(), "torch threads": torch.get_num_threads(),
        "random": [hash(random.getstate()), hash(torch.get_rng_state().numpy().tobytes())],
        "default type": str(torch.get_default_dtype()), "gradients": torch.is_grad_enabled(),
        "pillow": [PIL.Image.MAX_IMAGE_PIXELS, PIL.ImageFile.LOAD_TRUNCATED_IMAGES],
        "opencv threads": cv2.getNumThreads(), "deterministic": torch.are_deterministic_algorithms_enabled(),
    }

import PIL.ImageFile
sys.path.insert(0, sys.argv[1])
changed = []
for module in sys.argv[2:]:
    before = state()
    __import__(module)
    after = state()
    changed += [(module, key) for key in before if before[key] != after[key]]
own = [name for name in registered if name in sys.modules and str(sys.modules[name].__file__).startswith(sys.argv[1])]
own = [name for name in own if ".venv" not in str(sys.modules[name].__file__)]
print(json.dumps([own, changed]))
"""


@pytest.mark.slow
def test_importing_has_no_side_effects(tmp_path) -> None:
    """The entry points, which import everything that the project runs, one after another."""
    modules = ("helper", "dataset.describe", "dataset.synthetic", "train_deep_globe", "hubconf")
    command = [sys.executable, "-c", SIDE_EFFECTS, str(ROOT), *modules]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[], []] and not done.stderr


HOST = """
import multiprocessing, os, pathlib, signal, sys, time
sys.path.insert(0, sys.argv[1])

def child(path):
    def leave(*_):
        pathlib.Path(path, "ended").touch()
        os._exit(0)
    signal.signal(signal.SIGTERM, leave)
    pathlib.Path(path, "ready").touch()
    time.sleep(60)

if __name__ == "__main__":
    multiprocessing.get_context("fork").Process(target=child, args=(sys.argv[2],), daemon=True).start()
    while not pathlib.Path(sys.argv[2], "ready").exists():
        time.sleep(0.01)
    from predict import Segmenter
    from dataset import synthetic
    from dataset.loader import SampleLoader
    from dataset.registry import describe
    data = pathlib.Path(sys.argv[2], "data")
    synthetic.generate(data, 6, 64, seed=0, prepared=False)
    samples = iter(SampleLoader(describe("deep_globe", data).open("train", 64), num_workers=1))
    next(samples)
    sys.modules["kept"] = samples  # left in the middle
"""


@pytest.mark.slow
def test_a_host_programs_own_processes_are_left_alone(tmp_path) -> None:
    """Python ends a daemon process with SIGTERM, which it may handle; a process of ours that it started is killed.

    The program ends well, and prints nothing, though its loader is left in the middle.
    """
    script = tmp_path / "host.py"
    script.write_text(HOST)
    command = [sys.executable, script, ROOT, tmp_path]
    done = subprocess.run(command, cwd=tmp_path, timeout=100, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
    assert (tmp_path / "ended").exists()
