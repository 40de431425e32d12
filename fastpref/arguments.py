"""Checks of the arguments of public functions: every message names the function, the argument and what was found."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastpref.kernels.device import with_index

BACKENDS = ("auto", "torch", "triton")


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True)
class Arguments:
    """The arguments of one public function."""

    function: str
    like: str  # the argument on whose device all tensors must be

    def check_tensor(self, name: str, value: Any, dimensions: int, like: Any) -> None:
        """Raise for what is no tensor, lies on another device than the tensor `like`, or has other dimensions."""
        if not isinstance(value, Tensor):
            raise TypeError(f"{self.function}: {name} must be a torch.Tensor, got {type(value).__name__}")
        if isinstance(like, Tensor):
            self.check_device(name, value.device, like)
        if value.dim() != dimensions:
            plural = "" if dimensions == 1 else "s"
            shape = tuple(value.shape)
            raise ValueError(f"{self.function}: {name} must have {dimensions} dimension{plural}, got shape {shape}")

    def check_device(self, name: str, device: torch.device, like: Tensor) -> None:
        if device != like.device and with_index(device) != like.device:
            raise ValueError(f"{self.function}: {name} is on {device}, {self.like} is on {like.device}")

    def check_dtype(self, name: str, dtype: torch.dtype, *allowed: torch.dtype) -> None:
        if dtype not in allowed:
            raise TypeError(f"{self.function}: {name} must be {' or '.join(map(str, allowed))}, got {dtype}")

    def check_backend(self, backend: Any) -> None:
        if backend not in BACKENDS:
            raise ValueError(f"{self.function}: backend is {backend!r}, known are {', '.join(BACKENDS)}")
