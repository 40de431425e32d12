"""Registration of `torch.library` operators so that a dispatch mode can still see inside them."""

from collections.abc import Callable
from typing import Any

import torch

# The eager implementation of every operator by name: a mode that looks inside runs it instead of the operator.
IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}


def operator(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Make a function of tensors, numbers and strings the operator `name`, which mutates nothing."""

    def register(function: Callable[..., Any]) -> Any:
        IMPLEMENTATIONS[name] = function
        return torch.library.custom_op(name, function, mutates_args=())

    return register
