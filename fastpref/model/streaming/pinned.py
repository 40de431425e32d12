"""Buffers of host memory that a GPU can read while it computes."""

import mmap
import sys

import torch
from torch import Tensor

from fastpref.errors import UserError


def pinned(size: int) -> Tensor:
    """Return a buffer [size] uint8, locked in host memory if there is a GPU. Raises UserError if it cannot be locked.

    torch's own allocator of pinned memory rounds each size up to a power of two, so the buffer is registered instead.
    It is unlocked when the last tensor that lies in it is gone.
    """
    if not size or not torch.cuda.is_available():
        return torch.empty(size, dtype=torch.uint8)
    pages = _Pages(-1, size)
    buffer = torch.frombuffer(pages, dtype=torch.uint8)  # which keeps `pages`
    status = int(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), size, 0))  # pyright: ignore[reportOptionalMemberAccess]
    if status:
        raise UserError(
            f"model.streaming: the system does not lock {size:,} bytes of host memory for the GPU (CUDA error "
            f"{status}); raise the limit (ulimit -l), close other programs, or take a smaller model"
        )
    pages.locked = buffer.data_ptr()
    return buffer


class _Pages(mmap.mmap):
    """Pages of memory that nothing else lies in: no two registrations share one."""

    locked = 0  # their address, once they are registered

    def __del__(self) -> None:
        # CUDA must forget them before they are unmapped, because the next ones may get the same address.
        if self.locked and not sys.is_finalizing():
            torch.cuda.synchronize()  # a copy may still read them
            torch.cuda.cudart().cudaHostUnregister(self.locked)  # pyright: ignore[reportOptionalMemberAccess]
