"""The optimizers and schedules of the learning rate, and what each of them takes. Nothing here imports torch."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator

if TYPE_CHECKING:
    from fastpref.config.schema import Config


@dataclass(frozen=True)
class OptimizerTraits:
    """What a config may set of an optimizer, and its default learning rate."""

    betas: bool = True
    """Whether `train.betas` has a meaning."""
    epsilon: bool = True
    """Whether `train.epsilon` has a meaning."""
    rate: float = 1.0
    """Its default learning rate, as a multiple of AdamW's."""
    scheduled: bool = True
    """Whether it follows a schedule; otherwise it has none but its own warm-up."""


_LION = OptimizerTraits(epsilon=False, rate=0.2)  # its authors: three to ten times less than AdamW (arXiv 2302.06675)
OPTIMIZERS: dict[str, OptimizerTraits] = {
    **dict.fromkeys(("adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"), OptimizerTraits()),
    **dict.fromkeys(("lion", "lion_8bit", "paged_lion", "paged_lion_8bit"), _LION),
    "adafactor": OptimizerTraits(betas=False, epsilon=False),
    "muon": OptimizerTraits(betas=False, epsilon=False),
    # Its authors: up to ten times more than with a schedule, whose mean is about half of its highest rate.
    "schedule_free_adamw": OptimizerTraits(rate=2.0, scheduled=False),
}
_ALSO_CALLED = {  # by transformers
    "adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_bnb_8bit": "adamw_8bit",
    "paged_adamw_32bit": "paged_adamw", "lion_32bit": "lion", "paged_lion_32bit": "paged_lion",
}  # fmt: skip


def _own_name(value: Any) -> Any:
    return _ALSO_CALLED.get(value, value) if isinstance(value, str) else value


Optimizer = Annotated[
    Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "lion", "lion_8bit", "paged_lion",
            "paged_lion_8bit", "adafactor", "muon", "schedule_free_adamw"],
    BeforeValidator(_own_name),
]  # fmt: skip
ScheduleName = Literal[
    "auto", "cosine", "linear", "constant", "constant_with_warmup", "cosine_with_restarts", "polynomial",
    "inverse_sqrt", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay", "reduce_lr_on_plateau",
    "greedy",
]  # fmt: skip

NUMBER, WHOLE, STEPS, SWITCH = "a number", "a whole number", "a number of steps, or a share of all below 1", "a boolean"
_SHAPE = ("linear", "cosine", "1-sqrt")
_FLOOR = {"min_lr": NUMBER, "min_lr_rate": NUMBER}
_BY_EVALUATION = {
    "factor": NUMBER, "patience": WHOLE, "threshold": NUMBER, "threshold_mode": ("rel", "abs"), "cooldown": WHOLE,
    "min_lr": NUMBER, "eps": NUMBER,
}  # fmt: skip


@dataclass(frozen=True)
class ScheduleTraits:
    """What a config may set of a schedule."""

    options: Mapping[str, Any] = field(default_factory=dict)
    """The keys of `train.schedule_options`, each with what its value must be: words, or a tuple of names."""
    floor: tuple[str, ...] = ()
    """The options that say where the learning rate ends, as `train.min_lr` does; none where that has no meaning."""
    warms_up: bool = True
    by_evaluation: bool = False
    """Whether it follows the loss of evaluations, instead of the number of the step."""


SCHEDULES: dict[str, ScheduleTraits] = {
    "cosine": ScheduleTraits({"num_cycles": NUMBER}, ("min_lr",)),
    "linear": ScheduleTraits({}, ("lr_end",)),
    "constant": ScheduleTraits(),
    "constant_with_warmup": ScheduleTraits(),
    "cosine_with_restarts": ScheduleTraits({"num_cycles": WHOLE}),
    "polynomial": ScheduleTraits({"power": NUMBER, "lr_end": NUMBER}, ("lr_end",)),
    "inverse_sqrt": ScheduleTraits({"timescale": WHOLE}),
    "cosine_with_min_lr": ScheduleTraits({"num_cycles": NUMBER} | _FLOOR, tuple(_FLOOR)),
    "cosine_warmup_with_min_lr": ScheduleTraits(
        {"num_cycles": NUMBER, "warmup_lr_rate": NUMBER} | _FLOOR, tuple(_FLOOR)
    ),
    "warmup_stable_decay": ScheduleTraits(
        {"num_decay_steps": STEPS, "num_stable_steps": STEPS, "warmup_type": _SHAPE, "decay_type": _SHAPE,
         "min_lr_ratio": NUMBER, "num_cycles": NUMBER},
        ("min_lr_ratio",),
    ),
    "reduce_lr_on_plateau": ScheduleTraits(_BY_EVALUATION, ("min_lr",), warms_up=False, by_evaluation=True),
    "greedy": ScheduleTraits(
        _BY_EVALUATION | {"warmup": WHOLE, "max_lr": NUMBER, "smooth": SWITCH, "window_size": WHOLE,
                          "reset_start": WHOLE},
        ("min_lr",), warms_up=False, by_evaluation=True,
    ),
}  # fmt: skip
POLYNOMIAL_END = 1e-7  # transformers' default of lr_end


