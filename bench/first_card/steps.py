"""A step of DPO with QLoRA: its time by part, and its peak beside the estimate."""

import gc
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch

from bench.first_card.outcome import Case, Outcome
from bench.first_card.sizes import Llama, Sizes
from bench.measure import median_ms
from bench.shares import on_gpu

if TYPE_CHECKING:  # it needs packages that the kernels do not
    from bench.first_card.one_step import Step

# Patterns for the names of kernels and operations; the first match decides. cuBLAS also multiplies for the head.
PARTS = {
    "head's kernels": r"_walk_kernel|_combine_kernel|_rescale_kernel|_gradient_kernel|_scale_kernel|^fastpref::",
    "attention": r"flex|tem_fused|scaled_dot_product|flash|fmha",
    "4 bits": r"dequant|quantize",
    "products": r"gemm|cutlass|nvjet|xmma|cublas|^aten::(add|b|badd)?mm_?$|^aten::_addmm",
    "liger": r"liger|swiglu|rms_norm|rope",
    "optimizer": r"adam|multi_tensor|foreach",
    "copies": r"memcpy|memset|aten::copy_",
}


def cases(sizes: Sizes) -> Iterator[Case]:
    for llama in sizes.models:
        yield (
            f"{llama.name}, {sizes.pairs} pairs of {sizes.prompt} + 2 × {sizes.completion} tokens",
            (lambda llama=llama: _step(llama, sizes)),
        )


def _step(llama: Llama, sizes: Sizes) -> Outcome:
    from bench.first_card.one_step import make_step

    gpu = sizes.device == "cuda"
    gc.collect()  # the model of the case before
    before = torch.cuda.memory_allocated() if gpu else 0
    step = make_step(llama, sizes)
    losses = [step.take() for _ in range(2)]  # compiles, and allocates the moments
    numbers = {"loss": losses[0]}
    if gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    losses.append(step.take())
    right = all(loss == loss for loss in losses) and losses[0] >= 0
    if gpu:
        numbers |= _peak_beside_estimate(llama, step, torch.cuda.max_memory_allocated() - before)
    tokens = sizes.pairs * (sizes.prompt + 2 * sizes.completion)
    ms = median_ms(step.take, sizes.device, sizes.repeats)
    numbers |= {"ms": ms, "tokens/s": 1000 * tokens / ms} | _shares(step.take, gpu=gpu)
    return Outcome(numbers, right=right, note=step.note)


def _peak_beside_estimate(llama: Llama, step: "Step", peak: int) -> dict[str, float]:
    from bench.first_card.random_model import architecture
    from fastpref.memory.step import count_step

    counted = count_step(
        step.config, torch.device("cuda"), examples=step.examples, architecture=architecture(llama)
    ).total
    return {"GiB at the peak": peak / 2**30, "GiB counted": counted / 2**30, "peak / counted": peak / counted}


def _shares(take: Callable[[], object], *, gpu: bool) -> dict[str, float]:
    """Return the share of each part in the time of all kernels, in percent, and the share in which none ran."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]) as profiler:
        take()
        if gpu:
            torch.cuda.synchronize()
    if gpu:
        kernels = [event for event in profiler.events() or [] if on_gpu(event)]
        times = [(event.name, event.time_range.start, event.time_range.elapsed_us()) for event in kernels]
    else:
        times = [(event.key, 0.0, event.self_cpu_time_total) for event in profiler.key_averages()]
    total = sum(time for _, _, time in times) or 1.0
    shares = dict.fromkeys([*PARTS, "other"], 0.0)
    for name, _, time in times:
        shares[part_of(name)] += 100 * time / total
    result = {f"% {part}": share for part, share in shares.items()}
    if gpu and times:
        ordered = sorted((start, start + time) for _, start, time in times)
        span = max(end for _, end in ordered) - ordered[0][0]
        result["% of the step without a kernel"] = 100 * idle(ordered) / span
    return result


def part_of(name: str) -> str:
    """Return the part of PARTS to which a kernel or an operation belongs, or "other"."""
    return next((part for part, words in PARTS.items() if re.search(words, name, re.IGNORECASE)), "other")


def idle(ranges: list[tuple[float, float]]) -> float:
    """Return the time between the first and the last of some ranges, ordered by their start, that is in none."""
    total, busy_until = 0.0, ranges[0][1]
    for start, end in ranges[1:]:
        total += max(0.0, start - busy_until)
        busy_until = max(busy_until, end)
    return total
