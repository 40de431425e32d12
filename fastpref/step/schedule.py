"""The schedule of the learning rate, by transformers' `get_scheduler`, and numbers that may be shares of all steps."""

import math
import warnings
from typing import Any

import torch
from transformers import get_scheduler

from fastpref.config import Config
from fastpref.config.optimization import SCHEDULES, STEPS
from fastpref.errors import UserError


def warmup_steps(config: Config, steps: int) -> int:
    """Return the number of warm-up steps of a run of `steps` steps."""
    return round(config.warmup if config.warmup >= 1 else config.warmup * steps)


def every_so_many(every: float, steps: int) -> int:
    """Return the steps between two evaluations or checkpoints, for a number of steps or a share of all, rounded up."""
    return int(every) if every >= 1 else math.ceil(every * steps - 1e-9)  # 0.1 · 30 is a little more than 3


class Schedule:
    """The schedule of a run's learning rates. Those of the groups keep their ratios, where nothing else is said.

    `inner` is a scheduler of torch's interface that changes the optimizer's groups.
    """

    def __init__(self, config: Config, optimizer: Any, steps: int):
        """Make the schedule of a run of `steps` steps for an optimizer, which Accelerate has not prepared.

        Raises UserError for parts of a schedule that are longer than the run.
        """
        self._optimizer = optimizer
        self._by_evaluation = SCHEDULES[config.schedule].by_evaluation
        self.inner = _scheduler(config, optimizer, steps)

    @property
    def rate(self) -> float:
        """The learning rate of the first group in the next step. Schedule-free optimizers warm up by themselves."""
        group = self._optimizer.param_groups[0]
        warmup = group.get("warmup_steps", 0)
        return float(group["lr"]) * (min(1.0, (group["k"] + 1) / warmup) if warmup else 1.0)

    def stepped(self) -> None:
        """Go on after an optimizer step, unless float16's scaler left it out."""
        if not self._by_evaluation and not getattr(self._optimizer, "step_was_skipped", False):
            self.inner.step()

    def evaluated(self, loss: float) -> None:
        """Go on after an evaluation with this loss."""
        if self._by_evaluation:
            self.inner.step(loss)

    def follow(self, optimizer: Any) -> None:
        """Follow the optimizer as Accelerate has prepared it, which knows the steps that its scaler left out."""
        self._optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state)


def _scheduler(config: Config, optimizer: torch.optim.Optimizer, steps: int) -> Any:
    name = config.schedule
    options: dict[str, Any] = dict(config.train.schedule_options)
    traits, lowest, warmup = SCHEDULES[name], config.train.min_lr, warmup_steps(config, steps)
    if "warmup_steps" in optimizer.defaults:  # a schedule-free optimizer warms up by itself
        warmup = 0
    if name == "constant":  # that of transformers has no warm-up
        name = "constant_with_warmup"
    for option, wanted in traits.options.items():
        if wanted == STEPS and 0 < options.get(option, 1) < 1:
            options[option] = round(options[option] * steps)
    if lowest is not None:
        name = {"cosine": "cosine_with_min_lr", "linear": "polynomial"}.get(name, name)
        option = traits.floor[0]
        options[option] = lowest / config.learning_rate if option == "min_lr_ratio" else lowest
    if traits.by_evaluation:
        # The defaults are for rates of 1e-3 and more: a lowest rate of GreedyLR's, and changes that are too small.
        options = {"min_lr": 0.0, "eps": 0.0} | options
        for option in ("min_lr", "max_lr"):
            if option in options:  # one for each group, so that the groups keep their ratio
                ratios = [group["lr"] / config.learning_rate for group in optimizer.param_groups]
                options[option] = [options[option] * ratio for ratio in ratios]
    parts = {"warm-up": warmup, **{part: options.get(f"num_{part}_steps", 0) for part in ("stable", "decay")}}
    if name == "warmup_stable_decay" and sum(parts.values()) > steps:
        listed = ", ".join(f"{part} {count}" for part, count in parts.items())
        raise UserError(f"train.schedule: its parts ({listed}) have more steps than the run, {steps}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Both num_training_steps and num_stable_steps")
        return get_scheduler(name, optimizer, warmup, steps, options)
