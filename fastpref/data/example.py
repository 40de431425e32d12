"""A tokenised row, and counts of what became of the rows."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

Ids = list[int]
Spans = tuple[tuple[int, int], ...]
"""Half-open ranges [start, stop) of places in a completion, in rising order, neither overlapping nor touching."""


@dataclass(frozen=True)
class Origin:
    """Where an example comes from, and what tokenising changed."""

    place: str
    """`file:line`, or `file, row N` counted from 0."""
    question: str = ""
    """The text of the prompt's last turn, shortened, for display."""
    prompt_cut: int = 0
    """Tokens that the prompt lost: its oldest turns, or the left end of a text."""
    turns_cut: int = 0
    """How many of the prompt's oldest messages were left out."""
    completions_cut: tuple[int, ...] = ()
    """Tokens that each completion lost on its right."""
    merged: int = 0
    """Last tokens of the prompt that became part of a token of a completion."""


@dataclass(frozen=True)
class Example:
    """A prompt and its completions: chosen and rejected, a single one, labelled for KTO, or a list with scores."""

    prompt: Ids  # at least one token
    completions: tuple[Ids, ...]  # at least one token each
    label: bool | None
    row: Origin
    contexts: tuple[Spans, ...] = ()
    """The unscored spans of each completion, turns of other speakers; () if all tokens of all are scored."""
    scores: tuple[float, ...] = ()
    """How good each completion is, higher is better, for losses that rank all of them; () for pairs and labels."""
    weight: float = 1.0
    """The factor of its loss."""
    margin: float | None = None
    """The difference of rewards that its pair should have at least; None for that of the loss."""

    def context(self, which: int) -> Spans:
        """Return the spans of a completion that are not scored."""
        return self.contexts[which] if self.contexts else ()

    def scored(self, which: int) -> int:
        """Return how many tokens of a completion are scored, at least one."""
        return len(self.completions[which]) - sum(stop - start for start, stop in self.context(which))

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the completions, for display."""
        if self.label is not None:
            return ("good" if self.label else "bad",)
        if len(self.completions) == 1 and not self.scores:
            return ("completion",)
        return tuple(f"completion {k}" for k in range(len(self.completions))) if self.scores else ("chosen", "rejected")

    def with_completions(self, parts: "Sequence[tuple[Example, int]]") -> "Example":
        """Return this prompt with other completions, each given as an example and its number there, without scores."""
        contexts = tuple(example.context(which) for example, which in parts)
        return replace(
            self,
            completions=tuple(example.completions[which] for example, which in parts),
            contexts=contexts if any(contexts) else (),
            scores=(),
        )


def _count(words: str, *, dropped: bool = False) -> Any:
    """Make a field that counts rows, with the words that follow its number."""
    return field(default=0, metadata={"words": words, "dropped": dropped})


@dataclass
class Counts:
    """How many rows were read, used and dropped, and how many of those used were changed or are unusual."""

    rows: int = _count("read")
    kept: int = _count("used")
    turns_cut: int = _count("prompts without their oldest turns")
    prompts_cut: int = _count("prompts cut from the left")
    prompts_lost: int = _count("prompts of which less than a quarter is left")
    completions_cut: int = _count("completions cut from the right")
    tied: int = _count("with equal scores", dropped=True)
    close: int = _count("with scores closer than data.min_difference", dropped=True)
    overlong: int = _count("too long", dropped=True)
    unasked: int = _count("without room for their question", dropped=True)
    empty: int = _count("with an empty completion", dropped=True)
    equal: int = _count("with equal completions", dropped=True)
    unwritten: int = _count("with a completion that the chat template leaves out", dropped=True)
    promptless: int = _count("without a prompt", dropped=True)
    refused: int = _count("refused by the chat template", dropped=True)
    merged: int = _count("with a token across the prompt's end")
    departed: int = _count("with a completion that does not follow the chat template's generation prompt")
    foreign: int = _count("that end with EOS because their format's end of a turn is no token of this tokenizer")
    special: int = _count("with special tokens in the words of their messages")
    left_out: int = _count("with words that the chat template leaves out")
    unasked_first: str = ""
    """The first row whose question does not fit."""
    prompts_lost_first: str = ""
    """The first row that has little of its prompt left."""
    special_first: str = ""
    """The first row with special tokens in its words, and the token."""
    left_out_first: str = ""
    """The first row that the template leaves words out of, with these words."""

    def __str__(self) -> str:
        parts = [f"{self.kept} of {self.rows} rows used"]
        for outcome in OUTCOMES[2:]:
            if count := getattr(self, outcome.name):
                first = getattr(self, f"{outcome.name}_first", "")
                parts.append(f"{count} {outcome.title}" + (f" (the first: {first})" if first else ""))
        return ", ".join(parts)


@dataclass(frozen=True)
class Outcome:
    """One of the numbers of `Counts`, for messages, tables and reports."""

    name: str
    words: str
    dropped: bool

    @property
    def title(self) -> str:
        """The words, with "dropped: " before those of rows that were dropped."""
        return f"dropped: {self.words}" if self.dropped else self.words


OUTCOMES = tuple(Outcome(f.name, **f.metadata) for f in fields(Counts) if f.metadata)
"""Every number of `Counts` in the order in which they are shown: rows and rows used first."""
