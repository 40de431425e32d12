"""Changes to a config that save memory, and the search for those that make a step fit a device.

There is one list of changes, CHANGES, in the order of their cost. `fastpref estimate` (`estimate.py`) and the message
of a run that is out of memory (`training/faults.py`) both search it, so a new change is added only here.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastpref.config import Config
from fastpref.data.longest import Microbatch
from fastpref.errors import UserError
from fastpref.memory.step import StepMemory
from fastpref.model.adapters.source import reference_kind

# The share of a device's memory that stays free, for fragmentation of the allocator's blocks and for the memory that
# libraries allocate inside an operation.
MARGIN = 0.1
_WORTHWHILE = 0.01  # the least share of a step's memory that a change must save
_SHORTEST = 512  # tokens: the least proposed `tokens.max_length`, or half of the rows' length if that is not longer

Count = Callable[[tuple[str, ...]], StepMemory]  # the memory of a step with these overrides of its config


@dataclass(frozen=True)
class OversizedStep:
    """A step that does not fit, and the properties that decide which changes can help."""

    config: Config
    memory: StepMemory  # counted, or measured in a run, where the activations are not known
    microbatch: Microbatch  # the largest one
    device: torch.device
    capacity: int  # bytes of the device
    sharded: bool = False  # by FSDP
    quantised: bool = False  # whether the model's checkpoint is stored quantised
    checkpointable: bool = True  # whether the model has gradient checkpointing

    @property
    def longest(self) -> int:
        """The number of tokens of the micro-batch's longest example, which cannot be divided."""
        return max(len(e.prompt) + sum(map(len, e.completions)) for e in self.microbatch.examples)


@dataclass(frozen=True)
class Change:
    """A key of the config, and its values with which a step takes less memory."""

    key: str
    values: Callable[[OversizedStep], Sequence[Any]]  # the least change first; empty if the change cannot help
    parts: tuple[str, ...] = ("activations", "head")  # the parts of StepMemory that become smaller


@dataclass(frozen=True)
class Proposal:
    """Overrides of a config, to be used together."""

    overrides: tuple[str, ...]
    memory: StepMemory | None = None  # of a step with these overrides, if it was counted
    fits: bool = True


def available(device: torch.device) -> int:
    """Return the bytes of a GPU that this process has allocated or may still allocate, minus the margin."""
    free, total = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - int(MARGIN * total)


def _total(memory: StepMemory) -> int:
    return memory.total


def propose(step: OversizedStep, count: Count, room: int, size: Callable[[StepMemory], int] = _total) -> Proposal:
    """Return the smallest changes with which a step takes at most `room` bytes, or those with which it takes the least.

    `size` says how many bytes a counted step takes.

    Changes are added in the order of their cost until the step fits. Then each is counted without, so that none remains
    that is not needed. Raises UserError if the step cannot be counted without changes.
    """
    memory = count(())
    taken: dict[str, list[str | None]] = {}  # by key: the overrides that were added, each stronger than the one before
    for change, override in _overrides(step):
        if sum(getattr(memory, part) for part in change.parts) < _WORTHWHILE * memory.total:
            continue  # a change that cannot save much is not worth counting
        more = {**_last(taken), change.key: override}
        less = _count(count, more)
        if less is None or less.total > (1 - _WORTHWHILE) * memory.total:
            continue
        taken.setdefault(change.key, [None]).append(override)
        memory = less
        if size(memory) <= room:
            break
    overrides = _last(taken)
    if size(memory) <= room:
        overrides, memory = _fewest(taken, memory, count, lambda memory: size(memory) <= room)
    return Proposal(tuple(overrides.values()), memory, size(memory) <= room)


def _last(taken: dict[str, list[str | None]]) -> dict[str, str]:
    return {key: values[-1] for key, values in taken.items() if values[-1] is not None}


def _fewest(
    taken: dict[str, list[str | None]], memory: StepMemory, count: Count, fits: Callable[[StepMemory], bool]
) -> tuple[dict[str, str], StepMemory]:
    """Weaken changes or leave them out, the most expensive first, as long as the step still fits. Count each time.

    A change that was needed when it was added may no longer be after a later one that saves more. Afterwards no single
    change can be left out.
    """
    for key in reversed(taken):
        values = taken[key]
        for fewer in range(1, len(values)):
            weaker = {**taken, key: values[:fewer]}
            smaller = _count(count, _last(weaker))
            if smaller is not None and fits(smaller):
                taken, memory = weaker, smaller
                break
    return _last(taken), memory


