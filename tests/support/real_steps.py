"""The memory of steps on real tensors, with which tests compare counts on fake ones."""

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from functools import partial

import torch

from fastpref.config import Config
from fastpref.data.example import Example
from fastpref.memory.allocations import PeakStorage
from fastpref.model.gradient_checkpointing import checkpoint_layers
from fastpref.model.load import load_model
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

    `layers` is the number of decoder layers with gradient checkpointing, or None for all.
    """
    loaded = load_model(config, CPU)
    checkpoint_layers(loaded.model, layers)
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
    weights = sum(t.nbytes for t in [*loaded.model.parameters(), *loaded.model.buffers()])
    if config.loss.uses_reference and config.reference.mode == "copy":
        weights += sum(p.nbytes for p in loaded.model.parameters())
    loaded.policy.train()
    with PeakStorage() as memory:
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
