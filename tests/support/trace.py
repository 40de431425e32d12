"""What a GPU would be given to do: what makes the host wait, what meets on the wrong device, products in float32."""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton import knobs
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from fastpref.kernels.operators import IMPLEMENTATIONS
from tests.support.fake_cuda import CUDA, fake_cuda, on_cuda

_ATEN = torch.ops.aten
_ROOT = Path(__file__).parents[2]
_HALF = (torch.float16, torch.bfloat16)
_COPIES = {_ATEN._to_copy.default, _ATEN.copy_.default, _ATEN._foreach_copy_.default}
_PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_grouped_mm", "fake_cuda::attention"}
_OF_TRITON = {"num_warps", "num_stages", "num_ctas", "maxnreg"}  # options of a launch that are not of the kernel
_LARGEST_GRID = (2**31 - 1, 65535, 65535)
_UPDATES = {"aten::_fused_adamw_", "aten::_foreach_addcdiv_"}
# How many rows they return depends on numbers, for which the host waits.
_COUNTING = {
    "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive",
    "aten::bincount", "aten::repeat_interleave",
}  # fmt: skip


class Event(NamedTuple):
    """Something that a step should not do, or only where a table allows it."""

    kind: str  # "wait": the host waits; "device": that of another; "float32": a product; "half": an updated weight
    place: str  # file and function of the innermost code that is not torch's
    operation: str


