"""The order of the examples: a pure function of their number, the batch size and the seed."""

from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def data_order(count: int, batch: int, seed: int, start: int = 0) -> Iterator[list[int]]:
    """Yield the indices of the examples of each step, in shuffled passes over the data, without end.

    The first `start` steps are skipped; those after them are the same as without `start`.
    """
    import torch  # here, because `model/limits.py` is imported without torch

    generator = torch.Generator().manual_seed(seed)
    passes, place = divmod(start * batch, count)
    for _ in range(passes):
        torch.randperm(count, generator=generator)
    waiting: list[int] = torch.randperm(count, generator=generator).tolist()[place:]
    while True:
        while len(waiting) < batch:
            waiting += torch.randperm(count, generator=generator).tolist()
        yield waiting[:batch]
        waiting = waiting[batch:]


def chunks(sequence: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Yield consecutive parts of `size` elements each, as an evaluation takes its examples; the last may be shorter."""
    for start in range(0, len(sequence), size):
        yield sequence[start : start + size]
