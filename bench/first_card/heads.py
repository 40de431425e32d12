"""Time of the head with every tile."""

from collections.abc import Iterator

from bench.first_card.outcome import Case
from bench.first_card.sizes import Sizes


def cases(sizes: Sizes) -> Iterator[Case]:
    yield from ()
