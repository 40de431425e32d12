"""Tables of a vocabulary, [V, ...], with rows for further tokens."""

import torch
from torch import Tensor

_CHUNK = 8192  # rows that are summed at once


def grown(table: Tensor, rows: int) -> Tensor:
    """Return a table [V, ...] with at least this many rows, whose new ones are the mean of the others."""
    more = rows - len(table)
    return table if more <= 0 else torch.cat([table, mean_row(table).to(table.dtype).expand(more, *table.shape[1:])])


def mean_row(table: Tensor) -> Tensor:
    """Return the mean of the rows of a table [V, ...] in float64, without a copy of the table."""
    return sum((part.double().sum(0) for part in table.split(_CHUNK)), torch.zeros((), device=table.device)) / len(
        table
    )
