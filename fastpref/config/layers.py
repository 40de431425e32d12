"""The entries of `lora.layers`: an index, or a slice such as "0:8"."""

from collections.abc import Iterable

from fastpref.errors import UserError


def places(entry: int | str, count: int) -> Iterable[int]:
    """Return the places of the layers that an entry names, for a model with `count` layers.

    Raises UserError for an index that the model does not have, and for a slice without layers.
    """
    ends = [entry] if isinstance(entry, int) else [int(end) for end in entry.split(":") if end]
    most = count - 1 if isinstance(entry, int) else count
    if any(not -count <= end <= most for end in ends):
        raise UserError(
            f"lora.layers: {entry!r} is out of range: this model has {count} layers, 0 to {count - 1}, and -1 is the "
            "last one"
        )
    if isinstance(entry, int):
        return [entry % count]
    first, last = (int(end) if end else None for end in entry.split(":"))
    if not (chosen := range(count)[first:last]):
        raise UserError(f"lora.layers: {entry!r} is empty: this model has {count} layers, 0 to {count - 1}")
    return chosen
