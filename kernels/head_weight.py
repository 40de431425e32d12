"""The weight of a linear head, as an object that returns rows [a, b) of the vocabulary.

    DenseWeight        a tensor on the device
    FourBitWeight      bitsandbytes nf4 or fp4; each slice is dequantised when it is needed
    OffloadedWeight    a tensor in host memory; on a GPU the next slice is copied while the current one is used
    WidenedWeight      any of these with additional columns, of which the last are trained: LoRA
    CastWeight         any of these in another dtype; each slice is cast when it is needed

LoRA on a head, z = h·Wᵀ + s·(h·Aᵀ)·Bᵀ, is one wider product: [h, 0, s·h·Aᵀ]·[W, 0, B]ᵀ. So autograd computes the
gradient of A (and of a dropout before it) through the wider hidden states, the gradient of B is that of the additional
columns, and W + s·B·A is never merged, so it is never rounded.

`torch.library` operators take tensors and strings, so a weight is passed as its `tensors` and its `kind`, from which
`assemble` rebuilds it.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastpref.kernels.device import with_index

# A widened weight's rows are a multiple of this long, as far as the tiles step along rows. Rows that are no multiple of
# 16 cannot be copied in vectors, and 64 costs no product: the last step is a whole one anyway.
STEP = 64


class HeadWeight(ABC):
    """A head's weight [V, H]."""

    def __init__(
        self,
        shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,  # of the tensors that `rows` and `gather` return
        *,
        kind: str,
        tensors: Sequence[Tensor],
        copies: int = 0,  # temporary tensors of a slice's size that `rows` allocates
    ):
        self.shape, self.dtype, self.device = shape, dtype, device
        self.kind, self.tensors, self.copies = kind, list(tensors), copies

    @abstractmethod
    def rows(self, first: int, last: int) -> Tensor:
        """Return rows [first, last) of the vocabulary, [last − first, H]. Callers use ascending order."""

    @abstractmethod
    def gather(self, index: Tensor) -> Tensor:
        """Return the rows [N, H] of an index [N]."""

    @property
    def trained(self) -> Tensor | None:
        """The trainable part, the last T of the H columns, [V, T], or None. It has a dtype of its own."""
        return None

    def read_as(self, dtype: torch.dtype) -> "HeadWeight":
        """Return this weight with slices of a dtype, which are never held all at once."""
        return self if dtype == self.dtype else CastWeight(self, dtype)


class DenseWeight(HeadWeight):
    """A tensor on the device."""

    def __init__(self, weight: Tensor):  # [V, H]
        vocabulary, width = weight.shape
        super().__init__((vocabulary, width), weight.dtype, weight.device, kind="dense", tensors=[weight])
        self.weight = weight

    def rows(self, first: int, last: int) -> Tensor:
        return self.weight[first:last]

    def gather(self, index: Tensor) -> Tensor:
        return self.weight[index]

    @property
    def trained(self) -> Tensor:
        return self.weight


class FourBitWeight(HeadWeight):
    """A weight that bitsandbytes stores in 4 bits. H must be a multiple of the block size, so that rows are whole."""

    def __init__(self, packed: Tensor, absmax: Tensor, quant_type: str, shape: tuple[int, int], dtype: torch.dtype):
        self.packed = packed.view(torch.uint8).view(shape[0], -1)  # [V, H/2]
        self.absmax = absmax.view(shape[0], -1)  # [V, H/block] float32
        self.quant_type, self.block = quant_type, shape[1] // self.absmax.shape[1]
        kind = f"4bit {quant_type} {shape[0]} {shape[1]} {str(dtype).removeprefix('torch.')}"
        super().__init__(shape, dtype, packed.device, kind=kind, tensors=[packed, absmax], copies=1)

    @classmethod
    def of(cls, weight: Any, dtype: torch.dtype | None = None) -> "FourBitWeight":
        """Make one from a `bitsandbytes.nn.Params4bit`. Slices have `dtype`, by default the one before quantization.

        Raises ValueError for a weight whose rows are not whole blocks, or that is not in the format for training.
        """
        import bitsandbytes.functional as bnb

        state = weight.quant_state
        if state is None:
            raise ValueError("the 4-bit weight is not quantised yet; move its model to the device first")
        if getattr(state, "packing_format_for_cpu", False):
            raise ValueError("the 4-bit weight was repacked for inference on a CPU; load it again for training")
        shape = tuple(state.shape)
        if shape[1] % state.blocksize:
            raise ValueError(f"rows of {shape[1]} are not whole blocks of {state.blocksize}")
        absmax = state.absmax
        if state.nested:
            absmax = bnb.dequantize_blockwise(absmax, state.state2) + state.offset
        return cls(weight.data, absmax.float(), state.quant_type, shape, dtype or state.dtype)

    def read_as(self, dtype: torch.dtype) -> "FourBitWeight":
        return (
            self if dtype == self.dtype else FourBitWeight(self.packed, self.absmax, self.quant_type, self.shape, dtype)
        )

    def rows(self, first: int, last: int) -> Tensor:
        return self._dequantize(self.packed[first:last], self.absmax[first:last])

    def gather(self, index: Tensor) -> Tensor:
        return self._dequantize(self.packed[index], self.absmax[index])

    def _dequantize(self, packed: Tensor, absmax: Tensor) -> Tensor:
        import bitsandbytes.functional as bnb

        shape = torch.Size((packed.shape[0], self.shape[1]))
        state = bnb.QuantState(
            absmax=absmax.reshape(-1), shape=shape, blocksize=self.block, quant_type=self.quant_type, dtype=self.dtype
        )
        return bnb.dequantize_4bit(packed.reshape(-1, 1), state).view(shape)