def first_change(step: OversizedStep) -> Proposal:
    """Return the change that most likely helps, by a rule of thumb, for a step that cannot be counted."""
    overrides = {}
    for change, override in _overrides(step):
        overrides.setdefault(change.key, override)
    crowded = step.memory.held > 0.7 * step.capacity
    if crowded and "lora" in overrides:  # weights, gradients and moments leave no room even for small micro-batches
        return Proposal((overrides["lora"],))
    return Proposal(tuple(overrides.values())[:1], fits=bool(overrides))


def _overrides(step: OversizedStep) -> Iterator[tuple[Change, str]]:
    for change in CHANGES:
        for value in change.values(step):
            yield change, f"{change.key}={str(value).lower() if isinstance(value, bool) else value}"


def _count(count: Count, overrides: dict[str, str]) -> StepMemory | None:
    try:
        return count(tuple(overrides.values()))
    except UserError:  # these changes conflict, or the model does not support them
        return None


def _no_copy(step: OversizedStep) -> list[str]:
    reference = step.config.reference
    if step.config.loss.uses_reference and reference_kind(step.config) == "model":
        return [] if step.config.precomputes else ["precompute"]
    plain = reference.dtype == reference.quantization == "auto"  # only a copy can have its own dtype or quantization
    return ["auto"] if step.config.loss.uses_reference and reference.mode == "copy" and plain else []


def _back_to_auto(step: OversizedStep) -> list[Any]:
    on_gpu = step.device.type != "cpu"  # where "auto" checkpoints layers
    return ["auto"] if step.config.train.checkpointing is False and on_gpu and step.checkpointable else []


def _smaller_microbatches(step: OversizedStep) -> list[int]:
    sizes = [min(step.config.tokens_per_microbatch, step.microbatch.tokens)]
    while sizes[-1] > step.longest:
        sizes.append(max(step.longest, sizes[-1] // 2))
    return sizes[1:]


def _all_layers(step: OversizedStep) -> list[bool]:
    return [True] if step.checkpointable and step.memory.checkpointed < step.memory.layers else []


def _offload(step: OversizedStep) -> list[bool]:
    useless = step.config.train.offload_activations or step.device.type == "cpu" or not step.checkpointable
    return [] if useless else [True]


def _streamed(step: OversizedStep) -> list[bool]:
    reference = step.config.reference
    copied = step.config.loss.uses_reference and (
        (reference.mode == "copy" and not _no_copy(step)) or reference_kind(step.config) == "model"
    )
    possible = step.config.lora is not None and not copied and not step.sharded and step.device.type != "cpu"
    return [True] if possible and not step.memory.streamed else []


def _moments_in_8_bits(step: OversizedStep) -> list[str]:
    """Return the same optimizer with 8-bit moments, or AdamW's if there is none. Adafactor's take less than these."""
    optimizer = step.config.train.optimizer
    if optimizer.endswith("8bit") or optimizer == "adafactor" or step.sharded:
        return []
    return [f"{optimizer}_8bit" if optimizer in ("adamw", "paged_adamw", "lion", "paged_lion") else "adamw_8bit"]


def _weights_in_4_bits(step: OversizedStep) -> list[str]:
    return [] if step.config.model.quantization == "nf4" or step.quantised or step.sharded else ["nf4"]


def _shorter_rows(step: OversizedStep) -> list[int]:
    lengths = [min(step.config.tokens.max_length, step.longest)]
    shortest = _SHORTEST if lengths[0] > _SHORTEST else max(2, lengths[0] // 2)
    while lengths[-1] > shortest:
        lengths.append(max(shortest, lengths[-1] // 2))
    return lengths[1:]


CHANGES: list[Change] = [
    # First changes that only cost time: they change results only by rounding.
    Change("reference.mode", _no_copy, ("reference",)),
    Change("train.layout", lambda step: ["auto"] if step.config.train.layout != "auto" else []),
    Change("train.checkpointing", _back_to_auto),
    Change("train.tokens_per_microbatch", _smaller_microbatches),
    Change("train.checkpointing", _all_layers),
    Change("train.offload_activations", _offload),
    Change("model.streaming", _streamed, ("weights",)),
    # Then changes that affect what the model learns.
    Change("train.optimizer", _moments_in_8_bits, ("optimizer",)),
    Change("lora", lambda step: [{}] if step.config.lora is None else [], ("gradients", "optimizer")),
    Change("model.quantization", _weights_in_4_bits, ("weights",)),
    Change("tokens.max_length", _shorter_rows),
]
