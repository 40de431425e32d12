"""Triton's launch replaced by ttsem's, which executes the compiled kernel on the CPU and checks every access."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor
from ttsem import _fakedriver, harness, mlir, sanitize  # pyright: ignore[reportMissingImports]

from fastpref.kernels import linear_logprob_launch, preference_loss_launch, tiles

LAUNCHERS = (linear_logprob_launch, preference_loss_launch)


@contextmanager
def executed_launches(architecture: int) -> Iterator[sanitize.Session]:
    """Execute every launch as compiled for a GPU, on tensors of the CPU.

    Raises `sanitize.KernelFault` for an access outside its tensor, a race between programs, and an undefined operation.
    """
    mlir.enable_generic_printing()  # what ttsem reads; only possible before the first compilation
    with sanitize.session(architecture, cuda_is_cpu=False) as session, pytest.MonkeyPatch.context() as patch:
        _fakedriver.unstub_torch_cuda()  # Triton compiles for a GPU, and torch has none
        patch.setattr(tiles, "interpreted", lambda: True)  # the kernels take tensors of the CPU
        patch.setattr(linear_logprob_launch, "interpreted", lambda: False)  # and compute as on a GPU
        for launcher in LAUNCHERS:
            patch.setattr(launcher, "launch", _in_memory_of_its_own(launcher.launch))
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
            patch.setattr(owner, name, _full_of_nan(getattr(owner, name)))
        # ttsem compiles a kernel to machine code, and reads its TTIR again, at every launch: once is enough.
        patch.setattr(harness, "ir_for_launch", _CompiledOnce().ir_for_launch)
        patch.setattr(mlir, "parse", lru_cache(maxsize=256)(mlir.parse))
        yield session


def _full_of_nan(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Fill new memory, so that a value that is read before it is written shows in the results."""

    def allocated(*arguments: Any, **options: Any) -> Tensor:
        new = allocate(*arguments, **options)
        if new.device.type != "cpu" or new.dtype == torch.bool:
            return new
        with torch.no_grad():
            return new.fill_(float("nan") if new.is_floating_point() else torch.iinfo(new.dtype).max)

    return allocated


def _in_memory_of_its_own(launch: Callable[..., None]) -> Callable[..., None]:
    """Launch on copies of tensors that are parts of larger ones, whose ends ttsem would not see otherwise."""

    def launched(kernel: Any, grid: tuple[Any, ...], *arguments: Any, **options: Any) -> None:
        copies: dict[Any, tuple[Tensor, Tensor]] = {}
        own = [_own(argument, copies) if isinstance(argument, Tensor) else argument for argument in arguments]
        launch(kernel, grid, *own, **options)
        for tensor, copy in copies.values():
            if not torch.equal(tensor.view(torch.uint8), copy.view(torch.uint8)):
                tensor.copy_(copy)

    return launched


def _own(tensor: Tensor, copies: dict[Any, tuple[Tensor, Tensor]]) -> Tensor:
    size = tensor.numel() * tensor.element_size()
    if not size or not tensor.is_contiguous() or tensor.untyped_storage().nbytes() == size:
        return tensor
    key = tensor.data_ptr(), tensor.dtype, tensor.shape
    if key not in copies:
        copies[key] = tensor, tensor.detach().clone()
    return copies[key][1]


class _CompiledOnce:
    """The TTIR of every kernel that was launched, by what it depends on."""

    def __init__(self) -> None:
        self.texts: dict[Any, str] = {}

    def ir_for_launch(self, record: harness.LaunchRecord, stage: str, target: Any, *_: Any) -> str:
        options, *specialized = harness._specialize(record.fn, record.args, record.kwargs, target)
        key = (stage, record.fn.cache_key, options.hash(), repr(specialized))
        if key not in self.texts:
            self.texts[key] = mlir.to_generic(harness._stage_text(record, stage, target), None)
        return self.texts[key]
