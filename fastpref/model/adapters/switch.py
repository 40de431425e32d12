"""Several adapters on one model: which of them compute, and which is trained.

A model has at most three, by PEFT's names for them: the policy's, that of the reference, and the one below the policy's
if a new adapter is stacked on an old one. PEFT's own `set_adapter` and `disable_adapter` decide what is trained
together with what computes; here a reference computes between the policy's forward and backward pass, so what is
trained stays as it is.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

POLICY, REFERENCE, BELOW = "default", "reference", "below"


def switch(module: nn.Module, names: Sequence[str]) -> None:
    """Let exactly these adapters compute in a model or a part of it; none of them leaves the base model."""
    for part in _parts(module):
        own = list(names)
        if isinstance(part, AuxiliaryTrainingWrapper):  # holds a module in full for some adapters: the last one counts
            own = [name for name in names if name in part._adapters][-1:]
        part._active_adapter = own
        part._disable_adapters = not own


@contextmanager
def only(module: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Let exactly these adapters compute inside the block. What is trained does not change."""
    before = [(part, part._active_adapter, part._disable_adapters) for part in _parts(module)]
    switch(module, names)
    try:
        yield
    finally:
        for part, active, disabled in before:
            part._active_adapter, part._disable_adapters = active, disabled


def train_only(module: nn.Module, name: str) -> None:
    """Train the weights of one adapter, and those of no other."""
    for own, weights in adapter_weights(module):
        for parameter in weights:
            parameter.requires_grad_(own == name)


def adapter_weights(module: nn.Module) -> Iterator[tuple[str, list[nn.Parameter]]]:
    """Yield the name of an adapter and weights of it, for every module that has some."""
    for part in _parts(module):
        for layer in part.adapter_layer_names:
            for name, inner in attrgetter(layer)(part).items():
                yield name, list(inner.parameters()) if isinstance(inner, nn.Module) else [inner]


def adapters_nbytes(module: nn.Module, *names: str) -> int:
    """Return the bytes of the weights of these adapters."""
    return sum(parameter.nbytes for name, own in adapter_weights(module) if name in names for parameter in own)


def _parts(module: nn.Module) -> list[Any]:
    return [part for part in module.modules() if isinstance(part, BaseTunerLayer | AuxiliaryTrainingWrapper)]