def optimization_mistakes(config: "Config") -> Iterator[str]:
    """Yield messages about keys of [train] and [lora] that contradict each other, each beginning with its key."""
    train, name = config.train, config.train.optimizer
    optimizer = OPTIMIZERS[name]
    takes_none = "has no such setting; remove the key, or take adamw"
    if train.betas is not None and not optimizer.betas:
        yield f"train.betas: {name} {takes_none}"
    if train.epsilon is not None and not optimizer.epsilon:
        yield f"train.epsilon: {name} {takes_none}"
    if not optimizer.scheduled and train.schedule not in ("auto", "constant", "constant_with_warmup"):
        yield (
            f"train.schedule: {name} needs no schedule and takes none, its weights are averages; remove the key, or "
            'take train.optimizer = "adamw"'
        )
    yield from _schedule_mistakes(config)


def _schedule_mistakes(config: "Config") -> Iterator[str]:
    train, name = config.train, config.schedule
    schedule, options = SCHEDULES[name], train.schedule_options
    for option, value in options.items():
        if option not in schedule.options:
            yield f"train.schedule_options.{option}: {_unknown(name, option, schedule.options)}"
        elif not _suits(value, schedule.options[option]):
            wanted = schedule.options[option]
            words = wanted if isinstance(wanted, str) else f"one of {', '.join(wanted)}"
            yield f"train.schedule_options.{option}: must be {words}, got {value!r}"
    given = [option for option in schedule.floor if option in options]
    if train.min_lr is not None:
        if not schedule.floor:
            with_end = ", ".join(other for other, traits in SCHEDULES.items() if traits.floor)
            yield f"train.min_lr: the schedule {name} does not end at a lowest rate; remove the key, or take {with_end}"
        elif given:
            yield f"train.min_lr: train.schedule_options.{given[0]} says it already; remove one of them"
        if train.min_lr >= config.learning_rate:
            yield f"train.min_lr: must be less than the learning rate, {config.learning_rate:g}, got {train.min_lr:g}"
    elif name in ("cosine_with_min_lr", "cosine_warmup_with_min_lr") and not given:
        yield f"train.schedule: {name} needs train.min_lr, the lowest learning rate"
    elif name == "polynomial":
        end = options.get("lr_end", POLYNOMIAL_END)
        if isinstance(end, int | float) and end >= config.learning_rate:
            yield (
                f"train.schedule: polynomial ends at {end:g}, which is not less than the learning rate, "
                f"{config.learning_rate:g}; set train.min_lr"
            )
    if len(given) > 1:
        yield f"train.schedule_options.{given[1]}: {given[0]} says already where the rate ends; remove one of them"
    if name == "warmup_stable_decay" and "num_decay_steps" not in options:
        yield (
            "train.schedule: warmup_stable_decay needs train.schedule_options = { num_decay_steps = 0.2 }, the steps "
            "in which the rate falls at the end; below 1 it is a share of all steps"
        )
    if schedule.by_evaluation and (isinstance(config.eval.every, str) or not config.eval.wanted):
        yield f"train.schedule: {name} follows the held-out loss; hold out data, and set eval.every"
    if train.warmup and not schedule.warms_up:
        yield f"train.warmup: the schedule {name} has no warm-up; remove the key"


def _unknown(schedule: str, option: str, known: Mapping[str, Any]) -> str:
    near = get_close_matches(option, known, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return f"the schedule {schedule} has no such option{hint}; it has {', '.join(known) or 'none'}"


def _suits(value: Any, wanted: Any) -> bool:
    if wanted == SWITCH:
        return isinstance(value, bool)
    if isinstance(value, bool):
        return False
    if wanted == WHOLE:
        return isinstance(value, int) and value >= 0
    if wanted in (NUMBER, STEPS):
        whole = wanted == NUMBER or isinstance(value, int) or 0 < value < 1
        return isinstance(value, int | float) and value >= 0 and whole
    return value in wanted