class OffloadedWeight(HeadWeight):
    """A weight in host memory. Slices are copied to `device`, the next one during the use of the current if pinned."""

    def __init__(self, weight: Tensor, device: torch.device | str):  # [V, H]
        device, (vocabulary, width) = with_index(device), weight.shape
        super().__init__((vocabulary, width), weight.dtype, device, kind=f"host {device}", tensors=[weight], copies=2)
        self.weight = weight
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._buffers: list[Tensor] = []  # two: one in use, one being copied
        self._coming: tuple[int, int, Tensor] | None = None

    def rows(self, first: int, last: int) -> Tensor:
        if self._stream is None:
            return self.weight[first:last].to(self.device)
        if not self._buffers or self._buffers[0].shape[0] < last - first:
            self._buffers = [torch.empty_like(self.weight[first:last], device=self.device) for _ in range(2)]
            for buffer in self._buffers:
                buffer.record_stream(self._stream)
            self._coming = None
        if self._coming is None or self._coming[:2] != (first, last):
            self._fetch(first, last)
        assert self._coming is not None
        current = self._coming[2]
        torch.cuda.current_stream(self.device).wait_stream(self._stream)
        if last < self.shape[0]:
            self._fetch(last, min(2 * last - first, self.shape[0]))
        return current

    def _fetch(self, first: int, last: int) -> None:
        assert self._stream is not None
        # Only work that is already queued still reads this buffer: the current slice is in the other one.
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        self._buffers.reverse()
        with torch.cuda.stream(self._stream):
            slice_ = self._buffers[0][: last - first].copy_(self.weight[first:last], non_blocking=True)
        self._coming = (first, last, slice_)

    def gather(self, index: Tensor) -> Tensor:
        return self.weight[index.to(self.weight.device)].to(self.device)


class WidenedWeight(HeadWeight):
    """A weight with additional columns, [W, 0, B], of which B alone is trained. The width is a multiple of STEP."""

    def __init__(self, base: HeadWeight, columns: Tensor):  # [V, T] B
        self.base, self.columns = base, columns
        self.zeros = -(base.shape[1] + columns.shape[1]) % STEP  # columns
        shape, kind = (base.shape[0], base.shape[1] + self.zeros + columns.shape[1]), f"widened {base.kind}"
        tensors, copies = [*base.tensors, columns], base.copies + 1
        super().__init__(shape, base.dtype, base.device, kind=kind, tensors=tensors, copies=copies)

    def rows(self, first: int, last: int) -> Tensor:
        return self._joined(self.base.rows(first, last), self.columns[first:last])

    def gather(self, index: Tensor) -> Tensor:
        return self._joined(self.base.gather(index), self.columns[index])

    def _joined(self, rows: Tensor, columns: Tensor) -> Tensor:
        return torch.cat([rows, rows.new_zeros(rows.shape[0], self.zeros), columns.to(self.dtype)], dim=1)

    @property
    def trained(self) -> Tensor:
        return self.columns

    def read_as(self, dtype: torch.dtype) -> "WidenedWeight":
        return self if dtype == self.dtype else WidenedWeight(self.base.read_as(dtype), self.columns)


class CastWeight(HeadWeight):
    """A weight whose slices are cast to another dtype, as autocast casts the operands of a product."""

    def __init__(self, base: HeadWeight, dtype: torch.dtype):
        kind = f"cast {str(dtype).removeprefix('torch.')} {base.kind}"
        copies = 1 + -(-base.copies * base.dtype.itemsize // dtype.itemsize)
        super().__init__(base.shape, dtype, base.device, kind=kind, tensors=base.tensors, copies=copies)
        self.base = base

    def rows(self, first: int, last: int) -> Tensor:
        return self.base.rows(first, last).to(self.dtype)

    def gather(self, index: Tensor) -> Tensor:
        return self.base.gather(index).to(self.dtype)

    @property
    def trained(self) -> Tensor | None:
        return self.base.trained

    def read_as(self, dtype: torch.dtype) -> HeadWeight:
        return self.base.read_as(dtype)


def assemble(kind: str, tensors: Sequence[Tensor]) -> HeadWeight:
    """Rebuild a weight from its `kind` and `tensors`."""
    name, _, rest = kind.partition(" ")
    if name == "widened":
        return WidenedWeight(assemble(rest, tensors[:-1]), tensors[-1])
    if name == "cast":
        dtype, _, base = rest.partition(" ")
        return CastWeight(assemble(base, tensors), getattr(torch, dtype))
    if name == "host":
        return OffloadedWeight(tensors[0], rest)
    if name == "4bit":
        quant_type, vocabulary, width, dtype = rest.split()
        return FourBitWeight(tensors[0], tensors[1], quant_type, (int(vocabulary), int(width)), getattr(torch, dtype))
    return DenseWeight(tensors[0])
