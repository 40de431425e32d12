"""What to change in a config whose steps find no memory: the cheapest changes first, and counted."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fastpref.config import Config, LoraConfig
from fastpref.data.example import Example
from fastpref.memory.activations import MARGIN, as_loaded
from fastpref.memory.step import count_step
from fastpref.model.gradient_checkpointing import decoder_layers
from fastpref.model.load import Loaded
from fastpref.run.resume import may_change
from fastpref.training.faults import Held, in_words

Count = Callable[[Config], int]  # the bytes of a step by a config


@dataclass(frozen=True)
class Advice:
    """Overrides, all to be taken together."""

    overrides: tuple[str, ...]
    size: int | None = None  # bytes of a step with them, where it can be counted
    fits: bool = True

    def __str__(self) -> str:
        counted = "" if self.size is None else f" (a step is counted at {in_words(self.size)})"
        what = "would most likely fit" if self.fits else "takes least, and will hardly fit either"
        lost = [override for override in self.overrides if not may_change(override.partition("=")[0])]
        anew = f"; a run is not resumed with {' '.join(lost)}, so start a new one" if lost else ""
        return f"What {what}{counted}: {' '.join(self.overrides)}{anew}"


def advice(config: Config, held: Held, count: Count | None) -> Advice:
    """As few changes as it takes, in the order of what they cost; by a rule of thumb where nothing can be counted.

    What the config itself is counted at did not fit, however large the device is: something else may lie there too.
    """
    changes = list(_changes(config, held))
    if count is None:
        return Advice((_override(*changes[0]),))
    try:
        size = count(config)
        fitting = int(min(size, held.device or size) * (1 - MARGIN))
        taken: dict[str, Any] = {}
        for key, value in changes:
            counted = count(_changed(config, taken | {key: value}))
            if counted < 0.99 * size:
                size, taken[key] = counted, value
            if size <= fitting:
                break
    except Exception:  # a model's code may ask for the values of tensors, which fake ones have not
        return Advice((_override(*changes[0]),))
    if not taken:
        return Advice((_override(*changes[0]),))
    return Advice(tuple(_override(*change) for change in taken.items()), size, size <= fitting)


def step_counter(loaded: Loaded, microbatch: Sequence[Example], device: torch.device, *, sharded: bool) -> Count | None:
    """Counts a step of one micro-batch of this model. What one device holds of a sharded model cannot be counted."""
    if sharded or not microbatch:
        return None
    checkpointed = sum(layer.gradient_checkpointing for layer in decoder_layers(loaded.model))

    def count(config: Config) -> int:
        layers = None if config.train.checkpointing is True else checkpointed
        examples = [_cut(example, config.tokens.max_length) for example in microbatch]
        return count_step(as_loaded(config, loaded), device, layers=layers, examples=examples).total

    return count


def _cut(example: Example, length: int) -> Example:
    """With no more than `length` tokens of the prompt and any of its completions."""
    completions = tuple(completion[: length - 1] for completion in example.completions)
    rest = length - max(map(len, completions))
    return replace(example, prompt=example.prompt[-rest:], completions=completions, contexts=())


def _changes(config: Config, held: Held) -> Iterator[tuple[str, Any]]:
    """Keys and values: first what costs time, then what changes the weights; the least first."""
    adapters, on_cpu = config.lora is not None, held.on_cpu
    if not adapters and held.device is not None and held.fixed > 0.7 * held.device:
        adapters = True
        yield "lora", {}
    tokens = min(config.tokens_per_microbatch, held.tokens)
    while tokens > held.longest:
        tokens = max(held.longest, tokens // 2)
        yield "train.tokens_per_microbatch", tokens
    if not held.checkpointing:
        yield "train.checkpointing", True
    if not config.train.offload_activations and not on_cpu:
        yield "train.offload_activations", True
    if not config.train.optimizer.endswith("8bit") and not held.sharded:
        yield "train.optimizer", f"{config.train.optimizer}_8bit"
    if not adapters:
        yield "lora", {}
    if config.model.quantization == "none" and not held.sharded:
        yield "model.quantization", "nf4"
    yield "tokens.max_length", max(2, min(config.tokens.max_length, held.longest) // 2)


def _override(key: str, value: Any) -> str:
    return f"{key}={str(value).lower() if isinstance(value, bool) else value}"


def _changed(config: Config, values: Mapping[str, Any]) -> Config:
    for key, value in values.items():
        table, _, name = key.partition(".")
        if not name:
            config = config.model_copy(update={table: LoraConfig(**value)})
            continue
        config = config.model_copy(update={table: getattr(config, table).model_copy(update={name: value})})
    return config
