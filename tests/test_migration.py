"""Files that were written before the code moved into packages are read after it.

`fixtures/` holds two that the code before wrote: a checkpoint of stage 2, and the resume file of a run of stage 1.
Their tensors share memory, as `builders.thin_tensor` makes them, so that the files are small.
"""

import lzma
from pathlib import Path

import pytest
import torch
from builders import N_CLASS, build_header, build_thin_model, thin_tensor
from runs import assert_equal_weights

from helper import EpochState
from models import checkpoint
from training import state
from training.options import build_parser
from training.state import RunState, TrainerState
from utils.distributed import ALONE
from utils.errors import InputError
from utils.metrics import StageMetrics
from utils.stages import STAGES

FIXTURES = Path(__file__).parent / "fixtures"


def unpack(folder: Path, name: str) -> Path:
    path = folder / name
    path.write_bytes(lzma.decompress((FIXTURES / f"{name}.xz").read_bytes()))
    return path


def assert_thin(model: torch.nn.Module, prefix: str) -> None:
    """The weights are those of the thin model with this prefix."""
    assert_equal_weights(model.state_dict(), build_thin_model(prefix=prefix).state_dict())


def test_an_older_checkpoint_gives_its_network_and_header(tmp_path) -> None:
    file = checkpoint.read(unpack(tmp_path, "checkpoint_v1.pth"))
    assert file.header == build_header(2)
    model = build_thin_model(prefix="other.")
    checkpoint.load_whole(model, file, 2)
    assert_thin(model, "stage2.")


def test_an_older_resume_file_goes_on(tmp_path) -> None:
    snapshot = state.read(unpack(tmp_path, "resume_v2.pth"))
    model, stage = build_thin_model(prefix="other."), STAGES[1]
    model.learn(stage.trains)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 - t / 10)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    epoch = EpochState(StageMetrics(stage, N_CLASS))
    trainer = TrainerState(model, optimizer, scheduler, scaler, RunState("now"), epoch)
    trainer.restore(snapshot, tmp_path / "resume_v2.pth", ALONE)
    assert_thin(model, "resume.")
    for i, parameter in enumerate(parameters):
        assert torch.equal(optimizer.state[parameter]["exp_avg"], thin_tensor(f"avg{i}", parameter)), i
    assert trainer.run == RunState("2026-11-25T00:00:00+00:00", [], 1, 0.25, 1, 0)
    epoch = trainer.epoch
    assert (epoch.batches, epoch.images, epoch.loss, epoch.seconds, epoch.skipped) == (1, 2, 1.5, 2.5, 0)
    assert epoch.metrics.matrices["global"].counts.unique().tolist() == [7]
    assert scheduler.last_epoch == 3
    assert scheduler.get_last_lr() == [5e-5 * 0.7]


def test_options_that_an_older_resume_file_lacks_count_as_their_defaults(tmp_path) -> None:
    saved = dict(state.read(unpack(tmp_path, "resume_v2.pth"))["options"])
    options = build_parser().parse_args([])
    now = {**state.options_record(options), **saved}
    assert state.changed_options(saved, now, anyway=False) == {}
    del saved["gamma"]
    assert state.changed_options(saved, now, anyway=False) == {}
    for name, value in {"warmup": 5, "backbone_lr": 0.1, "tf32": True, "split_seed": 3, "box_recall": 0.5}.items():
        with pytest.raises(InputError, match=f"another experiment: --{name} was {value}, now removed; "):
            state.changed_options({**saved, name: value}, now, anyway=False)
    assert state.changed_options({**saved, "max_bad_steps": 3, "cudnn_benchmark": True}, now, anyway=False) == {}
    changed = state.changed_options(saved, {**now, "gamma": 2.0}, anyway=True)
    assert list(changed.values()) == ["--gamma was 3.0, now 2.0"]
