"""The streamed layers of a model of fake tensors, so that `count_step` sees what lies on the device and what does not."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from fastpref.config import Config
from fastpref.kernels.head_weight import OffloadedWeight
from fastpref.memory.allocations import PeakStorage
from fastpref.model.packed import lies_quantised, of_bitsandbytes, own_quantization
from fastpref.model.streaming.stream import Streaming, stream_weights
from fastpref.model.streaming.transfers import HostTransfers


def obstacle(config: Config, architecture: PretrainedConfig) -> str | None:
    """Return why the frozen weights of a config cannot be streamed, as a clause that begins with a noun, or None."""
    own = own_quantization(architecture)
    if config.lora is None:
        return "only frozen weights can stay in host memory, and without a [lora] table all are trained"
    if config.loss.uses_reference and config.reference.mode == "copy":
        return 'the frozen copy of reference.mode = "copy" would stay on the GPU; set reference.mode = "auto"'
    if own is not None and not of_bitsandbytes(own):
        return f"weights that are stored quantised ({lies_quantised(architecture)}) cannot be streamed"
    return None


class Copies:
    """The bytes that a step copies from host memory to the device's."""

    def __init__(self) -> None:
        self.bytes = 0

    def transfers(self, sources: Sequence[Tensor], slots: Sequence[Tensor]) -> HostTransfers:
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

        OffloadedWeight.rows = copied
        try:
            yield
        finally:
            OffloadedWeight.rows = rows


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
    stream = stream_weights(
        model, torch.device("cpu"), streaming, allocate=on_host, make_transfers=copies.transfers
    )
    for table in stream.tables:
        count.relabel(table, PeakStorage.HOST)
    return copies
