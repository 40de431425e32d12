"""The same step with all layers streamed from host memory: the same loss, less memory, and the time of the copies."""

import gc
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from bench.first_card.outcome import Case, Outcome
from bench.first_card.sizes import Llama, Sizes
from bench.measure import median_ms


@dataclass
class Resident:
    """The numbers of the step with all weights on the device, with which the others are compared."""

    loss: float | None = None
    ms: float = 0.0
    peak: int = 0


def cases(sizes: Sizes) -> Iterator[Case]:
    resident = Resident()
    for llama in sizes.models[:1]:
        for slots in (0, 2, 3):
            name = f"{slots} slots" if slots else "resident"
            yield f"{llama.name}, {name}", lambda llama=llama, slots=slots: _step(llama, sizes, slots, resident)


def _step(llama: Llama, sizes: Sizes, slots: int, resident: Resident) -> Outcome:
    from bench.first_card.one_step import make_step
    from fastpref.model.streaming.stream import Streaming

    gc.collect()
    gpu = sizes.device == "cuda"
    if gpu:
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
    step = make_step(llama, sizes, Streaming(slots) if slots else None)
    loss = step.take()
    if gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    ms = median_ms(step.take, sizes.device, sizes.repeats)
    peak = torch.cuda.max_memory_allocated() - before if gpu else 0
    numbers = {"loss": loss, "ms": ms} | ({"GiB at the peak": peak / 2**30} if gpu else {})
    if not slots:
        resident.loss, resident.ms, resident.peak = loss, ms, peak
        return Outcome(numbers)
    if resident.loss is None:
        return Outcome(numbers, note="the resident step failed, so nothing is compared")
    numbers |= {"× the resident time": ms / resident.ms} | ({"× its peak": peak / resident.peak} if gpu else {})
    error = abs(loss / resident.loss - 1)
    return Outcome(numbers | {"relative error of the loss": error}, right=error <= 1e-3)
