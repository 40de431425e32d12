"""Measuring how much memory a piece of code needs beside what was there before, on any device."""

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastpref.kernels.operators import IMPLEMENTATIONS


class PeakStorage(TorchDispatchMode):
    """Counts the bytes of the tensor storages that are created inside it and alive at the same time.

        with PeakStorage() as memory:
            loss().backward()
        print(memory.peak)

    A storage counts once however many views it has, from the operation that returns it until it is freed, also when
    that happens after the context; storages that existed before do not count. Unlike a reading of the process or of
    an allocator this is exact and repeatable, but it sees only tensors: not what a library allocates for itself
    inside one operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.current = 0  # bytes alive now
        self.peak = 0  # the most that were ever alive at once
        self._alive: dict[int, int] = {}  # bytes by the storage's address, which is free for others only after _forget

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        inside = IMPLEMENTATIONS.get(str(func.name()))
        if inside is not None:  # what our own operators allocate counts too
            with self:
                return inside(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        # `torch.tensor` builds its result out of sight and only then passes it through lift_fresh.
        fresh = func is torch.ops.aten.lift_fresh.default
        given = set() if fresh else {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(result):
            if storage._cdata in self._alive or storage._cdata not in given:
                self._count(storage)
        return result

    def _count(self, storage: UntypedStorage) -> None:
        """Add a new storage, or what a known one has grown by (`out=` resizes)."""
        address, size = storage._cdata, storage.nbytes()
        if address not in self._alive:
            # Torch keeps a storage's Python object for as long as the storage itself, whoever else holds it.
            weakref.finalize(storage, self._forget, address).atexit = False
        self.current += size - self._alive.get(address, 0)
        self._alive[address] = size
        self.peak = max(self.peak, self.current)

    def _forget(self, address: int) -> None:
        self.current -= self._alive.pop(address)


def _storages(tree: Any) -> Iterator[UntypedStorage]:
    """The storages of all tensors in nested containers; a sparse tensor has none of its own."""
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
            yield leaf.untyped_storage()
