"""Which modules of a model are fused experts, whose forward pass transformers defines for all families alike."""

import inspect
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import use_experts_implementation

# The options of transformers' decorator for experts that compute.py follows.
_OPTIONS = {"is_concatenated", "is_transposed", "has_bias", "has_gate", "has_post_expert_norm"}
_OTHERS = {"experts_class", "experts_interface"}


def is_fused_experts(module: nn.Module) -> bool:
    """Return whether a module holds all experts of a layer and computes as transformers' experts do.

    transformers computes the experts of a class that it has decorated by one function for grouped products, whatever
    the family. Experts of other classes may compute anything.
    """
    kind: Any = type(module)
    if not hasattr(kind, "_apply_gate") or not hasattr(kind.forward, "__wrapped__") or not _known_options():
        return False
    if not all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed", "num_experts")):
        return False
    weights = [module._parameters.get(name) for name in weight_names(module)]
    return not getattr(module, "_is_expert_parallel", False) and all(
        weight is not None and len(shape_of(weight)) == 3 for weight in weights
    )


def fused_experts(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the fused experts of a model with their names."""
    for name, module in model.named_modules():
        if is_fused_experts(module):
            yield name, module


def weight_names(experts: Any) -> tuple[str, str]:
    """Return the names of the parameters that hold the weights of fused experts, in the order of their computation."""
    return ("gate_up_proj" if experts.has_gate else "up_proj"), "down_proj"


def shape_of(parameter: Tensor) -> torch.Size:
    """Return the shape of a parameter, also of experts in few bits, whose numbers lie in another shape."""
    return getattr(parameter, "ds_shape", parameter.shape)


@cache
def _known_options() -> bool:
    """Return whether the installed transformers has no option for experts that is unknown here."""
    return set(inspect.signature(use_experts_implementation).parameters) <= _OPTIONS | _OTHERS
