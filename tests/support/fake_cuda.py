"""A CUDA device without numbers, memory or a driver: fake tensors on "cuda:0", in a torch that has no CUDA.

What is above the kernels runs as on a card: autocast, autograd, operators and their launches, optimizers. Tensors have
shapes, dtypes and devices only, and a number that the host reads is 0.

torch's C++ code looks for the streams of a tensor's device, which are not there. So it is told "meta", and Python
"cuda:0"; autocast goes by dispatch keys, which are CUDA's. What C++ then makes on "meta" is made on "cuda:0".
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from tests.support.fake_attention import attention_of_fakes
from tests.support.fake_autocast import autocast_of_fakes

CUDA = torch.device("cuda", 0)
_DEVICE_OF = torch.ops.prim.device.default
_MEMORY = 80 << 30


class FakeCuda(FakeTensorMode):
    """A FakeTensorMode whose CUDA tensors are meta tensors to C++, and that makes no meta tensors."""

    avoid_device_init: Any = True  # torch.tensor makes a tensor of the host, and copies it to its device

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE_OF:
            return _device_for_cpp(args[0])
        device = (kwargs or {}).get("device")
        if device is not None and torch.device(device).type == "meta":
            kwargs = {**kwargs, "device": CUDA}
        pinned = bool((kwargs or {}).get("pin_memory"))
        out: Any = super().__torch_dispatch__(func, types, args, {**kwargs, "pin_memory": False} if pinned else kwargs)
        if pinned:
            out.pinned = True
        if func is torch.ops.aten.lift_fresh.default:
            out.constant = None  # numbers, with which torch would compute
        return out


@contextmanager
def fake_cuda(capability: tuple[int, int] = (9, 0)) -> Iterator[FakeCuda]:
    """Let torch have a CUDA device of a compute capability inside the block, with fake tensors only."""
    mode = FakeCuda()
    dispatch = FakeTensor.__torch_dispatch__

    def dispatched(func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _device_for_cpp(args[0]) if func is _DEVICE_OF else dispatch(func, types, args, kwargs or {})

    replaced: list[tuple[Any, str, Any]] = [
        *((torch.cuda, name, value) for name, value in _module(capability).items()),
        (torch._C, "_group_tensors_by_device_and_dtype", _grouped),
        (fake_tensor, "init_gpu_context", _ignored),
        (FakeTensor, "__torch_dispatch__", staticmethod(dispatched)),
        (FakeTensor, "is_cuda", property(on_cuda)),
        (FakeTensor, "tolist", _to_list),
        (FakeTensor, "__deepcopy__", _deep_copy),
        (Tensor, "to", _to),
        (Tensor, "record_stream", _ignored),
        (nn.Module, "_apply", _applied),
    ]
    handlers = {_DEVICE_OF: lambda args: _device_for_cpp(args[0])}
    with ExitStack() as patches:
        for owner, name, value in replaced:
            patches.enter_context(mock.patch.object(owner, name, value))
        patches.enter_context(mock.patch.dict(fake_tensor._DISPATCH_META_HANDLERS, handlers))
        patches.enter_context(autocast_of_fakes())
        patches.enter_context(attention_of_fakes())
        patches.enter_context(mode)
        yield mode


def on_cuda(value: Any) -> bool:
    """Return whether a value is a tensor on the device."""
    return isinstance(value, Tensor) and value.device.type == "cuda"


def _device_for_cpp(tensor: FakeTensor) -> torch.device:
    there = tensor.fake_mode.in_kernel_invocation or tensor.fake_device.type == "cuda"
    return torch.device("meta") if there else tensor.fake_device


def _to(tensor: Tensor, *args: Any, _to: Callable[..., Tensor] = Tensor.to, **options: Any) -> Tensor:
    """Call `Tensor.to` with "cuda:0" for "cuda", whose number C++ would ask of the driver."""
    given = (*args, *options.values())
    numbered = [CUDA if isinstance(value, torch.device | str) and str(value) == "cuda" else value for value in given]
    return _to(tensor, *numbered[: len(args)], **dict(zip(options, numbered[len(args) :])))


def _to_list(tensor: Tensor) -> Any:
    """Return zeros after one copy to the host. A fake tensor's own `tolist` reads its numbers one by one."""
    host = tensor.cpu()
    with _disable_current_modes():
        return torch.zeros(host.shape, dtype=host.dtype).tolist()


