"""The memory of a GPU that a run's process takes: tensors, what the allocator holds besides, and CUDA's libraries."""

from dataclasses import dataclass
from enum import StrEnum

import torch

from fastpref.memory.step import StepMemory
from fastpref.sizes import GIB

_TENSORS = 0.02  # the share by which the count of tensors may be wrong (docs/estimate.md)


@dataclass(frozen=True)
class Band:
    """A number of bytes that is known within bounds."""

    low: int
    likely: int
    high: int


# CUDA's context, the kernels that are loaded, and cuBLAS' workspaces: assumed, not counted. They depend on the GPU, its
# driver, and which kernels run. A workspace of cuBLAS has 8 MiB, or 32 MiB on Hopper and later, and there are two or
# three: one of the forward and one of the backward pass, which are different threads, and cuBLASLt's.
LIBRARIES = Band(int(0.3 * GIB), GIB // 2, GIB)


class Verdict(StrEnum):
    """Whether a step fits a GPU."""

    FITS = "fits"
    UNCERTAIN = "uncertain"
    DOES_NOT = "does not fit"


@dataclass(frozen=True)
class Card:
    """A GPU.

    Attributes:
        size: GiB, as it is named; vendors call them GB.
        low, high: the bytes that CUDA reports for it, at least and at most.
    """

    size: float
    low: int
    high: int

    @classmethod
    def named(cls, size: float) -> "Card":
        """Return a GPU of which only the size is known.

        CUDA reports 97 to 99 % of it for most cards, and 91 to 92 % for those whose memory corrects errors with a part
        of itself, such as T4, L4, A10G and L40S.
        """
        return cls(size, int(0.91 * size * GIB), int(0.99 * size * GIB))

    @classmethod
    def present(cls) -> "Card | None":
        """Return this machine's first GPU, or None without one."""
        if not torch.cuda.is_available():
            return None
        total = torch.cuda.get_device_properties(0).total_memory
        return cls(total / GIB, int(0.98 * total), total)  # a screen takes some of it, too

    def verdict(self, needed: Band) -> Verdict:
        """Say whether a process that needs so much fits."""
        if needed.high <= self.low:
            return Verdict.FITS
        return Verdict.DOES_NOT if needed.low > self.high else Verdict.UNCERTAIN


def process(memory: StepMemory) -> Band:
    """Return what a process takes of a GPU for a counted step.

    At least it takes the tensors in the allocator's blocks: what lies between them is given back if memory lacks. At
    most it takes all that the allocator reserves if nothing lacks. Both have the error of the count in addition.
    """
    tensors = memory.total - memory.overhead
    return Band(
        int((1 - _TENSORS) * tensors) + memory.rounding + LIBRARIES.low,
        tensors + memory.gaps + LIBRARIES.likely,
        int((1 + _TENSORS) * tensors) + memory.gaps + LIBRARIES.high,
    )
