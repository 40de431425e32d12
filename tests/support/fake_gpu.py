"""A GPU that is not there: tensors are fake, launches are recorded, and copies that make the host wait are seen."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastpref.kernels import linear_logprob_launch, preference_loss_launch, tiles
from fastpref.kernels.operators import IMPLEMENTATIONS

DEVICE = torch.device("cuda", 1)  # not the current one, which is 0
_DEVICE_OF = torch.ops.prim.device.default
_KERNELS = {
    linear_logprob_launch: ("_walk_kernel", "_combine_kernel", "_rescale_kernel", "_gradient_kernel", "_scale_kernel"),
    preference_loss_launch: ("_pair_kernel", "_row_kernel"),
}


@dataclass(frozen=True)
class Launch:
    kernel: Any  # of `triton.jit`
    arguments: tuple[Any, ...]
    options: dict[str, Any]  # constants and options of the compiler
    device: torch.device | None  # the current device, or None where no launch chose it

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    def key(self) -> tuple[Any, ...]:
        """Return what Triton specialises a compilation on, from the rules of `triton.jit`.

        These are a pointer's alignment to 16 bytes, and whether a whole number is 1 or a multiple of 16. Memory of
        the allocator itself is aligned.
        """
        given = getattr(self.kernel, "kwargs", None) or vars(self.kernel)  # interpreted, or compiled
        free, unaligned = (
            set(given.get(name) or ()) for name in ("do_not_specialize", "do_not_specialize_on_alignment")
        )
        facts: list[Any] = [(name, str(value)) for name, value in sorted(self.options.items())]
        for name, value in zip(self.kernel.arg_names, self.arguments, strict=False):
            if isinstance(value, Tensor):
                aligned = value.storage_offset() * value.element_size() % 16 == 0
                facts.append((name, value.dtype, name in free | unaligned or aligned))
            elif isinstance(value, int) and name not in free:
                facts.append((name, value == 1, name in unaligned or value % 16 == 0))
        return (self.name, *facts)


@dataclass
class FakeGpu:
    launches: list[Launch] = field(default_factory=list)
    waits: list[str] = field(default_factory=list)  # operations for which the host waits
    current: torch.device | None = None
    records: bool = True  # whether launches are kept, and with them their tensors

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        """Stand in for `torch.cuda.device`."""
        before, self.current = self.current, device
        try:
            yield
        finally:
            self.current = before


class _Recorder:
    """A kernel that records its launches and computes nothing."""

    def __init__(self, kernel: Any, gpu: FakeGpu):
        self.kernel, self.gpu = kernel, gpu

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def record(*arguments: Any, **options: Any) -> None:
            if self.gpu.records:
                self.gpu.launches.append(Launch(self.kernel, arguments, options, self.gpu.current))

        return record


class _Fake(FakeTensorMode):
    """A FakeTensorMode for a torch without CUDA: its C++ code, which would look for streams, is told "meta"."""

    # `torch.tensor` makes a tensor of the host, and copies it to its device.
    avoid_device_init = True  # pyright: ignore[reportAssignmentType]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is _DEVICE_OF:
            return _seen_by_cpp(args[0])
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "meta":
            kwargs["device"] = DEVICE
        return super().__torch_dispatch__(func, types, args, kwargs)


def _seen_by_cpp(tensor: FakeTensor) -> torch.device:
    return torch.device("meta") if tensor.fake_device.type == "cuda" else tensor.fake_device


@contextmanager
def _fake_cuda() -> Iterator[None]:
    dispatch = FakeTensor.__torch_dispatch__

    def dispatched(func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _seen_by_cpp(args[0]) if func is _DEVICE_OF else dispatch(func, types, args, kwargs or {})

    is_cuda = property(lambda tensor: tensor.fake_device.type == "cuda")
    handlers = {_DEVICE_OF: lambda args: _seen_by_cpp(args[0])}
    with (
        mock.patch.dict(fake_tensor._DISPATCH_META_HANDLERS, handlers),
        mock.patch.object(FakeTensor, "__torch_dispatch__", staticmethod(dispatched)),
        mock.patch.object(FakeTensor, "is_cuda", is_cuda, create=True),
        mock.patch.object(fake_tensor, "init_gpu_context", return_value=None),
        _Fake(allow_non_fake_inputs=True),
    ):
        yield


class _Watch(TorchDispatchMode):
    """Look inside our operators, and record every operation that makes the host wait for the GPU."""

    def __init__(self, gpu: FakeGpu):
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        inside = IMPLEMENTATIONS.get(str(func.name()))
        if inside is not None:
            with self:
                return inside(*args, **kwargs)
        result = func(*args, **kwargs)
        tensors = [t for t in (*args, result) if isinstance(t, Tensor)]
        if func is torch.ops.aten._local_scalar_dense.default and tensors[0].device.type == "cuda":
            self.gpu.waits.append(str(func))
        # Inside an operator of ours a copy is not taken apart yet: it may be any overload of `to`.
        copies = func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_, torch.ops.aten.to)
        if copies and len({t.device.type for t in tensors}) == 2 and not kwargs.get("non_blocking"):
            self.gpu.waits.append(f"{func} {' to '.join(str(t.device) for t in tensors)}")
        return result


@contextmanager
def fake_gpu(architecture: int = 90, processors: int = 132) -> Iterator[FakeGpu]:
    """Make CUDA tensors fake, and record what is launched for a GPU of this architecture."""
    gpu = FakeGpu()
    with (
        mock.patch.object(torch.cuda, "device", gpu.device),
        mock.patch.object(linear_logprob_launch, "processors", return_value=processors),
        mock.patch.object(tiles, "_architecture", return_value=architecture),
        mock.patch.object(linear_logprob_launch, "interpreted", return_value=False),
    ):
        replaced = [
            mock.patch.object(module, name, _Recorder(getattr(module, name), gpu))
            for module, names in _KERNELS.items()
            for name in names
        ]
        for patch in replaced:
            patch.start()
        try:
            with _fake_cuda(), _Watch(gpu):
                yield gpu
        finally:
            for patch in replaced:
                patch.stop()
