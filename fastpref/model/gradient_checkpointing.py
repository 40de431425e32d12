"""Gradient checkpointing of some decoder layers, with their inputs in host memory if wanted (arXiv 1604.06174).

A checkpointed layer keeps only its input and recomputes everything else in the backward pass. The first layers are the
best choice: when the backward pass reaches them, the activations of the later layers are already freed, so the
recomputed ones come on top of little.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

Saving = Callable[[], AbstractContextManager[Any]]  # makes a context that decides where a layer stores its input


def checkpoint_layers(model: PreTrainedModel, count: int | None = None, *, saving: Saving | None = None) -> int:
    """Turn on gradient checkpointing for the first `count` decoder layers, by default all; returns their number.

    The model must have no checkpointed layers yet. A model whose layers are not of transformers' kind is checkpointed
    as a whole, and counts as one layer. A model without gradient checkpointing stays as it is, and counts as 0.
    """
    if not can_be_checkpointed(model):
        return 0
    layers = decoder_layers(model)
    count = max(1, len(layers)) if count is None else count
    if not count:
        return 0
    if hasattr(model, "activation_checkpointing_enable"):  # the name from transformers 5.2x on
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # The embeddings' output need not require a gradient: without reentrance layers are checkpointed all the same.
    model.disable_input_require_grads()
    for place, layer in enumerate(layers):  # transformers 5.23 has "every n-th", which is not "the first n"
        layer.gradient_checkpointing = place < count
    if saving is not None:
        for module in model.modules():
            if hasattr(module, "_gradient_checkpointing_func"):
                setattr(module, "_gradient_checkpointing_func", partial(_checkpoint_into, saving))  # noqa: B010
    return count


def _checkpoint_into(saving: Saving, function: Callable[..., Any], *args: Any) -> Any:
    # `checkpoint` has its own hooks for tensors saved inside, so `saving` gets only the layer's input, not weights.
    with saving():
        return checkpoint(function, *args, use_reentrant=False)


def in_host_memory(device: torch.device) -> Saving:
    """Return a `Saving` that keeps the inputs of checkpointed layers in pinned host memory until the backward pass."""
    return partial(torch.autograd.graph.save_on_cpu, pin_memory=True, device_type=device.type)


def decoder_layers(model: PreTrainedModel) -> list[GradientCheckpointingLayer]:
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def can_be_checkpointed(model: PreTrainedModel) -> bool:
    """Return whether a model supports gradient checkpointing: some claim to, but have no layer for it."""
    claimed = bool(getattr(model, "supports_gradient_checkpointing", False))
    return claimed and any(hasattr(module, "gradient_checkpointing") for module in model.modules())


def all_checkpointed(model: PreTrainedModel) -> bool:
    """Return whether all layers have gradient checkpointing."""
    flags = [layer.gradient_checkpointing for layer in decoder_layers(model)]
    return all(flags) if flags else any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def layers_needed(layers: int, without: int, but_one: int, available: int) -> int:
    """Return the fewest checkpointed layers with which a step fits, or all of them, if all layers are equally large.

    A step takes `without` bytes without checkpointed layers, and `but_one` bytes with all layers but one checkpointed.
    The last checkpointed layer saves much less than the others, because the recomputed activations of one layer are in
    memory in any case.
    """
    if without <= available:
        return 0
    if but_one > available or but_one >= without:
        return layers
    return -(-(without - available) * (layers - 1) // (without - but_one))
