"""The schedule: a run's learning rates are those of transformers' get_scheduler."""

import inspect
import json
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers import get_scheduler
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, GreedyLR
from transformers.trainer_utils import SchedulerType

from fastpref.config import Config, make_config
from fastpref.config.optimization import POLYNOMIAL_END, SCHEDULES
from fastpref.errors import UserError
from fastpref.step.optimizer import make_optimizer
from fastpref.step.schedule import Schedule, every_so_many, warmup_steps

STEPS, RATE = 40, 1e-3
GIVEN_BY_THE_RUN = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch", "self", "mode", "verbose"}


def config_of(*overrides: str) -> Config:
    tables = {"model": {"name": "none"}, "data": [{"path": "none"}], "eval": {"fraction": 0.1, "every": 2}}
    return make_config(tables, [f"train.learning_rate={RATE}", *overrides])


def optimizer_of(config: Config) -> torch.optim.Optimizer:
    return make_optimizer(nn.Linear(2, 2), config, warmup=warmup_steps(config, STEPS))


def rates(schedule: Any, optimizer: torch.optim.Optimizer) -> list[float]:
    """Return the learning rate of each step."""
    found = []
    for _ in range(STEPS):
        found.append(schedule.rate if isinstance(schedule, Schedule) else optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.stepped() if isinstance(schedule, Schedule) else schedule.step()
    return found


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_options_are_those_of_the_function(name: str):
    """Every option of the library's function is known, and no other."""
    function: Any = TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(name)]
    function = {"reduce_lr_on_plateau": ReduceLROnPlateau, "greedy": GreedyLR}.get(name, function)
    known = set(inspect.signature(function).parameters) - GIVEN_BY_THE_RUN
    assert set(SCHEDULES[name].options) == known


def test_every_schedule_is_known():
    """The names are those of transformers, and its end of a polynomial is the one that the config compares with."""
    assert set(SCHEDULES) == {kind.value for kind in SchedulerType}
    polynomial: Any = TYPE_TO_SCHEDULER_FUNCTION[SchedulerType.POLYNOMIAL]
    assert inspect.signature(polynomial).parameters["lr_end"].default == POLYNOMIAL_END


EQUAL: dict[str, tuple[str, int, dict[str, Any]]] = {  # overrides, and the name, warm-up and options of get_scheduler
    "": ("cosine", 4, {}),
    "train.schedule=linear train.warmup=7": ("linear", 7, {}),
    "train.schedule=constant": ("constant_with_warmup", 4, {}),
    "train.schedule=constant_with_warmup": ("constant_with_warmup", 4, {}),
    "train.schedule=constant train.warmup=0": ("constant", 0, {}),
    "train.schedule=cosine train.schedule_options={num_cycles=1.5}": ("cosine", 4, {"num_cycles": 1.5}),
    "train.schedule=cosine_with_restarts train.schedule_options={num_cycles=3}": (
        "cosine_with_restarts", 4, {"num_cycles": 3},
    ),
    "train.schedule=polynomial train.schedule_options={power=2}": ("polynomial", 4, {"power": 2}),
    "train.schedule=inverse_sqrt train.schedule_options={timescale=8}": ("inverse_sqrt", 4, {"timescale": 8}),
    "train.schedule=cosine_with_min_lr train.schedule_options={min_lr_rate=0.1}": (
        "cosine_with_min_lr", 4, {"min_lr_rate": 0.1},
    ),
    "train.schedule=cosine_warmup_with_min_lr train.min_lr=1e-5 train.schedule_options={warmup_lr_rate=0.2}": (
        "cosine_warmup_with_min_lr", 4, {"min_lr": 1e-5, "warmup_lr_rate": 0.2},
    ),
    "train.schedule=warmup_stable_decay train.schedule_options={num_decay_steps=9,decay_type='linear'}": (
        "warmup_stable_decay", 4, {"num_decay_steps": 9, "decay_type": "linear"},
    ),
    "train.schedule=warmup_stable_decay train.schedule_options={num_decay_steps=0.25} train.min_lr=1e-4": (
        "warmup_stable_decay", 4, {"num_decay_steps": 10, "min_lr_ratio": 0.1},
    ),
    "train.min_lr=1e-4": ("cosine_with_min_lr", 4, {"min_lr": 1e-4}),
    "train.schedule=linear train.min_lr=1e-4": ("polynomial", 4, {"lr_end": 1e-4}),
}  # fmt: skip


