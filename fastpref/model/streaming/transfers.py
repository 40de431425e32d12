"""Copies of layers from host memory into slots: on a CUDA device beside its computations, on a CPU one at a time."""

from collections.abc import Sequence

import torch
from torch import Tensor


class HostTransfers:
    """Copies that are done when the call returns, for a device whose memory the host shares."""

    def __init__(self, sources: Sequence[Tensor], slots: Sequence[Tensor]):  # [bytes] uint8 each
        self.sources, self.slots = _bare(sources), _bare(slots)

    def copy(self, layer: int, slot: int) -> None:
        source = self.sources[layer]
        self.slots[slot][: len(source)].copy_(source)

    def wait(self, slot: int) -> None:
        pass

    def release(self, slot: int) -> None:
        pass


class CudaTransfers:
    """Copies from pinned memory on a CUDA stream of their own.

    Two events guard a slot: its copy waits for the last computation that reads what it held, and computations wait for
    its copy.
    """

    def __init__(self, sources: Sequence[Tensor], slots: Sequence[Tensor]):  # [bytes] uint8 each
        self.sources, self.slots = _bare(sources), _bare(slots)
        self._device = slots[0].device
        self._stream = torch.cuda.Stream(self._device)
        self._arrived = [torch.cuda.Event() for _ in slots]
        self._free = [torch.cuda.Event() for _ in slots]
        for place, slot in enumerate(slots):
            self.release(place)  # the allocator may have taken the memory from computations that still run
            slot.record_stream(self._stream)  # and must not give it to others while a copy is under way

    def copy(self, layer: int, slot: int) -> None:
        source = self.sources[layer]
        self._stream.wait_event(self._free[slot])
        with torch.cuda.stream(self._stream):
            self.slots[slot][: len(source)].copy_(source, non_blocking=True)
            self._arrived[slot].record(self._stream)

    def wait(self, slot: int) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._arrived[slot])

    def release(self, slot: int) -> None:
        self._free[slot].record(torch.cuda.current_stream(self._device))


def _bare(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return aliases whose changes autograd does not see: a slot that a graph keeps gets its numbers again."""
    return [tensor.data for tensor in tensors]
