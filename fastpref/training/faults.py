"""What can go wrong in a run, told so that a person can act: interrupts, numbers that are not finite, no memory."""

import math
import os
import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch

from fastpref.config import Config
from fastpref.data.batch import plan_microbatches
from fastpref.data.example import Example
from fastpref.errors import UserError
from fastpref.model.failure import is_out_of_memory as is_out_of_memory
from fastpref.model.gradient_checkpointing import all_checkpointed, can_be_checkpointed
from fastpref.model.load import Loaded
from fastpref.step.objective import Objective
from fastpref.step.reference import ModelReference

SKIPS_IN_ROW = 10  # that many steps left out one after the other are no accident
_WORKSPACE = 128 << 20  # what `linear_logprob` takes if it is not told otherwise


class Interrupt:
    """Ctrl-C or SIGTERM: the step at hand is finished first. A second one stops at once."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


class NotFinite(UserError):
    """A loss or gradient is not finite. Nothing has been updated with it."""


def not_finite(step: int, loss: float, norm: float, examples: Sequence[Example], objective: Objective) -> str:
    """Which step it is and which rows make it so. To be asked before the gradients are cleared."""
    what = f"step {step}: loss {loss}, gradient norm {norm}"
    weights = [name for name, p in objective.policy.named_parameters() if not torch.isfinite(p).all()]
    if weights:
        return f"{what}; the weights themselves are not finite: {_some(weights)}; its rows are {_places(examples)}"
    alone = [] if math.isfinite(loss) else _not_finite_alone(examples, objective)
    if alone:
        return f"{what}; of its {len(examples)} rows these give such a loss by themselves: {_places(alone)}"
    trained = [(name, p.grad) for name, p in objective.policy.named_parameters() if p.grad is not None]
    gradients = [name for name, gradient in trained if not torch.isfinite(gradient).all()]
    where = ""
    if 0 < len(gradients) < len(trained):  # clipping by a norm that is NaN makes all of them NaN
        where = f"; the gradients that are not finite are of {_some(gradients)}"
    return f"{what}{where}; its rows are {_places(examples)}"


def _not_finite_alone(examples: Sequence[Example], objective: Objective) -> list[Example]:
    """A forward pass a row, without dropout: cheap beside a run that stops."""
    objective.policy.eval()
    try:
        return [e for e in examples if not math.isfinite(objective.evaluate([e], 1).result()["loss"])]
    finally:
        objective.policy.train()


def _places(examples: Sequence[Example]) -> str:
    return "; ".join(dict.fromkeys(str(example.row.place) for example in examples))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@dataclass(frozen=True)
class Held:
    """Bytes of what a run holds all the time, and what it computes at once."""

    weights: int
    gradients: int
    optimizer: int
    reference: int
    workspace: int
    tokens: int  # of the largest micro-batch
    longest: int  # tokens of the longest example, which cannot be cut further
    device: int | None  # all that there is
    checkpointing: bool  # whether the activations of all layers that can be are computed twice
    microbatch: tuple[Example, ...] = ()  # the largest one
    on_cpu: bool = False
    sharded: bool = False  # by FSDP

    @property
    def fixed(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.reference

    def __str__(self) -> str:
        parts = {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "the reference's copy": self.reference,
            "the head's workspace": self.workspace,
        }
        said = ", ".join(f"{name} {in_words(count)}" for name, count in parts.items() if count)
        of = "" if self.device is None else f", of {in_words(self.device)} in all"
        return f"{said}{of}; beside them the activations of a micro-batch of {self.tokens:,} tokens"


def held(
    config: Config,
    loaded: Loaded,
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    examples: Sequence[Example],
) -> Held:
    """What is in memory while a step of `examples` is computed."""
    weights = sum(p.numel() * p.element_size() for p in loaded.model.parameters())
    trained = sum(p.numel() * p.element_size() for p in loaded.model.parameters() if p.requires_grad)
    tensors = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    counted = sum(v.numel() * v.element_size() for v in tensors)
    parts = plan_microbatches(examples, objective.layout, objective.budget)
    largest = max(([examples[i] for i in part] for part in parts), key=_tokens, default=[])
    device = objective.device
    return Held(
        weights=weights,
        gradients=trained,
        optimizer=counted or 2 * trained,  # AdamW makes its two moments in the first step
        reference=objective.reference.nbytes if isinstance(objective.reference, ModelReference) else 0,
        workspace=_WORKSPACE,
        tokens=_tokens(largest),
        longest=max((_tokens([example]) for example in examples), default=0),
        device=torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else _host_memory(),
        checkpointing=all_checkpointed(loaded.model) or not can_be_checkpointed(loaded.model),
        microbatch=tuple(largest),
        on_cpu=device.type == "cpu",
        sharded=objective.processes.sharded,
    )


def _tokens(examples: Sequence[Example]) -> int:
    return sum(len(example.prompt) + sum(map(len, example.completions)) for example in examples)


def _host_memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None


def in_words(count: int) -> str:
    """A number of bytes."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**29 else f"{count / 2**20:.1f} MiB"
