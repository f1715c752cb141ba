"""Optimizer and schedule, the average of the weights, and when a run validates."""

from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from builders import build_sample, learning_model, train_epoch

from helper import EpochState, StageMetrics
from training.average import WeightAverage, learned_state
from training.optimizer import build_optimizer, build_schedule, poly
from training.run import TrainingRun
from training.state import RunState, TrainerState
from utils.distributed import ALONE
from utils.stages import STAGES

BATCHES = [[build_sample((64, 64), k)] for k in range(3)]


def train(model, optimizer, schedule=None) -> None:
    train_epoch(model, 1, BATCHES, optimizer, scheduler=schedule)


def test_optimizer_and_schedule_are_the_released_ones() -> None:
    model = learning_model(1)
    optimizer = build_optimizer(model, 1e-3)
    (group,) = optimizer.param_groups
    assert type(optimizer) is torch.optim.Adam
    assert (group["lr"], group["weight_decay"]) == (1e-3, 5e-4)
    assert [id(p) for p in group["params"]] == [id(p) for p in model.parameters() if p.requires_grad]
    schedule = build_schedule(optimizer, 7)
    assert [schedule.lr_lambdas[0](t) for t in range(9)] == [poly(t, 7) for t in range(9)]


def test_a_changed_rate_holds_after_a_resume() -> None:
    def trainer(lr: float) -> TrainerState:
        model = learning_model(1)
        optimizer = build_optimizer(model, lr)
        run, epoch = RunState("now"), EpochState(StageMetrics(STAGES[1], model.n_class))
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        return TrainerState(model, optimizer, build_schedule(optimizer, 10), scaler, run, epoch)

    before = trainer(1e-3)
    train(before.model, before.optimizer, before.scheduler)
    snapshot = before.capture(ALONE, {}, {})
    after = trainer(1e-2)
    after.restore(deepcopy(snapshot), "a.resume.pth", ALONE, anew=True)
    after.reschedule(3)
    rate = 1e-2 * poly(3, 10)
    assert after.scheduler.get_last_lr() == [rate] == [group["lr"] for group in after.optimizer.param_groups]
    for one, other in zip(before.model.parameters(), after.model.parameters(), strict=True):
        assert torch.equal(one, other)
        if one.requires_grad:
            assert torch.equal(before.optimizer.state[one]["exp_avg"], after.optimizer.state[other]["exp_avg"])


def test_the_average_follows_every_step_and_what_it_is_taken_of_stays() -> None:
    model, states = learning_model(1), []
    optimizer = build_optimizer(model, 1e-3)
    average = WeightAverage(model, 0.15, optimizer)
    names = {name.split(".")[0] for name in average.values}
    assert names == set(STAGES[1].trains) and any("running_var" in name for name in average.values)
    expected = {name: x.clone() for name, x in learned_state(model).items()}
    optimizer.register_step_post_hook(lambda *_: states.append({k: x.clone() for k, x in learned_state(model).items()}))
    train(model, optimizer)
    for decay, state in zip((0.1, 0.15, 0.15), states, strict=True):  # 1 / 10, then the given one
        for name, x in expected.items():
            expected[name] = x.lerp(state[name], 1 - decay) if x.is_floating_point() else state[name]
    before = deepcopy(model.state_dict())
    for name, x in average.values.items():
        assert torch.equal(x, expected[name]), name
    with pytest.raises(RuntimeError), average.applied():
        for name, x in model.state_dict().items():
            assert torch.equal(x, expected.get(name, before[name])), name
        raise RuntimeError
    for name, x in model.state_dict().items():
        assert torch.equal(x, before[name]), name
    for name, x in average.values.items():
        assert torch.equal(x, expected[name]), name


def test_a_skipped_step_does_not_move_the_average() -> None:
    model = learning_model(1)
    optimizer = build_optimizer(model, 1e-3)
    average = WeightAverage(model, 0.5, optimizer)
    with torch.no_grad():
        model.global_.head.bias.fill_(float("nan"))
    train(model, optimizer)
    assert average.updates == 0


@pytest.mark.parametrize(
    ("every", "patience", "epochs", "validated", "last"),
    [
        (1, 0, 3, [1, 2, 3], 3),
        (2, 0, 5, [2, 4, 5], 5),
        (2, 1, 9, [2, 4], 4),
        (2, 3, 9, [2, 4, 6], 6),
        (9, 1, 4, [4], 4),
    ],
)
def test_early_stopping_waits_for_a_validation(every, patience, epochs, validated, last) -> None:
    """The first validation is the best one."""
    run, found = object.__new__(TrainingRun), []
    options = SimpleNamespace(val_every=every, early_stopping=patience, num_epochs=epochs)
    run.plan = SimpleNamespace(options=options)
    run.state = SimpleNamespace(run=RunState("now"))
    state = run.state.run
    while state.epoch < epochs and not run._stalled():
        due = run._validation_due()
        state.epoch += 1
        state.unvalidated = 0 if due else state.unvalidated + 1
        if due:
            found.append(state.epoch)
            state.best_epoch = found[0]
    assert (found, state.epoch) == (validated, last)
