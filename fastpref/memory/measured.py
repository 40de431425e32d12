"""The memory of a run's steps: measured, and counted for a loaded model."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import psutil
import torch
from transformers import PreTrainedModel

from fastpref.config import Config, make_config
from fastpref.data.example import Example
from fastpref.data.longest import Microbatch, longest_of, longest_possible, microbatches
from fastpref.data.table import Examples
from fastpref.memory.fit import Count, OversizedStep
from fastpref.memory.step import StepMemory, count_step, heaviest
from fastpref.memory.streaming import in_host_memory, streaming_of
from fastpref.model.adapters.source import with_start
from fastpref.model.adapters.switch import BELOW, REFERENCE, adapters_nbytes
from fastpref.model.attention import has_attention
from fastpref.model.attention_choice import FLEX, VARLEN
from fastpref.model.gradient_checkpointing import all_checkpointed, can_be_checkpointed, decoder_layers
from fastpref.model.load import Loaded
from fastpref.model.packed import own_quantization
from fastpref.sizes import in_words
from fastpref.step.objective import Objective
from fastpref.step.reference import ModelReference

_WORKSPACE = 128 << 20  # bytes of tiles that `linear_logprob` allocates by default


def oversized_step(
    config: Config, loaded: Loaded, optimizer: torch.optim.Optimizer, objective: Objective, examples: Sequence[Example]
) -> OversizedStep:
    """Describe a step that ran out of memory, with what the run holds in any case; its activations count as 0."""
    model, device = loaded.model, objective.device
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    adapters = trained if config.lora is not None else 0
    frozen, shared = adapters_nbytes(model, BELOW, REFERENCE), adapters_nbytes(model, REFERENCE)
    states = [value for state in optimizer.state.values() for value in state.values()]
    moments = sum(value.nbytes for value in states if isinstance(value, torch.Tensor))
    layers = max(1, len(decoder_layers(model)))
    stream, hosted, slots = loaded.stream, 0, 0
    if stream is not None:
        hosted, slots = in_host_memory(loaded), sum(map(len, stream.slots))
    memory = StepMemory(
        weights=sum(p.nbytes for p in model.parameters()) - adapters - frozen - hosted + slots,
        adapters=adapters + frozen - shared,
        gradients=trained,
        optimizer=moments or 2 * trained,  # AdamW allocates its two moments in the first step
        reference=shared + (objective.reference.nbytes if isinstance(objective.reference, ModelReference) else 0),
        activations=0,
        head=_WORKSPACE,
        largest=0,
        layers=layers,
        checkpointed=layers if all_checkpointed(model) else _checkpointed(model),
        layout=loaded.layout,
        host=hosted,
        streamed=0 if stream is None else len(stream.layers),
    )
    parts = microbatches(config, examples, loaded.layout) or [longest_possible(config)]
    largest = max(parts, key=lambda part: part.tokens)
    on_gpu = device.type == "cuda"
    capacity = torch.cuda.get_device_properties(device).total_memory if on_gpu else psutil.virtual_memory().total
    return OversizedStep(
        config,
        memory,
        largest,
        device,
        capacity,
        sharded=objective.processes.sharded,
        checkpointable=can_be_checkpointed(model),
        quantised=own_quantization(model.config) is not None and config.model.quantization == "none",
    )


def step_counter(step: OversizedStep, loaded: Loaded) -> Count | None:
    """Return a function that counts the step's micro-batch with this model, or None for a sharded model."""
    if step.sharded:  # the part that one device holds cannot be counted
        return None

    @cache
    def count(overrides: tuple[str, ...]) -> StepMemory:
        config = with_start(make_config(step.config.model_dump(exclude_unset=True), overrides))
        same = config.train.checkpointing == step.config.train.checkpointing
        layers = step.memory.checkpointed if same else None
        same = config.model.streaming == step.config.model.streaming
        streaming = streaming_of(loaded) if same else None
        examples = [_cut(example, config.tokens.max_length) for example in step.microbatch.examples]
        config = as_loaded(config, loaded)
        return count_step(config, step.device, layers=layers, examples=examples, streaming=streaming)

    return count


def as_loaded(config: Config, loaded: Loaded) -> Config:
    """Return the config for counting, with `model.liger` and `model.attention` as the loaded model has them."""
    kernel = next((kernel for kernel in (FLEX, VARLEN) if has_attention(loaded.model, kernel.name)), None)
    attention = "sdpa" if kernel is None else kernel.wanted
    return config.but({"model.liger": loaded.liger and "auto", "model.attention": attention})


def _checkpointed(model: PreTrainedModel) -> int:
    return sum(layer.gradient_checkpointing for layer in decoder_layers(model))


def _cut(example: Example, length: int) -> Example:
    """Return the example, cut so that the prompt with each completion has at most `length` tokens."""
    completions = tuple(completion[: length - 1] for completion in example.completions)
    rest = length - max(map(len, completions))
    return replace(example, prompt=example.prompt[-rest:], completions=completions, contexts=())


class StepPeak:
    """The peak of the bytes allocated on a GPU since the first step; 0 on other devices.

    Loading a model may take more memory, so the allocator's peak is reset before the first step. It is reset only once,
    because `peak_memory` reads the same statistics.
    """

    def __init__(self, device: torch.device):
        self._device = device if device.type == "cuda" else None
        self.bytes = 0

    def start(self) -> None:
        if self._device is not None and not self.bytes:
            torch.cuda.reset_peak_memory_stats(self._device)

    def end(self) -> None:
        if self._device is not None:
            self.bytes = max(self.bytes, torch.cuda.max_memory_allocated(self._device))

    def against_estimate(self, config: Config, examples: Examples, loaded: Loaded) -> str:
        """Return a note that compares the measured peak with `count_step` for the run's largest micro-batch."""
        longest, layers = longest_of(config, examples, loaded.layout), _checkpointed(loaded.model)
        options: dict[str, Any] = {"layers": layers, "streaming": streaming_of(loaded)}
        config, gpu, measured = as_loaded(config, loaded), torch.device("cuda"), f"measured {in_words(self.bytes)}"

        def count(part: Microbatch) -> StepMemory:
            return count_step(config, gpu, examples=part.examples, further=part.further, **options)

        try:
            memory = heaviest(longest, count)
        except Exception as error:  # a model's code may read the values of tensors, which fake tensors do not have
            return f"memory of a step: {measured}; not estimated ({type(error).__name__})"
        change = self.bytes / memory.total - 1
        return f"memory of a step: estimated {in_words(memory.total)}, {measured} ({change:+.1%})"
