"""A model whose frozen layers lie in host memory, and pass through a few slots of the device's memory as they compute.

A layer arrives before its forward pass, by a hook of the module, and again before its backward pass, by a hook of its
output's gradient. That hook runs before any node of the layer's backward pass, also before those that keep a weight
themselves instead of saving it, as bitsandbytes' do; autograd runs the nodes of the layer behind it first.
"""

from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastpref.errors import UserError
from fastpref.kernels.device import with_index
from fastpref.model.body import TOWERS, body_of
from fastpref.model.gradient_checkpointing import decoder_layers
from fastpref.model.streaming.layers import Allocate, StreamedLayer, frozen_weights, ready_to_copy
from fastpref.model.streaming.pinned import pinned
from fastpref.model.streaming.schedule import Direction, Schedule, Transfers
from fastpref.model.streaming.tables import keep_embeddings, keep_head, on_its_device
from fastpref.model.streaming.transfers import CudaTransfers, HostTransfers

SLOTS = 2
_STREAM = "_fastpref_stream"

MakeTransfers = Callable[[Sequence[Tensor], Sequence[Tensor]], Transfers]  # of host buffers and of slots


@dataclass(frozen=True)
class Streaming:
    """How much of a model is streamed."""

    slots: int = SLOTS
    resident: int = 0  # decoder layers that stay on the device, spread evenly
    tokens: int | None = None  # that a micro-batch should have so that its computations hide the copies, if more fit


