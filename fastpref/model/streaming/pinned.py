"""Buffers of host memory that a GPU can read while it computes."""

import torch
from torch import Tensor

from fastpref.errors import UserError


def pinned(size: int) -> Tensor:
    """Return a buffer [size] uint8, locked in host memory if there is a GPU. Raises UserError if it cannot be locked.

    torch's own allocator of pinned memory rounds each size up to a power of two, so the buffer is registered instead.
    """
    buffer = torch.empty(size, dtype=torch.uint8)
    if torch.cuda.is_available() and size:
        status = torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), size, 0)
        if int(status):
            raise UserError(
                f"model.streaming: the system does not lock {size:,} bytes of host memory for the GPU (CUDA error "
                f"{int(status)}); raise the limit (ulimit -l), close other programs, or take a smaller model"
            )
    return buffer