class Trace(TorchDispatchMode):
    """Collects the events and the launches of what is computed on a fake CUDA device."""

    def __init__(self, *, half: bool):
        super().__init__()
        self.half = half  # whether products are meant to be in half precision
        self.events: list[Event] = []
        self.launches: Counter[str] = Counter()
        self.operations: list[str] = []

    def clear(self) -> None:
        self.events, self.operations, self.launches = [], [], Counter()

    def add(self, kind: str, operation: str) -> None:
        self.events.append(Event(kind, _place(), operation))

    # --- operations --------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func._schema.name
        if name == "prim::device":
            return func(*args)
        inside = IMPLEMENTATIONS.get(name)
        if inside is not None:  # the launches of our own operators are traced
            self.operations.append(name)
            with self:
                return inside(*args, **kwargs)
        if _is_composite(func):  # below autograd it comes here whole
            with self:
                return func.decompose(*args, **kwargs)
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        if func in _COPIES:
            self._copied(func, args, kwargs)
        elif any(map(on_cuda, tensors)):
            self.operations.append(name)
            if any(tensor.dim() and not on_cuda(tensor) for tensor in tensors):
                self.add("device", f"{name} of tensors of CUDA and of the host")
            if self.half and name in _PRODUCTS and all(t.dtype == torch.float32 for t in tensors if t.is_floating_point()):
                self.add("float32", name)
            if name in _UPDATES and any(tensor.dtype in _HALF for tensor in tensors):
                self.add("half", f"{name} of weights in half precision")
            if name == "aten::_local_scalar_dense":
                self.add("wait", "a number is read")
            elif name in ("aten::equal", "aten::allclose"):
                self.add("wait", name)
            elif name in _COUNTING or (name in ("aten::index", "aten::index_put_") and _is_mask(args[1])):
                self.add("wait", f"{name} counts")
        return _numbers(func, name, args, kwargs)

    def _copied(self, func: Any, args: tuple[Any, ...], kwargs: Any) -> None:
        """Note a copy between host and device for which the host waits: pageable memory is read before a call returns."""
        into = func is not _ATEN._to_copy.default
        source, blocking = args[1 if into else 0], not kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
        for one, other in zip(source, args[0]) if isinstance(source, list) else [(source, args[0] if into else None)]:
            to_cuda = on_cuda(other) if other is not None else _goes_to_cuda(one, kwargs)
            if to_cuda and not on_cuda(one) and blocking:
                self.add("wait", "a copy to the device")
            if on_cuda(one) and not to_cuda and (blocking or not (other is not None and is_pinned(other))):
                self.add("wait", "a copy to the host")

    # --- launches ----------------------------------------------------------------------------------------------------

    def launched(self, kernel: Any, grid: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Check the arguments of a launch of a Triton kernel as Triton would, and where its tensors are."""
        name, parameters = kernel.fn.__name__, signature(kernel.fn).parameters
        own = {key: value for key, value in options.items() if key not in _OF_TRITON or key in parameters}
        given = signature(kernel.fn).bind(*args, **own)  # raises TypeError for one too many or too few
        given.apply_defaults()
        grid = grid(given.arguments) if callable(grid) else grid
        assert all(type(size) is int and 0 < size <= most for size, most in zip(grid, _LARGEST_GRID)), f"{name}: {grid}"
        for key, value in given.arguments.items():
            constant = "constexpr" in str(parameters[key].annotation)
            if isinstance(value, Tensor):
                assert not constant, f"{name}: the constant {key} is a tensor"
                if value.device != CUDA:
                    self.add("device", f"{name}: {key} is on {value.device}")
            elif not constant and value is not None:  # Triton takes None for a constant
                assert isinstance(value, bool | int | float), f"{name}: {key} is {value!r}"
                assert isinstance(value, float) or -(2**31) <= value < 2**31, f"{name}: {key} is {value:,}"
        products = [given.arguments[key] for key in ("p_hidden", "p_weight") if key in parameters]
        if self.half and name == "_walk_kernel" and not all(operand.dtype in _HALF for operand in products):
            self.add("float32", name)
        self.launches[name] += 1


@contextmanager
def traced(*, half: bool = True, capability: tuple[int, int] = (9, 0)) -> Iterator[Trace]:
    """Trace what is computed inside the block on a fake CUDA device."""
    trace = Trace(half=half)

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        trace.launched(kernel, grid, args, options)

    def synchronize(*args: Any) -> None:
        trace.add("wait", "torch.cuda.synchronize")

    with (
        fake_cuda(capability),
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(InterpretedFunction, "run", run),
        mock.patch.object(knobs.runtime, "interpret", False),  # the launches are those of a card
        mock.patch.object(torch.cuda, "synchronize", synchronize),
        trace,
    ):
        yield trace


def _numbers(func: Any, name: str, args: tuple[Any, ...], kwargs: Any) -> Any:
    """Run an operation. One that needs numbers takes all of them for 0, False or equal, and counts all rows."""
    if name == "aten::_local_scalar_dense":
        dtype = args[0].dtype
        return False if dtype == torch.bool else 0.0 if dtype.is_floating_point else 0
    if name in ("aten::equal", "aten::allclose"):
        return True
    if name == "aten::index" and _is_mask(args[1]):
        (mask,) = args[1]
        return args[0].new_empty((mask.numel(), *args[0].shape[mask.dim() :]))
    if name == "aten::nonzero":
        return args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.int64)
    return func(*args, **kwargs)


@cache
def _is_composite(func: Any) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


def _is_mask(indices: Any) -> bool:
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


def _goes_to_cuda(tensor: Tensor, kwargs: Any) -> bool:
    device = kwargs.get("device")
    return on_cuda(tensor) if device is None else torch.device(device).type in ("cuda", "meta")


def is_pinned(tensor: Tensor) -> bool:
    return bool(getattr(tensor, "pinned", False))


def _place() -> str:
    """Return the file and the function of the innermost frame that is not torch's, triton's or of these helpers."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        inside = _within(path)
        if inside is not None:
            return f"{inside}:{frame.f_code.co_qualname}"
        frame = frame.f_back
    return "?"


def _within(path: Path) -> str | None:
    name = path.as_posix()
    _, libraries, inside = name.partition("site-packages/")
    if libraries:
        return None if inside.partition("/")[0] in ("torch", "triton") else inside
    if path.is_relative_to(_ROOT):
        inside = path.relative_to(_ROOT).as_posix()
        return None if inside.startswith(("tests/support/", "fastpref/kernels/launch.py", "kernels/launch.py")) else inside
    return None
