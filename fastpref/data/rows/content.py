"""The content of a row of any format: a prompt with its completions, and how to write them as text."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import date
from typing import Any

Message = dict[str, Any]
Content = str | list[Message]  # text, or chat messages
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Writing:
    """Settings that determine how a prompt and its completions become text."""

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
    """The end token of a completion of text, if its format writes one itself."""


PLAIN = Writing()


@dataclass(frozen=True)
class Paired:
    prompt: Content
    chosen: Content
    rejected: Content
    writing: Writing = PLAIN
    remarks: tuple[str, ...] = field(default=(), compare=False)
    """Notes on how the row was read. For each note the rows are counted."""
    weight: float | None = None
    """The factor of its loss, above 0; None if the row has none."""
    margin: float | None = None
    """The difference of rewards that the pair should have at least; None if the row has none."""

    @property
    def by_name(self) -> dict[str, Content]:
        return {"chosen": self.chosen, "rejected": self.rejected}


@dataclass(frozen=True)
class Unpaired:
    prompt: Content
    completion: Content
    label: bool | None
    """Whether it is a good one; None if the row does not say, as SFT does not need it."""
    writing: Writing = PLAIN
    remarks: tuple[str, ...] = field(default=(), compare=False)
    weight: float | None = None

    @property
    def by_name(self) -> dict[str, Content]:
        return {"completion": self.completion}


@dataclass(frozen=True)
class Ranked:
    """A prompt with two or more completions, and how good each of them is."""

    prompt: Content
    completions: tuple[Content, ...]
    scores: tuple[float, ...]  # of each completion, higher is better
    writing: Writing = PLAIN
    remarks: tuple[str, ...] = field(default=(), compare=False)
    weight: float | None = None

    @property
    def by_name(self) -> dict[str, Content]:
        return {f"completion {at}": completion for at, completion in enumerate(self.completions)}


RowContent = Paired | Unpaired | Ranked


class RowError(ValueError):
    """A mistake in one row. Dropped rows are counted by the kind of their mistake."""

    def __init__(self, what: str, kind: str):
        super().__init__(what)
        self.kind = kind


def unpair(pair: Paired) -> tuple[Unpaired, Unpaired]:
    """Split a pair into a good and a bad completion."""
    return (
        Unpaired(pair.prompt, pair.chosen, True, pair.writing, pair.remarks, pair.weight),
        Unpaired(pair.prompt, pair.rejected, False, pair.writing, pair.remarks, pair.weight),
    )


def imitated(row: RowContent) -> Unpaired | None:
    """Return what supervised training takes of a row: its completion, the chosen one of a pair, or the first of the
    best of a list; None for a completion that is labelled as bad.
    """
    match row:
        case Unpaired(label=False):
            return None
        case Unpaired():
            return replace(row, label=None)
        case Paired():
            completion = row.chosen
        case Ranked():
            completion = row.completions[max(range(len(row.scores)), key=row.scores.__getitem__)]
    return Unpaired(row.prompt, completion, None, row.writing, row.remarks, row.weight)


def shown(value: Any) -> str:
    """Return a value as it is shown in a message: at most 80 characters on one line."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
