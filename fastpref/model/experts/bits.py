"""The weights of fused experts in 4 or 8 bits: each expert is quantised by itself, and can be dequantised by itself.

In nf4 each expert has what bitsandbytes gives a linear layer (arXiv 2305.14314): numbers of 4 bits in blocks of 64,
their scales in 8 bits in blocks of 256, and the scales and the mean of these. In int8 each row has a scale, as in
LLM.int8() (arXiv 2208.07339), and products are computed with the dequantised weight; activations stay as they are.

One parameter holds the numbers of all experts, [experts, bytes], and its `quant_state` the rest, with a first dimension
for the experts. A QuantState and a Params4bit are what streaming, copies and `to` of bitsandbytes' layers know.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Params4bit
from torch import Tensor, nn

Bits = Literal["nf4", "int8"]

_BLOCK = 64  # weights per scale
_SCALES = 256  # scales per scale of scales
_MOST = 127.0  # the largest number in 8 bits


class PackedExperts(Params4bit):
    """The weights of a layer's experts in few bits."""

    @property
    def ds_shape(self) -> torch.Size:
        """The shape of the weights, [experts, ., .]: PEFT reads it from this name where the numbers lie otherwise."""
        return self.quant_state.shape  # pyright: ignore[reportOptionalMemberAccess, reportReturnType]


def pack(weights: Tensor, bits: Bits, *, transposed: bool = False) -> PackedExperts:
    """Quantise weights [experts, out, in], or [experts, in, out] if `transposed`, one expert after the other."""
    if bits == "int8":
        scales = weights.abs().amax(dim=1 if transposed else 2, keepdim=True).float()
        data = torch.empty(weights.shape, dtype=torch.int8, device=weights.device)
        for own, weight, scale in zip(data, weights, scales, strict=True):
            own.copy_((weight.float() * (_MOST / scale.clamp(min=1e-30))).round_())
        state = QuantState(scales, weights.shape, torch.empty(0, device=weights.device), dtype=weights.dtype)
        return _parameter(data.flatten(1), state)
    parts = [_nf4(weight) for weight in weights]
    first: Any = parts[0][1]
    states: list[Any] = [state for _, state in parts]
    state = QuantState(
        absmax=torch.stack([state.absmax for state in states]),
        shape=weights.shape,
        code=first.code,
        blocksize=_BLOCK,
        quant_type="nf4",
        dtype=weights.dtype,
        offset=torch.stack([state.offset for state in states]),
        state2=QuantState(
            absmax=torch.stack([state.state2.absmax for state in states]),
            code=first.state2.code,
            blocksize=_SCALES,
            dtype=torch.float32,
        ),
    )
    return _parameter(torch.stack([numbers.flatten() for numbers, _ in parts]), state)


def unpack(numbers: Tensor, state: Any, expert: int) -> Tensor:
    """Return the weight of one expert in the state's dtype, from the numbers of all, [experts, bytes]."""
    own = numbers[expert]
    if state.quant_type != "nf4":
        scale = state.absmax[expert] / _MOST
        return (own.view(state.shape[1:]) * scale).to(state.dtype)
    one = QuantState(
        absmax=state.absmax[expert],
        shape=state.shape[1:],
        code=state.code,
        blocksize=_BLOCK,
        quant_type="nf4",
        dtype=state.dtype,
        offset=state.offset[expert],
        state2=QuantState(
            absmax=state.state2.absmax[expert], code=state.state2.code, blocksize=_SCALES, dtype=torch.float32
        ),
    )
    return dequantize_4bit(own.unsqueeze(1), one)


def unpacked(parameter: Any) -> Tensor:
    """Return the weights of all experts, dequantised."""
    numbers, state = parameter.data, parameter.quant_state
    return torch.stack([unpack(numbers, state, expert) for expert in range(state.shape[0])])


def through_bits(weights: Tensor, bits: Bits, *, transposed: bool = False) -> Tensor:
    """Quantise weights [experts, ., .] and dequantise them."""
    return unpacked(pack(weights, bits, transposed=transposed))


def unfilled(shape: Sequence[int], dtype: torch.dtype, bits: Bits, *, transposed: bool = False) -> nn.Parameter:
    """Return a parameter like that of `pack` without numbers, also of fake tensors."""
    experts, rows, columns = shape
    size = rows * columns
    if bits == "int8":
        scales = torch.empty((experts, 1, columns) if transposed else (experts, rows, 1))
        state = QuantState(scales, torch.Size(shape), torch.empty(0), dtype=dtype)
        data = torch.empty((experts, size), dtype=torch.int8)
    else:
        blocks = -(-size // _BLOCK)
        nested = QuantState(
            absmax=torch.empty((experts, -(-blocks // _SCALES))),
            code=torch.empty(256),
            blocksize=_SCALES,
            dtype=torch.float32,
        )
        absmax, code = torch.empty((experts, blocks), dtype=torch.uint8), torch.empty(16)
        state = QuantState(
            absmax, torch.Size(shape), code, _BLOCK, "nf4", dtype, offset=torch.empty(experts), state2=nested
        )
        data = torch.empty((experts, -(-size // 2)), dtype=torch.uint8)
    parameter: Any = nn.Parameter(data, requires_grad=False)
    parameter.quant_state, parameter.bnb_quantized = state, True
    return parameter


def _nf4(weight: Tensor) -> tuple[Tensor, Any]:
    return quantize_4bit(weight.contiguous(), quant_type="nf4", compress_statistics=True, blocksize=_BLOCK)


def _parameter(numbers: Tensor, state: QuantState) -> PackedExperts:
    return PackedExperts(  # pyright: ignore[reportReturnType]
        numbers, quant_state=state, quant_type=state.quant_type or "int8", blocksize=_BLOCK, bnb_quantized=True
    )
