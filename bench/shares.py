"""The shares of time that a process spends in matrix products and in attention, by torch's profiler."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

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
    times = {e.key: e.self_device_time_total if cuda else e.self_cpu_time_total for e in profiler.key_averages()}
    total = sum(times.values()) or 1.0
    result.products = sum(times.get(name, 0.0) for name in PRODUCTS) / total
    result.attention = sum(time for name, time in times.items() if ATTENTION in name) / total
