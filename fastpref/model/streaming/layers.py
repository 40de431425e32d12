"""A layer's frozen weights in one buffer of host memory, and the same layer in a slot of device memory.

A weight is whatever its module reads: a dense tensor, bitsandbytes' 4 bits with their scales and the scales of those,
or 8 bits with the scales of rows.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from bitsandbytes.nn import Linear8bitLt
from torch import Tensor, nn

_ALIGNED = 256  # bytes, as the CUDA allocator aligns tensors

# The attributes of bitsandbytes' Params4bit and Int8Params, in addition to their numbers.
_SETTINGS = {"blocksize", "compress_statistics", "quant_type", "quant_storage", "bnb_quantized", "module"} | {
    "has_fp16_weights", "CB", "SCB",
}  # fmt: skip

Allocate = Callable[[int], Tensor]  # bytes → a buffer, [bytes] uint8


@dataclass(frozen=True)
class FrozenWeight:
    """A parameter of a module that is not trained, with the tensors that belong to it."""

    module: nn.Module
    name: str

    @property
    def parameter(self) -> Any:
        return self.module._parameters[self.name]

    def tensors(self) -> list[Tensor]:
        """Return the tensors, the parameter's own numbers first."""
        weight, module = self.parameter, cast(Any, self.module)
        if isinstance(self.module, Linear8bitLt):
            scales = getattr(weight, "SCB", None)
            return [weight.data, module.state.SCB if scales is None else scales]
        return [weight.data, *_scales(getattr(weight, "quant_state", None))]

    def made_of(self, tensors: Sequence[Tensor]) -> nn.Parameter:
        """Return the parameter with other tensors, which are like those of `tensors()`."""
        weight = self.parameter
        made: Any = nn.Parameter.__new__(type(weight), tensors[0], requires_grad=False)
        for name in _SETTINGS & vars(weight).keys():  # not all: a fake tensor keeps what it is there, too
            setattr(made, name, getattr(weight, name))
        if (state := getattr(weight, "quant_state", None)) is not None:
            made.quant_state = _state_of(state, tensors[1:])
        return made

    def put(self, parameter: nn.Parameter, tensors: Sequence[Tensor]) -> None:
        """Let the module read a parameter of `made_of`, and the tensors that it was made of."""
        self.module._parameters[self.name] = parameter
        if getattr(self.module, "quant_state", None) is not None:  # bitsandbytes keeps the weight's state twice
            self.module.quant_state = cast(Any, parameter).quant_state
        if isinstance(self.module, Linear8bitLt):
            self.module.state.CB, self.module.state.SCB = parameter.data, tensors[1]


class StreamedLayer:
    """A decoder layer whose large frozen weights lie in one buffer of host memory.

    Everything else of the layer stays where it is: norms and biases, adapters, and whatever is trained.
    """

    def __init__(self, weights: Sequence[FrozenWeight], allocate: Allocate):
        self.weights = list(weights)
        self._shapes = [[(t.shape, t.dtype) for t in weight.tensors()] for weight in self.weights]
        self.host = allocate(sum(padded(t.nbytes) for weight in self.weights for t in weight.tensors()))
        self._home = self._place(self.host)
        for weight, (parameter, views) in zip(self.weights, self._home, strict=True):
            for view, tensor in zip(views, weight.tensors(), strict=True):
                view.copy_(tensor)
            weight.put(parameter, views)  # which frees the tensors that were copied

    @property
    def nbytes(self) -> int:
        return len(self.host)

    def give_slot(self, slot: Tensor) -> None:
        """Set the slot in which the layer computes: [bytes] uint8, at least `nbytes`."""
        self._in_slot = self._place(slot)

    def enter(self) -> None:
        """Let the layer's modules read the slot."""
        for weight, placed in zip(self.weights, self._in_slot, strict=True):
            weight.put(*placed)

    def leave(self) -> None:
        """Let the layer's modules read host memory, so that code outside of a pass reads the right numbers."""
        for weight, placed in zip(self.weights, self._home, strict=True):
            weight.put(*placed)

    def _place(self, buffer: Tensor) -> list[tuple[nn.Parameter, list[Tensor]]]:
        """Return each weight, and the tensors that it is made of, as views of a buffer."""
        views = _views(buffer, self._shapes)
        return [(weight.made_of(own), own) for weight, own in zip(self.weights, views, strict=True)]


def ready_to_copy(layer: nn.Module) -> None:
    """Let the modules of a layer keep their scales where `FrozenWeight.put` puts them."""
    for module in layer.modules():
        if isinstance(module, Linear8bitLt) and getattr(module.weight, "CB", None) is not None:
            module.init_8bit_state()  # which a first forward pass would do


def frozen_weights(layer: nn.Module) -> Iterator[FrozenWeight]:
    """Yield the weights of a layer without adapters that are worth a copy: all but norms, biases and other vectors."""
    for module in layer.modules():
        for name, parameter in module._parameters.items():
            quantised = getattr(parameter, "quant_state", None) is not None
            if parameter is not None and (parameter.dim() > 1 or quantised):
                yield FrozenWeight(module, name)


def _scales(state: Any) -> list[Tensor]:
    """Return the tensors of bitsandbytes' QuantState."""
    if state is None:
        return []
    own = [state.absmax, state.code]
    return [*own, state.offset, state.state2.absmax, state.state2.code] if state.nested else own


def _state_of(state: Any, tensors: Sequence[Tensor]) -> Any:
    """Return a QuantState with other tensors, in the order of `_scales`."""
    made = copy.copy(state)
    made.absmax, made.code = tensors[:2]
    if state.nested:
        made.offset, made.state2 = tensors[2], copy.copy(state.state2)
        made.state2.absmax, made.state2.code = tensors[3:]
    return made


def _views(buffer: Tensor, shapes: Sequence[Sequence[tuple[torch.Size, torch.dtype]]]) -> list[list[Tensor]]:
    """Return tensors of these shapes that lie in a buffer one after the other."""
    first, views = 0, []
    for weight in shapes:
        own = []
        for shape, dtype in weight:
            size = shape.numel() * dtype.itemsize
            # `data` has its own count of changes: PEFT changes adapted experts in place, and autograd must not see that
            # in other weights of the slot.
            own.append(buffer[first : first + size].view(dtype).view(shape).data)
            first += padded(size)
        views.append(own)
    return views


def padded(size: int) -> int:
    """Return the bytes that a tensor takes in a buffer."""
    return -(-size // _ALIGNED) * _ALIGNED
