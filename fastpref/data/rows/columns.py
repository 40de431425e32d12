"""The columns of a row and the keys of a message that formats read, grouped by their content."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fastpref.data.rows.content import Row, RowError, shown

PROMPTS = ("prompt", "input", "question", "instruction")
"""The columns in which the formats `*.default` look for the prompt, in this order."""
QUESTIONS = ("prompt", "question", "instruction", "input", "query")
"""The columns that may hold the prompt of an unknown data set, the likeliest first."""
CONTEXT = ("system", "system_prompt", "instruction", "input", "history", "context", "question", "query", "functions")
"""Columns of text that are part of the prompt in some data sets. A format that ignores one must say so."""
CHOSEN, REJECTED = ("chosen", "chosen_response"), ("rejected", "rejected_response")
LABELS = ("label", "kto_tag")
WEIGHT, MARGIN = "weight", "margin"
"""The columns of numbers that every format reads, unless its options name others."""
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
REASONING = ("reasoning_content", "reasoning", "thinking")
"""The keys of a message under which data sets store the reasoning before the answer."""

Columns = tuple[tuple[str, ...], ...]
"""The columns that a format needs: one of each group."""
PAIR: Columns = (("prompt",), ("chosen",), ("rejected",))
SINGLE: Columns = (("prompt",), ("completion",), ("label",))


@dataclass(frozen=True)
class NamedFormat:
    """The readers of a named format for pairs and, if it supports them, single completions, and their columns.

    Each reader is a function of the format's options that returns a function from a row to its content. `imitated`
    reads the completions of supervised training, if it does so otherwise than `unpaired` reads those of KTO.
    """

    paired: Callable[..., Any]
    columns: Columns = PAIR
    unpaired: Callable[..., Any] | None = None
    unpaired_columns: Columns = ()
    imitated: Callable[..., Any] | None = None


MISSING_COLUMN = "without a column"


def column(row: Row, name: str) -> Any:
    """Return a column's value. Raises RowError if there is none."""
    if name not in row:
        columns = f"the columns are {', '.join(map(str, row))}" if row else "the row is empty"
        raise RowError(f"there is no column {name}; {columns}", MISSING_COLUMN)
    if row[name] is None:
        raise RowError(f"{name} is missing (null)", "with a null")
    return row[name]


def text(row: Row, name: str) -> str:
    """Return a column's text. Raises RowError for anything else."""
    value = column(row, name)
    if not isinstance(value, str):
        hint = "; the formats chat_template.* and auto read messages" if isinstance(value, list | Mapping) else ""
        raise RowError(f"{name} must be text, got {shown(value)}{hint}", "with a value of another type")
    return value


def read_label(value: Any, name: str = "label") -> bool:
    """Read true or false as a boolean, as 0 or 1, or as words in any case. Raises RowError for anything else."""
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):
        return value.strip().lower() == "true"
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    raise RowError(f"{name} must be true or false, 0 or 1, got {shown(value)}", "with a label that is no boolean")


_LEAST, _MOST = 2.0**-126, 2.0**127  # what float32, in which losses are computed, tells from 0 and infinity


def read_number(value: Any, name: str, what: str, kind: str, *, positive: bool = False) -> float:
    """Return a finite number, with `positive` one above 0. Raises RowError of a kind."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _MOST
    if not number or (positive and value < _LEAST):
        raise RowError(f"{name} holds {shown(value)}; {what}", kind)
    return float(value)


def label(row: Row, name: str = "label") -> bool | None:
    """Return the label of a row, or None if there is no such column. Raises RowError for one that is no boolean."""
    return read_label(column(row, name), name) if name in row else None
