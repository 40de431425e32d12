"""Rows of a table of the library `datasets`."""

from typing import Any

import datasets

BLOCK = 256  # rows of an Arrow table that are decoded at once


class ArrowRecords:
    """A table of `datasets`, memory-mapped."""

    notes = ()

    def __init__(self, name: str, table: datasets.Dataset):
        self._name, self._table = name, table
        self._block: tuple[int, list[dict[str, Any]]] = (-1, [])

    def __len__(self) -> int:
        return len(self._table)

    @property
    def fingerprint(self) -> str:
        """The fingerprint that `datasets` gives this version of the data."""
        return self._table._fingerprint

    def __getitem__(self, at: int) -> dict[str, Any]:
        block, within = divmod(at, BLOCK)
        if self._block[0] != block:
            columns: Any = self._table[block * BLOCK : (block + 1) * BLOCK]
            # A table stores null for keys that only the messages, calls or schemas of other rows have.
            rows = zip(*([_without_nulls(value) for value in values] for values in columns.values()))
            self._block = block, [dict(zip(columns, values)) for values in rows]
        return self._block[1][within]

    def place(self, at: int) -> str:
        return f"{self._name}, row {at}"


def _without_nulls(value: Any) -> Any:
    """Return a cell without the keys whose values are null; a cell that is null itself stays."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value
