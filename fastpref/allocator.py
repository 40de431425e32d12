"""The options of torch's allocator of GPU memory."""

import os
import sys

import torch

_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
_OPTIONS = "expandable_segments:True"


def let_segments_grow() -> None:
    """Let the allocator map memory into segments that grow, unless the user has set its options or used the GPU.

    Micro-batches differ in length, and with segments of a fixed size each length leaves gaps that no later one fits.
    Host memory, pinned or managed, has allocators of its own. The option is for CUDA on Linux.
    """
    known = sys.platform == "linux" and torch.version.hip is None
    if known and not torch.cuda.is_initialized() and not any(name in os.environ for name in _VARIABLES):
        os.environ[_VARIABLES[0]] = _OPTIONS  # which torch reads when it first allocates
