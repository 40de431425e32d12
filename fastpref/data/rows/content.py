"""The content of a row of any format: a prompt with its responses, and how to write them as text."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from typing import Any

Message = dict[str, Any]
Content = str | list[Message]  # text, or chat messages
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Writing:
    """Settings that determine how a prompt and its responses become text."""

    chat_template: str | None = None
    """Jinja that replaces the tokenizer's chat template."""
    tools: tuple[Any, ...] | None = None
    """The JSON schemas of the tools, for the chat template."""
    template_kwargs: Mapping[str, Any] | None = None
    """The row's own keywords for the chat template, such as enable_thinking."""
    without_template: str | None = None
    """Jinja for a tokenizer that has no chat template."""
    day: date | None = None
    """The date for chat templates that write it; None is today."""
    end: str | None = None
    """The end token of a response of text, if its format writes one itself."""


PLAIN = Writing()


@dataclass(frozen=True)
class Paired:
    prompt: Content
    chosen: Content
    rejected: Content
    writing: Writing = PLAIN
    remarks: tuple[str, ...] = field(default=(), compare=False)
    """Notes on how the row was read. For each note the rows are counted."""

    @property
    def responses(self) -> dict[str, Content]:
        return {"chosen": self.chosen, "rejected": self.rejected}


@dataclass(frozen=True)
class Unpaired:
    prompt: Content
    completion: Content
    label: bool
    writing: Writing = PLAIN
    remarks: tuple[str, ...] = field(default=(), compare=False)

    @property
    def responses(self) -> dict[str, Content]:
        return {"completion": self.completion}


class RowError(ValueError):
    """A mistake in one row. Dropped rows are counted by the kind of their mistake."""

    def __init__(self, what: str, kind: str):
        super().__init__(what)
        self.kind = kind


MISSING_COLUMN = "without a column"


def unpair(pair: Paired) -> tuple[Unpaired, Unpaired]:
    """Split a pair into a good and a bad response."""
    return (
        Unpaired(pair.prompt, pair.chosen, True, pair.writing, pair.remarks),
        Unpaired(pair.prompt, pair.rejected, False, pair.writing, pair.remarks),
    )


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


def label(row: Row, name: str = "label") -> bool:
    return read_label(column(row, name), name)


def shown(value: Any) -> str:
    """Return a value as it is shown in a message: at most 80 characters on one line."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
