"""The streamed layers of a model of fake tensors, with which `count_step` sees what lies on the device."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastpref.kernels.head_weight import OffloadedWeight
from fastpref.memory.allocations import PeakStorage
from fastpref.model.adapters.switch import adapter_weights
from fastpref.model.streaming.stream import Streaming, stream_weights
from fastpref.model.streaming.tables import computes_on
from fastpref.model.streaming.transfers import HostTransfers


class Copies:
    """The streamed layers, and the bytes that a step copies of them and of the head to the device."""

    def __init__(self) -> None:
        self.bytes = 0
        self.layers: list[int] = []  # the bytes of each

    def transfers(self, sources: Sequence[Tensor], slots: Sequence[Tensor]) -> HostTransfers:
        self.layers = [len(source) for source in sources]
        return _CountedTransfers(sources, slots, self)

    @contextmanager
    def of_head(self) -> Iterator[None]:
        """Let a head in host memory take what it takes on a GPU, also on a CPU, where it copies nothing.

        There a slice of its weight is copied into one of two buffers while the other is in use.
        """
        rows = OffloadedWeight.rows

        def copied(weight: OffloadedWeight, first: int, last: int) -> Tensor:
            if not weight._buffers:
                weight._buffers = [torch.empty_like(weight.weight[first:last]) for _ in range(2)]
            part = rows(weight, first, last)
            self.bytes += part.nbytes
            return part

        setattr(OffloadedWeight, "rows", copied)  # noqa: B010
        try:
            yield
        finally:
            setattr(OffloadedWeight, "rows", rows)  # noqa: B010


class _CountedTransfers(HostTransfers):
    def __init__(self, sources: Sequence[Tensor], slots: Sequence[Tensor], copies: Copies):
        super().__init__(sources, slots)
        self._copies = copies

    def copy(self, layer: int, slot: int) -> None:
        self._copies.bytes += len(self.sources[layer])
        super().copy(layer, slot)


def stream_fakes(model: PreTrainedModel, streaming: Streaming, count: PeakStorage) -> Copies:
    """Let a model of fake tensors compute with streamed layers, and count what it keeps in host memory as HOST.

    The slots count under the label of the caller. Raises UserError for a model that cannot be streamed.
    """

    def on_host(size: int) -> Tensor:
        with count.labelled(PeakStorage.HOST):
            return torch.empty(size, dtype=torch.uint8)

    copies = Copies()
    with _without_adapters(model):
        stream_weights(model, torch.device("cpu"), streaming, allocate=on_host, make_transfers=copies.transfers)
    for parameter in tables_of(model):
        count.relabel(parameter, PeakStorage.HOST)
    return copies


def tables_of(model: PreTrainedModel) -> list[nn.Parameter]:
    """Return the weights of a streamed model's embeddings and head that stay in host memory."""
    embeddings, head = _bare(model.get_input_embeddings()), _bare(model.get_output_embeddings())
    return [*embeddings.parameters(), *([head.weight] if computes_on(head) is not None else [])]


@contextmanager
def _without_adapters(model: PreTrainedModel) -> Iterator[None]:
    """Hide what PEFT has put into a model: a run streams a model first and adds adapters then, a skeleton has them."""
    added = {id(parameter) for _, weights in adapter_weights(model) for parameter in weights}
    trained = [
        (m, n, p)
        for m in model.modules()
        for n, p in m._parameters.items()
        if p is not None and (p.requires_grad or id(p) in added)
    ]
    tables = {
        "get_input_embeddings": model.get_input_embeddings(),
        "get_output_embeddings": model.get_output_embeddings(),
    }
    for module, name, _ in trained:
        module._parameters[name] = None
    vars(model).update({name: partial(_bare, module) for name, module in tables.items()})
    try:
        yield
    finally:
        for module, name, parameter in trained:
            module._parameters[name] = parameter
        for name in tables:
            del vars(model)[name]


def _bare(module: Any) -> Any:
    """Return a module without PEFT's wrappers."""
    module = module.original_module if isinstance(module, ModulesToSaveWrapper) else module
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