def _applied(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Change a module's tensors as `Module._apply` does, which cannot give fake tensors another device in place."""
    changed: dict[int, Tensor] = {}
    for part in module.modules() if recurse else [module]:
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in changed:
                    with torch.no_grad():
                        new = function(tensor)
                    same = (new.device, new.dtype) == (tensor.device, tensor.dtype)
                    changed[id(tensor)] = tensor if same else _like(tensor, new)
                tensors[name] = changed[id(tensor)]  # pyright: ignore[reportArgumentType]
    return module


def _like(tensor: Tensor, changed: Tensor) -> Tensor:
    """Return a changed tensor as a parameter, if it was one, with what bitsandbytes keeps at its weights."""
    if isinstance(tensor, nn.Parameter):
        changed = nn.Parameter(changed, tensor.requires_grad)
    vars(changed).update({name: value for name, value in vars(tensor).items() if name not in vars(changed)})
    return changed


def _deep_copy(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    """Copy a fake tensor, whose storage torch's own function would copy."""
    if id(tensor) not in memo:
        with torch.no_grad():
            memo[id(tensor)] = _like(tensor, tensor.clone()).requires_grad_(tensor.requires_grad)
    return memo[id(tensor)]


def _grouped(lists: list[list[Tensor | None]], with_indices: bool = False) -> dict[Any, Any]:
    """Group tensors as torch's function does, which sees them on "meta"."""
    groups: dict[Any, Any] = defaultdict(lambda: ([[] for _ in lists], []))
    for place, first in enumerate(lists[0]):
        assert first is not None
        members, places = groups[first.device, first.dtype]
        for member, values in zip(members, lists):
            if values:
                member.append(values[place])
        places += [place] * with_indices
    return dict(groups)


class Stream:
    """A stream on which nothing runs."""

    cuda_stream = device_index = stream_id = 0
    device_type = 1

    def __init__(self, *args: Any, **options: Any):
        self.device = CUDA

    def wait_stream(self, stream: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def record_event(self, event: Any = None) -> "Event":
        return Event()

    def synchronize(self) -> None:
        torch.cuda.synchronize()


class Event:
    """An event that nothing waits for."""

    def __init__(self, *args: Any, **options: Any): ...
    def record(self, stream: Any = None) -> None: ...
    def wait(self, stream: Any = None) -> None: ...
    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        torch.cuda.synchronize()


def _module(capability: tuple[int, int]) -> dict[str, Any]:
    """Return what `torch.cuda` has for one device of a compute capability."""
    major, minor = capability
    properties = SimpleNamespace(
        name="a fake card", major=major, minor=minor, multi_processor_count=132, total_memory=_MEMORY, warp_size=32,
        gcnArchName="", shared_memory_per_block_optin=232448, max_threads_per_multi_processor=2048,
        regs_per_multiprocessor=65536, L2_cache_size=50 << 20,
    )  # fmt: skip
    state = torch.zeros(16, dtype=torch.uint8)
    values: dict[str, Any] = {
        "is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0,
        "get_device_properties": properties, "get_device_capability": capability, "get_device_name": properties.name,
        "is_bf16_supported": major >= 8, "mem_get_info": (_MEMORY, _MEMORY), "memory_allocated": 0,
        "max_memory_allocated": 0, "memory_reserved": 0, "max_memory_reserved": 0, "get_rng_state": state,
        "get_rng_state_all": [state],
    }  # fmt: skip
    nothing = (
        "_lazy_init", "init", "set_device", "reset_peak_memory_stats", "empty_cache", "set_rng_state",
        "set_rng_state_all", "manual_seed", "manual_seed_all", "synchronize", "ipc_collect",
    )  # fmt: skip
    functions: dict[str, Callable[..., Any]] = {name: _returns(value) for name, value in values.items()}
    functions |= {name: _returns(None) for name in nothing}
    functions |= {name: _returns(Stream()) for name in ("current_stream", "default_stream")}
    functions |= {name: lambda *args: nullcontext() for name in ("stream", "device", "device_of")}
    library = SimpleNamespace(cudaHostRegister=_returns(0), cudaHostUnregister=_returns(0))
    return functions | {"Stream": Stream, "Event": Event, "cudart": _returns(library)}


def _ignored(*args: Any) -> None: ...


def _returns(value: Any) -> Callable[..., Any]:
    return lambda *args, **options: value
