"""The shares of time that a process spends in matrix products and in attention, by torch's profiler."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm", "aten::_addmm_activation")
ATTENTION = "_scaled_dot_product"  # in the names of the operations of every backend, forwards and backwards


@dataclass
class Shares:
    """Shares of the time in all operations, on the GPU if there is one."""

    products: float = 0.0
    attention: float = 0.0


@contextmanager
def shares() -> Iterator[Shares]:
    """Profile the block, and yield its shares, which are known behind it."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    cuda, result = torch.cuda.is_available(), Shares()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as profiler:
        yield result
    found = shares_of(profiler.key_averages(), cuda=cuda)
    result.products, result.attention = found.products, found.attention


def shares_of(averages: Iterable[Any], *, cuda: bool) -> Shares:
    """Return the shares of the profiler's averages.

    On a GPU they have each kernel twice: by its own name, and in the time of the operation that launched it.
    """
    rows = [(e.key, e.self_device_time_total if cuda else e.self_cpu_time_total, e) for e in averages]
    total = sum(time for _, time, e in rows if not cuda or on_gpu(e)) or 1.0
    operations = [(name, time) for name, time, e in rows if not on_gpu(e)]
    return Shares(
        sum(time for name, time in operations if name in PRODUCTS) / total,
        sum(time for name, time in operations if ATTENTION in name) / total,
    )


def on_gpu(event: Any) -> bool:
    """Return whether a profiler's event is a kernel or a copy of a GPU.

    The others are of the host, or the span of a whole part of the program, such as an optimizer's step.
    """
    from torch.autograd import DeviceType

    return event.device_type == DeviceType.CUDA and not event.is_user_annotation
