"""Activation checkpointing of some decoder layers, and its inputs in host memory (Chen et al., arXiv 1604.06174).

A checkpointed layer keeps only its input and computes everything else a second time in the backward pass. The first
layers are the ones to take: when the backward pass reaches them, whatever the later layers kept is already freed, so
what a checkpointed layer makes again comes on top of little.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

Saving = Callable[[], AbstractContextManager[Any]]  # decides where what a checkpointed layer keeps lies


def checkpoint_layers(model: PreTrainedModel, count: int | None = None, *, saving: Saving | None = None) -> int:
    """Checkpoint the first `count` decoder layers of a model that has none checkpointed, or all. How many those are.

    A model whose layers are not of transformers' kind is all or nothing, and counts as one layer. One that cannot be
    checkpointed stays as it is: 0.
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
    # What is saved inside goes to checkpoint's own hooks, so these meet the layer's input alone: no weight, no mask.
    with saving():
        return checkpoint(function, *args, use_reentrant=False)


def in_host_memory(device: torch.device) -> Saving:
    """Inputs of checkpointed layers go to pinned host memory and come back when the backward pass asks for them."""
    return partial(torch.autograd.graph.save_on_cpu, pin_memory=True, device_type=device.type)


def decoder_layers(model: PreTrainedModel) -> list[GradientCheckpointingLayer]:
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def can_be_checkpointed(model: PreTrainedModel) -> bool:
    """Whether the code of this model knows gradient checkpointing: some say that they do, and have no layer for it."""
    said = bool(getattr(model, "supports_gradient_checkpointing", False))
    return said and any(hasattr(module, "gradient_checkpointing") for module in model.modules())


def all_checkpointed(model: PreTrainedModel) -> bool:
    """Whether no layer keeps its activations."""
    flags = [layer.gradient_checkpointing for layer in decoder_layers(model)]
    return all(flags) if flags else any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def layers_needed(
    layers: int,
    without: int,  # bytes of a step if no layer is checkpointed
    but_one: int,  # if all are but one
    available: int,
) -> int:
    """The fewest checkpointed layers with which a step fits, or all of them. Layers count as alike.

    The last layer to be checkpointed saves nothing like the others: what one layer makes again is held in any case.
    """
    if without <= available:
        return 0
    if but_one > available or but_one >= without:
        return layers
    return -(-(without - available) * (layers - 1) // (without - but_one))
