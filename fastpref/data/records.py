"""Rows by number, whatever file or data set they are in, with a place of each for messages."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Protocol


class Records(Protocol):
    """Rows by number, counted from 0. Reading a broken one raises RowError."""

    @property
    def notes(self) -> Sequence[str]:
        """What a user should know about how the rows were found, one sentence each."""
        ...

    def __len__(self) -> int: ...
    def __getitem__(self, at: int) -> dict[str, Any]: ...
    def place(self, at: int) -> str:
        """Return `file:line`, or `file, row N` if there are no lines."""
        ...


def twice(names: Sequence[str]) -> str | None:
    """Return the first name that is there more than once, or None."""
    return next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None


class Joined:
    """The rows of several files, one file after the other."""

    def __init__(self, parts: Sequence[Records], notes: Sequence[str] = ()):
        self._parts = parts
        self._ends = list(accumulate(map(len, parts)))
        self.notes = (*notes, *dict.fromkeys(note for part in parts for note in part.notes))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, at: int) -> dict[str, Any]:
        part, within = self._find(at)
        return part[within]

    def place(self, at: int) -> str:
        part, within = self._find(at)
        return part.place(within)

    def _find(self, at: int) -> tuple[Records, int]:
        which = bisect_right(self._ends, at)
        return self._parts[which], at - (self._ends[which - 1] if which else 0)
