"""The memory of steps on real tensors, with which tests compare counts on fake ones."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastpref.config import Config
from fastpref.data.example import Example
from fastpref.memory.allocations import PeakStorage
from fastpref.memory.fake_stream import Copies
from fastpref.memory.streaming import in_host_memory
from fastpref.model.gradient_checkpointing import checkpoint_layers
from fastpref.model.load import Loaded, load_model
from fastpref.model.streaming.stream import Streaming
from fastpref.step.objective import Objective
from fastpref.step.optimizer import make_optimizer, training_weights
from fastpref.step.reference import make_reference

CPU = torch.device("cpu")


def real_steps(
    config: Config,
    steps: Iterable[Sequence[Example]],
    layers: int | None = None,
    autocast: torch.dtype | None = None,
) -> tuple[int, int]:
    """Return the bytes at the peak of the steps, and those held before them: weights, reference and moments.

    `layers` is the number of decoder layers with gradient checkpointing, or None for all. What a GPU's run has in host
    memory, streamed layers and inputs of layers, is no part of either.
    """
    loaded = load_model(config, CPU, streaming=Streaming() if config.model.streaming is True else None)
    memory = PeakStorage()
    saving = partial(_elsewhere, memory) if config.train.offload_activations else None
    checkpoint_layers(loaded.model, layers, saving=saving)
    half = partial(torch.autocast, "cpu", dtype=autocast, cache_enabled=False)
    mixed = nullcontext if autocast is None else half
    reference = make_reference(config, loaded, mixed)[0] if config.loss.uses_reference else None
    if autocast is not None:
        loaded.policy.forward = half()(loaded.policy.forward)
    if reference is not None and config.precomputes:
        reference = lambda batch: torch.zeros(len(batch.segments))  # noqa: E731
    optimizer = make_optimizer(loaded.policy, config)
    objective = Objective(loaded.policy, reference, config.loss, loaded.layout, config.tokens_per_microbatch, 0, CPU)
    parameters = [p for p in loaded.policy.parameters() if p.requires_grad]
    weights = _on_device(loaded)
    if config.loss.uses_reference and config.reference.mode == "copy":
        weights += sum(p.nbytes for p in loaded.model.parameters())
    loaded.policy.train()
    with memory, Copies().of_head():
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        with training_weights(optimizer):
            optimizer.step()  # makes the moments
        optimizer.zero_grad(set_to_none=True)
        moments = memory.current
        memory.start_again()
        for rows in steps:
            with training_weights(optimizer):
                objective.step(rows, lambda loss: loss.backward())
                torch.nn.utils.clip_grad_norm_(parameters, config.train.max_grad_norm)
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return weights + memory.peak, weights + moments


def _on_device(loaded: Loaded) -> int:
    """Return the bytes of a model's weights on the device, with the scales and tables of those in few bits."""
    held = [*loaded.model.parameters(), *loaded.model.buffers()]
    held += [tensor for parameter in loaded.model.parameters() for tensor in _scales(parameter)]
    slots = 0 if loaded.stream is None else sum(map(len, loaded.stream.slots))
    return sum(tensor.nbytes for tensor in held) - in_host_memory(loaded) + slots


def _scales(parameter: nn.Parameter) -> Iterator[Tensor]:
    states: list[Any] = [getattr(parameter, "quant_state", None)]
    states.append(getattr(states[0], "state2", None))
    for state in states:
        yield from (value for value in vars(state or object).values() if isinstance(value, Tensor))
    if isinstance(scales := getattr(parameter, "SCB", None), Tensor):
        yield scales


@contextmanager
def _elsewhere(memory: PeakStorage) -> Iterator[None]:
    """Keep what the block saves for the backward pass in host memory."""

    def moved(tensor: Tensor) -> Tensor:
        with memory.labelled(PeakStorage.HOST):
            return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(moved, torch.clone):
        yield