class WeightStream:
    """The streamed layers of a model, in the order in which they compute."""

    def __init__(
        self,
        layers: Sequence[nn.Module],
        device: torch.device,
        slots: int,
        *,
        allocate: Allocate = pinned,
        make_transfers: MakeTransfers | None = None,
    ):
        self.modules, self.device = list(layers), with_index(device)
        for layer in layers:
            ready_to_copy(layer)
        self.decoder_layers = list(layers)  # all of the model, also those that stay on the device
        self._paused = False
        self.layers = [StreamedLayer(list(frozen_weights(layer)), allocate) for layer in layers]
        self.hosted = {id(weight.parameter) for layer in self.layers for weight in layer.weights}
        self.reached: set[int] = set()  # the layers that have computed
        slots = min(slots, len(layers))
        sizes = [max(layer.nbytes for layer in self.layers[slot::slots]) for slot in range(slots)]
        self.slots = [torch.empty(size, dtype=torch.uint8, device=device) for size in sizes]
        make = make_transfers or (CudaTransfers if device.type == "cuda" else HostTransfers)
        self.schedule = Schedule(len(layers), slots, make([layer.host for layer in self.layers], self.slots))
        for place, layer in enumerate(self.layers):
            layer.give_slot(self.slots[self.schedule.slot(place)])
        for place, layer in enumerate(layers):
            layer.register_forward_pre_hook(partial(self._before, place))
            layer.register_forward_hook(partial(self._after, place))

    @property
    def nbytes(self) -> int:
        """The bytes in host memory."""
        return sum(layer.nbytes for layer in self.layers)

    def __deepcopy__(self, memo: dict[int, Any]) -> "WeightStream":
        return self  # PEFT copies modules, and with them their hooks

    def move_rest(self, model: nn.Module) -> None:
        """Move what has been added to the model since, such as adapters and trained copies, to the device."""
        for wrapper in model.modules():
            if isinstance(wrapper, ModulesToSaveWrapper):
                for module in wrapper.modules_to_save.modules():
                    on_its_device(module)
        move_model(model, self.device, self.hosted)

    def arrive(self, place: int, direction: Direction) -> None:
        """Let a layer compute in its slot. The layer that computed before reads host memory again."""
        before = self.schedule.current
        self.schedule.arrive(place, direction)
        if before != place:
            if before is not None:
                self.layers[before].leave()
            self.layers[place].enter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let no layer arrive inside the block, in which calls of layers do not compute."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def _before(self, place: int, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not self._paused:
            self.reached.add(place)
            self.arrive(place, 1)

    def _after(self, place: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        alone = isinstance(output, Tensor)
        hidden = output if alone else output[0]
        if hidden.requires_grad:
            if hidden._is_view():  # a later change in place would take a view's hook from the graph
                hidden = hidden.clone()
                output = hidden if alone else (hidden, *output[1:])
            hidden.register_hook(partial(self._before_backward, place))
        return output

    def _before_backward(self, place: int, gradient: Tensor) -> None:
        self.arrive(place, -1)


def stream_weights(
    model: PreTrainedModel,
    device: torch.device,
    streaming: Streaming,
    *,
    allocate: Allocate = pinned,
    make_transfers: MakeTransfers | None = None,
) -> WeightStream:
    """Let a model in host memory, without adapters, compute on a device, with its layers streamed.

    Embeddings and head stay in host memory too: rows of the one are gathered there, and the head is copied tile by
    tile. Everything else is moved to the device. Raises UserError for a model whose layers cannot be found, or with too
    few of them.
    """
    device, layers = with_index(device), streamable_layers(model)
    streamed = _spread(layers, streaming.resident)
    if len(streamed) < 2:
        raise UserError(
            f"model.streaming: {len(streamed)} of the {len(layers)} layers of this {model.config.model_type} model "
            "would be streamed, and at least two are needed; set it to false"
        )
    stream = WeightStream(streamed, device, streaming.slots, allocate=allocate, make_transfers=make_transfers)
    stream.decoder_layers = layers
    stream.hosted |= _keep_tables(model, device, allocate)
    stream.move_rest(model)
    _say_where(model, device)
    vars(model).pop("hf_device_map", None)  # by which PEFT and transformers would spread the model over devices
    vars(model)[_STREAM] = stream
    return stream


def stream_of(model: nn.Module) -> WeightStream | None:
    """Return the stream of a model, or None if its weights are not streamed."""
    return vars(model).get(_STREAM)


def streamable_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Return the decoder layers of the language model: the longest list that is not of another tower.

    Raises UserError if there is none.
    """
    known = set(decoder_layers(model))
    lists = [
        (TOWERS.search(name) is None, len(module), module)
        for name, module in body_of(model).named_modules()
        if isinstance(module, nn.ModuleList) and set(module) <= known
    ]
    longest = max(lists, key=lambda found: found[:2], default=(True, 0, []))[-1]
    if not len(longest):
        raise UserError(
            f"model.streaming: {model.config.model_type} models have no list of decoder layers that is known here; "
            "leave the key out"
        )
    return list(longest)


def _spread(layers: Sequence[nn.Module], resident: int) -> list[nn.Module]:
    """Return the layers that are streamed, so that those that stay lie evenly between them."""
    count = len(layers)
    stay = {(2 * k + 1) * count // (2 * resident) for k in range(resident)}
    return [layer for place, layer in enumerate(layers) if place not in stay]


def _keep_tables(model: PreTrainedModel, device: torch.device, allocate: Allocate) -> set[int]:
    """Keep the embeddings, and the head if it is a plain layer, in host memory. Returns the ids of their tensors."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    keep_embeddings(embeddings, device)
    kept = [*embeddings.parameters(), *embeddings.buffers()]  # Gemma's embeddings multiply by a buffer of theirs
    if type(head) is nn.Linear and head.weight.is_floating_point():
        keep_head(head, device, allocate)
        kept.append(head.weight)
    return {id(tensor) for tensor in kept}


def move_model(model: nn.Module, device: torch.device, hosted: Set[int] = frozenset()) -> None:
    """Move the parameters and buffers of a model to a device, except those with the ids in `hosted`."""
    moved: dict[int, tuple[Any, Any]] = {}  # by id, with the parameter, so that ids stay unique
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or id(parameter) in hosted or parameter.device == device:
                continue
            if id(parameter) not in moved:
                there: Any = parameter.to(device)  # bitsandbytes' weights move with their scales
                own = isinstance(there, nn.Parameter)
                moved[id(parameter)] = parameter, there if own else nn.Parameter(there, parameter.requires_grad)
            module._parameters[name] = moved[id(parameter)][1]
        for name, buffer in module._buffers.items():
            module._buffers[name] = buffer if buffer is None or id(buffer) in hosted else buffer.to(device)


def _say_where(model: PreTrainedModel, device: torch.device) -> None:
    """Let `device` of a model and its body, which is where the first parameter is, name where they compute."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            kind = type(module)
            where = {"device": property(lambda self: device), "__module__": kind.__module__}
            module.__class__ = type(kind.__name__, (kind,), where)
