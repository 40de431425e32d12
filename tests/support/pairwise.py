"""Tables in which every two values of different factors meet."""

from collections.abc import Mapping, Sequence
from itertools import combinations, product
from typing import Any

Row = dict[str, Any]


def whole_product(factors: Mapping[str, Sequence[Any]]) -> list[Row]:
    """Return every combination of the values of factors."""
    return [dict(zip(factors, values)) for values in product(*factors.values())]


def covering(factors: Mapping[str, Sequence[Any]]) -> list[Row]:
    """Return few combinations of the values of factors that hold every pair of values, by the greedy algorithm."""
    candidates, table = whole_product(factors), []
    missing = {pair for row in candidates for pair in _pairs(row)}
    while missing:
        best = max(candidates, key=lambda row: len(missing & _pairs(row)))
        table.append(best)
        missing -= _pairs(best)
    return table


def _pairs(row: Row) -> set[tuple[tuple[str, Any], ...]]:
    return set(combinations(row.items(), 2))
