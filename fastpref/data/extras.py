"""The weights and margins of examples: whether there are any, and whether a loss takes them."""

import numpy as np

from fastpref.config.losses import LossOptions
from fastpref.data.table import Examples
from fastpref.errors import UserError


def check_extras(loss: LossOptions, examples: Examples) -> None:
    """Raise UserError, with the place of the first such row, if a row has a weight or margin that the loss ignores."""
    for name, reason in (("weight", loss.no_weights), ("margin", loss.no_margins)):
        given = has(examples, name)
        if reason and given.any():
            place = examples[int(np.argmax(given))].row.place
            raise UserError(
                f'{place}: {int(given.sum()):,} of {len(examples):,} rows have a {name}, and loss.type = "{loss.type}" '
                f"takes none: {reason}. Remove the column {name} from the data, or take another loss"
            )


def has(examples: Examples, name: str) -> np.ndarray:
    """Return which examples have a weight other than 1, or which have a margin, [E] bool."""
    values = examples.table.column(name).to_numpy()
    return values != 1 if name == "weight" else ~np.isnan(values)