@pytest.mark.parametrize(("overrides", "expected"), EQUAL.items(), ids=EQUAL)
def test_rates_are_those_of_transformers(overrides: str, expected: tuple[str, int, dict[str, Any]]):
    """The learning rate of every step equals that of get_scheduler with the same options."""
    config = config_of(*overrides.split())
    ours, theirs = optimizer_of(config), optimizer_of(config)
    name, warmup, options = expected
    schedule = get_scheduler(name, theirs, warmup, STEPS, options)
    assert rates(Schedule(config, ours, STEPS), ours) == rates(schedule, theirs)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "polynomial", "cosine_with_min_lr"])
def test_min_lr_is_where_a_schedule_ends(schedule: str):
    config = config_of(f"train.schedule={schedule}", "train.min_lr=2e-4")
    optimizer = optimizer_of(config)
    ours = Schedule(config, optimizer, STEPS)
    assert min(rates(ours, optimizer)[5:]) >= 2e-4
    assert ours.rate == pytest.approx(2e-4)


def test_a_schedule_free_optimizer_warms_up_by_itself():
    """Its rate rises in the steps of train.warmup and stays; the rate that is logged is the one that is used."""
    config = config_of("train.optimizer=schedule_free_adamw", "train.warmup=5")
    optimizer: Any = optimizer_of(config)
    schedule = Schedule(config, optimizer, STEPS)
    weight = optimizer.param_groups[0]["params"][0]
    logged, used = [], []
    for _ in range(8):
        weight.grad = torch.ones_like(weight)
        logged.append(schedule.rate)
        optimizer.train()
        optimizer.step()
        schedule.stepped()
        used.append(optimizer.param_groups[0]["scheduled_lr"])
    assert logged == used == pytest.approx([RATE * min(1, step / 5) for step in range(1, 9)])


LOSSES = [1.0, 0.9, 0.95, 0.97, 0.98, 0.99, 1.0, 1.1, 1.1, 1.1, 1.1, 0.5, 0.4, 0.3, 0.2, 0.1]
BY_EVALUATION = {
    "reduce_lr_on_plateau": (ReduceLROnPlateau, {"patience": 1, "factor": 0.5}, {"min_lr": 2e-4, "eps": 0}),
    "greedy": (GreedyLR, {"patience": 1, "factor": 0.5}, {"min_lr": 2e-4, "eps": 0}),
}


@pytest.mark.parametrize("name", BY_EVALUATION)
def test_a_schedule_that_follows_evaluations(name: str):
    """The rate is that of the library's scheduler after the same losses, and goes on from a saved state; steps do not
    change it, and groups keep their ratio."""
    library, options, more = BY_EVALUATION[name]
    settings = [f"train.schedule={name}", "train.schedule_options={patience=1, factor=0.5}", "train.min_lr=2e-4"]
    config = config_of(*settings, "lora={plus_ratio=4.0}")

    def made() -> torch.optim.Optimizer:
        first, second = nn.Linear(2, 2), nn.Linear(2, 2)
        groups = [{"params": first.parameters()}, {"params": second.parameters(), "lr": 4 * RATE}]
        return torch.optim.AdamW(groups, lr=RATE)

    ours, theirs, later = made(), made(), made()
    reference = library(theirs, **options | more | {"min_lr": [2e-4, 8e-4]})  # pyright: ignore[reportCallIssue]
    schedule = Schedule(config, ours, STEPS)
    found = set()
    for at, loss in enumerate(LOSSES):
        schedule.stepped()
        if at == 6:
            state = json.loads(json.dumps(schedule.state_dict()))
            later.load_state_dict(ours.state_dict())
            schedule, ours = Schedule(config, later, STEPS), later
            schedule.load_state_dict(state)
        schedule.evaluated(loss)
        reference.step(loss)
        assert [group["lr"] for group in ours.param_groups] == [group["lr"] for group in theirs.param_groups]
        assert ours.param_groups[1]["lr"] == 4 * schedule.rate
        found.add(schedule.rate)
    assert len(found) > 2
    assert min(found) == 2e-4


def test_parts_that_are_longer_than_the_run_are_refused():
    settings = ["train.schedule=warmup_stable_decay", "train.schedule_options={num_decay_steps=30}", "train.warmup=20"]
    config = config_of(*settings)
    with pytest.raises(UserError, match=r"warm-up 20, stable 0, decay 30\) have more steps than the run, 40"):
        Schedule(config, optimizer_of(config), STEPS)


@pytest.mark.parametrize(
    ("every", "steps", "expected"),
    [(7, 40, 7), (0.25, 40, 10), (0.1, 30, 3), (0.1, 45, 5), (0.01, 7, 1), (0.5, 1, 1), (0.99, 3, 3)],
)
def test_a_share_of_all_steps(every: float, steps: int, expected: int):
    """A share is rounded up, so it never asks for more than it says; a number of steps is itself."""
    assert every_so_many(every, steps) == expected
