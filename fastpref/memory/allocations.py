"""Measurement of the memory that a piece of code allocates, on any device."""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode

from fastpref.kernels.operators import IMPLEMENTATIONS
from fastpref.memory.caching_allocator import Trace


class PeakStorage(TorchDispatchMode):
    """A context that counts the bytes of the tensor storages that are created in it and alive at the same time.

        with PeakStorage() as memory:
            loss().backward()
        print(memory.peak)

    A storage counts once, however many views it has, from the operation that returns it until it is freed, even after
    the context. Storages that existed before do not count, nor does memory that a library allocates inside one
    operation. Unlike an allocator's statistics, the result is exact. A FakeTensor counts like a real one.

    Bytes are also summed by label: the label of the `labelled` block in which a storage was made, or INSIDE for
    storages made by our own operators. Those with the label HOST lie in host memory, for a device that has its own:
    they are summed apart, and are no part of `current` and `peak`.
    """

    INSIDE, HOST = "operators", "host"

    def __init__(self) -> None:
        super().__init__()
        self.current = 0  # bytes alive now
        self.peak = 0  # the most that were ever alive at once
        self.host_peak = 0  # the same of host memory
        self.largest = 0  # bytes of the largest storage that was made
        self.parts: Counter[str] = Counter()  # `current` by label
        self.at_peak: Counter[str] = Counter()  # `peak` by label
        self._label = "tensors"
        self._trace: Trace | None = None
        # (bytes, label) by the storage's address, which no other storage gets before _forget
        self._alive: dict[int, tuple[int, str]] = {}

    @contextmanager
    def labelled(self, label: str) -> Iterator[None]:
        """Count the storages that are made in this block under a label."""
        before, self._label = self._label, label
        try:
            yield
        finally:
            self._label = before

    def relabel(self, tensor: Tensor, label: str) -> None:
        """Count a tensor's storage under another label from now on, if it is counted at all."""
        address = tensor.untyped_storage()._cdata
        if address in self._alive:
            size, before = self._alive[address]
            self._alive[address] = size, label
            self._add(before, -size)
            self._add(label, size)
            if self._trace is not None:
                self._trace.keep_size(address)

    def record(self) -> Trace:
        """Return a record of the storages on the device: those alive now, and from now on those made and freed."""
        held = {address: size for address, (size, label) in self._alive.items() if label != self.HOST}
        self._trace = Trace(held)
        return self._trace

    def start_again(self) -> None:
        """Begin a new peak; storages that are alive stay counted."""
        self.peak, self.at_peak, self.largest = self.current, self.parts.copy(), 0
        self.host_peak = self.parts[self.HOST]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        inside = IMPLEMENTATIONS.get(str(func.name()))
        if inside is not None:  # tensors that our own operators allocate count too
            with self, self.labelled(self.INSIDE):
                return inside(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        if func.is_view and any(given._cdata in self._alive for given in _storages((args, kwargs))):
            return result  # a view of a copied fake tensor has its own storage
        # A dispatch mode does not see how `torch.tensor` makes its result, only how lift_fresh then passes it on.
        fresh = func is torch.ops.aten.lift_fresh.default
        for storage in _storages(result):
            known = storage._cdata in self._alive
            if known or fresh or all(storage._cdata != given._cdata for given in _storages((args, kwargs))):
                self._count(storage)
        return result

    def _count(self, storage: UntypedStorage) -> None:
        """Count a new storage, or the bytes by which a known one has grown (`out=` resizes it)."""
        address, size = storage._cdata, storage.nbytes()
        if address not in self._alive:
            # Torch keeps a storage's Python object alive as long as the storage itself.
            weakref.finalize(storage, self._forget, address).atexit = False
        before, label = self._alive.get(address, (0, self._label))
        if size > before and label != self.HOST:
            self.largest = max(self.largest, size)
        self._alive[address] = size, label
        self._add(label, size - before)
        if self._trace is not None and label != self.HOST and size != before:
            self._trace.made(address, size)
        if self.current > self.peak:
            self.peak, self.at_peak = self.current, self.parts.copy()

    def _forget(self, address: int) -> None:
        size, label = self._alive.pop(address)
        self._add(label, -size)
        if self._trace is not None and label != self.HOST:
            self._trace.freed(address)

    def _add(self, label: str, size: int) -> None:
        self.parts[label] += size
        if label == self.HOST:
            self.host_peak = max(self.host_peak, self.parts[label])
        else:
            self.current += size


def _storages(tree: Any) -> Iterator[UntypedStorage]:
    """Yield the storages of all tensors in nested containers, except sparse tensors, which have no storage."""
    if isinstance(tree, Tensor):
        if tree.layout == torch.strided:
            yield tree.untyped_storage()
    elif isinstance(tree, list | tuple):  # operators use no other containers; a general pytree would be much slower
        for inner in tree:
            yield from _storages(inner)
    elif isinstance(tree, dict):
        for inner in tree.values():
            yield from _storages(inner)
