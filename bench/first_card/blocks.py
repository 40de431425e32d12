"""The blocks: what is right before what is fast."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module

from bench.first_card.outcome import Case
from bench.first_card.sizes import Sizes


@dataclass(frozen=True)
class Block:
    title: str
    module: str  # with a function `cases`
    share: float  # of the time; what one block does not need is left to the next

    def cases(self, sizes: Sizes) -> Iterator[Case]:
        make: Callable[[Sizes], Iterator[Case]] = import_module(f"bench.first_card.{self.module}").cases
        return make(sizes)


BLOCKS = {
    "limits": Block("What the device itself reaches", "limits", 0.5),
    "numerics": Block("Kernels against float64", "numerics", 2.5),
    "attention": Block("FlexAttention against SDPA, each layer compiled anew", "attention", 1.5),
    "heads": Block("Time of the head", "heads", 2.5),
    "steps": Block("A step of DPO with QLoRA, random weights", "steps", 2.0),
    "streamed": Block("The same with streamed layers", "streamed", 1.0),
}
