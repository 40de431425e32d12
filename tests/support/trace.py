"""What a GPU would be given to do, from fake CUDA tensors: operations, launches of kernels, and events to look at.

An event is a wait of the host for the device, a tensor of the host among those of the device, a product in float32
where autocast means half precision, or an update of a weight in half precision.
"""

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from inspect import Parameter, signature
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

from fastpref.kernels import preference_loss_launch
from fastpref.kernels.operators import IMPLEMENTATIONS
from tests.support.fake_attention import forget_caches
from tests.support.fake_cuda import CUDA, fake_cuda, on_cuda

_ATEN = torch.ops.aten
_ROOT = Path(__file__).parents[2]
_HALF = {torch.float16, torch.bfloat16}
_COPIES = {_ATEN._to_copy.default, _ATEN.copy_.default, _ATEN._foreach_copy_.default}
_PRODUCTS = {
    "aten::mm", "aten::addmm", "aten::mv", "aten::addmv", "aten::bmm", "aten::baddbmm", "aten::_grouped_mm",
    "aten::convolution", "fake_cuda::attention",
}  # fmt: skip
# Options of a launch that are not of the kernel.
_OF_TRITON = {"num_warps", "num_stages", "num_ctas", "maxnreg", "enable_fp_fusion"}
_LARGEST_GRID = (2**31 - 1, 65535, 65535)
_UPDATES = {"aten::_fused_adamw_", "aten::_foreach_addcdiv_"}
_READING = {"aten::_local_scalar_dense", "aten::equal", "aten::allclose"}
# How many rows they return depends on numbers.
_COUNTING = {
    "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive",
    "aten::bincount", "aten::repeat_interleave",
}  # fmt: skip


class Event(NamedTuple):
    """Something that a step should not do, or only where a table allows it."""

    kind: str  # "wait", "device", "float32" or "half", as described above
    place: str  # file and function of the innermost code that is neither torch's nor Triton's
    operation: str


class Launch(NamedTuple):
    """The launch of a Triton kernel, as far as it decides what is compiled."""

    kernel: str
    dtypes: dict[str, torch.dtype]  # of the tensors among its arguments
    constants: dict[str, Any]  # with num_warps and num_stages


class Trace(TorchDispatchMode):
    """Collects the events and the launches of what is computed on a fake CUDA device."""

    def __init__(self, *, half: bool):
        super().__init__()
        self.half = half  # whether products are meant to be in half precision
        self.events: list[Event] = []
        self.launches: list[Launch] = []
        self.operations: list[str] = []

    def clear(self) -> None:
        """Forget what was traced."""
        self.events, self.operations, self.launches = [], [], []

    def add(self, kind: str, operation: str) -> None:
        self.events.append(Event(kind, _place(), operation))

    # --- operations --------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
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
            for source, target in _copies(func, args, kwargs):
                self._copied(source, target, non_blocking=_non_blocking(args, kwargs))
        elif any(map(on_cuda, tensors)):
            self.operations.append(name)
            if any(tensor.dim() and not on_cuda(tensor) for tensor in tensors):
                self.add("device", f"{name} with a tensor of the host")
            dtypes = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
            if self.half and name in _PRODUCTS and dtypes == {torch.float32}:
                self.add("float32", name)
            if name in _UPDATES and dtypes & _HALF:
                self.add("half", name)
            if _waits(name, args, kwargs):
                self.add("wait", name)
        return _without_numbers(func, name, args, kwargs)

    def _copied(self, source: Tensor, target: Tensor | torch.device, *, non_blocking: bool) -> None:
        """Add a copy for which the host waits. One from pageable memory is staged, so that it need not block."""
        device = target.device if isinstance(target, Tensor) else target
        if device.type == "cuda" and not on_cuda(source) and not non_blocking:
            self.add("wait", "a copy to the device")
        if device.type == "cpu" and on_cuda(source) and not (non_blocking and is_pinned(target)):
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
            constant = _is_constant(parameters[key])
            if isinstance(value, Tensor):
                assert not constant, f"{name}: the constant {key} is a tensor"
                if value.device != CUDA:
                    self.add("device", f"{name}: {key} is on {value.device}")
            elif not constant and value is not None:  # Triton takes None for a constant
                assert isinstance(value, bool | int | float), f"{name}: {key} is {value!r}"
                assert isinstance(value, float) or -(2**31) <= value < 2**31, f"{name}: {key} is {value:,}"
        products = [given.arguments[key] for key in ("p_hidden", "p_weight") if key in parameters]
        if self.half and name == "_walk_kernel" and not {operand.dtype for operand in products} <= _HALF:
            self.add("float32", name)
        dtypes = {key: value.dtype for key, value in given.arguments.items() if isinstance(value, Tensor)}
        constants = {key: value for key, value in given.arguments.items() if _is_constant(parameters[key])}
        self.launches.append(Launch(name, dtypes, constants | options))


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
        mock.patch.dict(os.environ),  # to which Triton writes its knobs
        mock.patch.object(knobs.runtime, "interpret", False),  # the launches are those of a card
        mock.patch.object(torch.cuda, "synchronize", synchronize),
        trace,
    ):
        forget_caches(preference_loss_launch)
        try:
            yield trace
        finally:
            forget_caches(preference_loss_launch)


