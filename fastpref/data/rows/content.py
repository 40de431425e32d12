"""What every row becomes, whatever it looked like: a prompt with its responses, and how they are to be written."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from typing import Any

Message = dict[str, Any]
Content = str | list[Message]  # text, or chat messages
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Writing:
    """How prompt and responses become text, beside their own words."""

    chat_template: str | None = None
    """Jinja in place of the tokenizer's, for messages."""
    tools: tuple[Any, ...] | None = None
    """What the chat template is told of the tools there are: their JSON schemas."""
    template_kwargs: Mapping[str, Any] | None = None
    """Keywords for the chat template that this row sets: enable_thinking, reasoning_effort."""
    without_template: str | None = None
    """Jinja for messages where the tokenizer has no chat template."""
    day: date | None = None
    """The day that a chat template which writes the date is to write; None is today."""
    end: str | None = None
    """What ends a response of text, where its format writes that itself."""


PLAIN = Writing()


@dataclass(frozen=True)
class Paired:
    prompt: Content
    chosen: Content
    rejected: Content
    writing: Writing = PLAIN
    remarks: tuple[str, ...] = field(default=(), compare=False)
    """What a user should know of how the row was read; rows are counted by it."""

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
    """What is wrong with one row, and the kind of mistake, by which dropped rows are counted."""

    def __init__(self, what: str, kind: str):
        super().__init__(what)
        self.kind = kind


MISSING_COLUMN = "without a column"


def unpair(pair: Paired) -> tuple[Unpaired, Unpaired]:
    """A pair as a desirable and an undesirable response."""
    return (
        Unpaired(pair.prompt, pair.chosen, True, pair.writing, pair.remarks),
        Unpaired(pair.prompt, pair.rejected, False, pair.writing, pair.remarks),
    )


def column(row: Row, name: str) -> Any:
    """A column's value; RowError where there is none."""
    if name not in row:
        found = f"the columns are {', '.join(map(str, row))}" if row else "the row is empty"
        raise RowError(f"there is no column {name}; {found}", MISSING_COLUMN)
    if row[name] is None:
        raise RowError(f"{name} is missing (null)", "with a null")
    return row[name]


def text(row: Row, name: str) -> str:
    """A column's text; RowError for anything else."""
    value = column(row, name)
    if not isinstance(value, str):
        hint = "; the formats chat_template.* and auto read messages" if isinstance(value, list | Mapping) else ""
        raise RowError(f"{name} must be text, got {shown(value)}{hint}", "with a value of another type")
    return value


def read_label(value: Any, name: str = "label") -> bool:
    """true/false as a boolean, 0/1, or the words in any case."""
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):
        return value.strip().lower() == "true"
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    raise RowError(f"{name} must be true or false, 0 or 1, got {shown(value)}", "with a label that is no boolean")


def label(row: Row, name: str = "label") -> bool:
    return read_label(column(row, name), name)


def shown(value: Any) -> str:
    """A value for a message: short, on one line."""
    said = repr(value)
    return said if len(said) <= 80 else said[:77] + "..."
