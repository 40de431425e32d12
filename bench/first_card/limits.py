"""Speeds of the device itself: matrix products of the library, and copies."""

from collections.abc import Iterator

import torch

from bench.first_card.outcome import Case, Outcome
from bench.first_card.sizes import Sizes
from bench.measure import median_ms


def cases(sizes: Sizes) -> Iterator[Case]:
    yield "device", lambda: _device(sizes)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        yield f"product, {str(dtype).removeprefix('torch.')}", lambda dtype=dtype: _product(sizes, dtype)
    yield "copy in its memory", lambda: _copy(sizes)
    yield "copy from pinned host memory", lambda: _from_host(sizes)


def _device(sizes: Sizes) -> Outcome:
    if sizes.device == "cpu":
        return Outcome(note="a CPU, with tiny sizes: nothing here says anything about a GPU")
    p = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info()
    numbers = {
        "capability": p.major + p.minor / 10,
        "multiprocessors": p.multi_processor_count,
        "L2 MB": p.L2_cache_size / 1e6,
        "GiB": total / 2**30,
        "GiB free": free / 2**30,
    }
    return Outcome(numbers, note=f"CUDA {torch.version.cuda}")


def _product(sizes: Sizes, dtype: torch.dtype) -> Outcome:
    n = sizes.product
    left, right = (torch.randn(n, n, device=sizes.device, dtype=dtype) for _ in range(2))
    ms = median_ms(lambda: left @ right, sizes.device, sizes.repeats)
    return Outcome({"TFLOP/s": 2 * n**3 / ms / 1e9, "ms": ms})


def _copy(sizes: Sizes) -> Outcome:
    source = torch.empty(sizes.copied, dtype=torch.uint8, device=sizes.device)
    target = torch.empty_like(source)
    ms = median_ms(lambda: target.copy_(source), sizes.device, sizes.repeats)
    return Outcome({"GB/s read and written": 2 * sizes.copied / ms / 1e6})


def _from_host(sizes: Sizes) -> Outcome:
    if sizes.device == "cpu":
        return Outcome(note="left out: a CPU has no other memory")
    source = torch.empty(sizes.copied, dtype=torch.uint8).pin_memory()
    target = torch.empty_like(source, device=sizes.device)
    ms = median_ms(lambda: target.copy_(source, non_blocking=True), sizes.device, sizes.repeats)
    return Outcome({"GB/s": sizes.copied / ms / 1e6})
