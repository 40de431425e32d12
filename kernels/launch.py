"""Launching a Triton kernel: on the device of its tensors, and with options that no environment variable changes."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

# Options of every compilation, also in the compile report. a·b + c is one instruction with one rounding: Triton 3.9
# warns of its default, and 3.10 changes it.
COMPILE_OPTIONS = {"enable_fp_fusion": True}


def launch(kernel: Any, grid: tuple[Any, ...], *arguments: Any, **options: Any) -> None:
    """Launch a kernel of `triton.jit` over a grid; `options` are its constants, `num_warps` and `num_stages`.

    Triton launches on the current device, which need not be that of the tensors: a model may lie on several GPUs. So
    the device of the first tensor becomes the current one for the launch.

    A type checker gives a launch the signature of the kernel's body, which has no such options: so `kernel` is Any.
    """
    device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*arguments, **options, **COMPILE_OPTIONS)