# --- operations ------------------------------------------------------------------------------------------------------


@cache
def _is_composite(func: Any) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


def _copies(func: Any, args: Any, kwargs: Any) -> Iterable[tuple[Tensor, Tensor | torch.device]]:
    """Return the tensors that an operation copies, and to where."""
    if func is _ATEN._to_copy.default:
        device = torch.device(kwargs.get("device") or args[0].device)
        return [(args[0], CUDA if device.type == "meta" else device)]
    return zip(args[1], args[0]) if isinstance(args[0], list) else [(args[1], args[0])]


def _non_blocking(args: Any, kwargs: Any) -> bool:
    return bool(kwargs.get("non_blocking", args[2] if len(args) > 2 else False))


def _waits(name: str, args: Any, kwargs: Any) -> bool:
    """Return whether the host waits for an operation's result."""
    if name in ("aten::index", "aten::index_put_"):
        return _has_mask(args[1])
    if name == "aten::repeat_interleave":
        return kwargs.get("output_size") is None
    return name in _READING or name in _COUNTING


def _has_mask(indices: Any) -> bool:
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


def _without_numbers(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Run an operation. One that reads numbers finds zeros that are equal, and one that counts, counts every row."""
    if name == "aten::_local_scalar_dense":
        return _zero(args[0].dtype)
    if name in _READING:
        return True
    if name == "aten::index" and _has_mask(args[1]):
        every = (_every(index) if _has_mask([index]) else [index] for index in args[1])
        return func(args[0], [index for group in every for index in group])
    if name == "aten::index_put_" and _has_mask(args[1]):
        return args[0]
    if name == "aten::nonzero":
        return args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.int64)
    if name == "aten::masked_select":
        return args[0].new_empty(args[1].numel())
    return func(*args, **kwargs)


def _every(mask: Tensor) -> list[Tensor]:
    """Return the indices of as many places as a mask has."""
    return [mask.new_empty(mask.numel(), dtype=torch.int64)] * mask.dim()


def _zero(dtype: torch.dtype) -> bool | int | float:
    return False if dtype == torch.bool else 0.0 if dtype.is_floating_point else 0


def is_pinned(value: Any) -> bool:
    """Return whether a fake tensor is in memory of the host that the device reads by itself."""
    return bool(getattr(value, "pinned", False))


# --- launches and places ---------------------------------------------------------------------------------------------


def _is_constant(parameter: Parameter) -> bool:
    return "constexpr" in str(parameter.annotation)


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
    """Return a file's path in this repository or in its library, or None if what it calls is the place."""
    _, library, inside = path.as_posix().partition("site-packages/")
    if library:
        return None if inside.startswith(("torch/", "triton/")) else inside
    if not path.is_relative_to(_ROOT):
        return None
    inside = path.relative_to(_ROOT).as_posix()
    return None if inside.startswith("tests/support/") or inside.endswith("kernels/launch.py") else inside
