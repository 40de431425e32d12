"""What tokenising makes of a row, and its counts of what became of the rows."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

Ids = list[int]
Spans = tuple[tuple[int, int], ...]
"""Places in a completion, each from a start up to a stop that is not part of it, in rising order and apart."""


@dataclass(frozen=True)
class Origin:
    """Where an example comes from, and what tokenising did to it."""

    place: str
    """`file:line`, or `file, row N` counted from 0."""
    question: str = ""
    """The prompt as a person would ask it, as far as it is shown."""
    prompt_cut: int = 0
    """Tokens that the prompt lost: with its oldest turns, or of a text on its left."""
    turns_cut: int = 0
    """Old messages of the prompt that were left out, each as a whole."""
    completions_cut: tuple[int, ...] = ()
    """Tokens that each completion lost on its right."""
    merged: int = 0
    """Last tokens of the prompt that became part of a token of a completion."""


@dataclass(frozen=True)
class Example:
    """A prompt and its completions: chosen and rejected, or a single one with its label."""

    prompt: Ids  # at least one token
    completions: tuple[Ids, ...]  # at least one token each
    label: bool | None
    row: Origin
    contexts: tuple[Spans, ...] = ()
    """Of each completion the spans that are not scored, other people's turns; () where all tokens of all are scored."""

    def context(self, which: int) -> Spans:
        """The spans of a completion that are not scored."""
        return self.contexts[which] if self.contexts else ()

    def scored(self, which: int) -> int:
        """How many tokens of a completion are scored: at least one."""
        return len(self.completions[which]) - sum(stop - start for start, stop in self.context(which))

    def with_completions(self, parts: "Sequence[tuple[Example, int]]") -> "Example":
        """This prompt followed by other completions, each named by its example and its number there."""
        contexts = tuple(example.context(which) for example, which in parts)
        return replace(
            self,
            completions=tuple(example.completions[which] for example, which in parts),
            contexts=contexts if any(contexts) else (),
        )


@dataclass
class Counts:
    """What tokenising did to the rows."""

    rows: int = 0
    kept: int = 0
    turns_cut: int = 0
    prompts_cut: int = 0
    responses_cut: int = 0
    overlong: int = 0
    empty: int = 0
    equal: int = 0
    unwritten: int = 0
    promptless: int = 0
    refused: int = 0
    merged: int = 0
    departed: int = 0
    foreign: int = 0
    special: int = 0
    left_out: int = 0
    special_first: str = ""
    """The first row with special tokens in its words, and the token."""
    left_out_first: str = ""
    """The first row that the template leaves words out of, with these words."""

    def __str__(self) -> str:
        parts = [f"{self.kept} of {self.rows} rows used"]
        words = {
            "turns_cut": "prompts without their oldest turns",
            "prompts_cut": "prompts cut from the left",
            "responses_cut": "responses cut from the right",
            "overlong": "dropped as too long",
            "empty": "dropped with an empty response",
            "equal": "dropped with equal responses",
            "unwritten": "dropped as the chat template leaves out what their responses say or differ in",
            "promptless": "dropped without a prompt",
            "refused": "dropped as the chat template refuses them",
            "merged": "with a token across the end of the prompt",
            "departed": "whose responses the chat template writes otherwise than after its generation prompt",
            "foreign": "that end with EOS because their format's end of a turn is no token of this tokenizer",
            "special": "with special tokens in the words of their messages",
            "left_out": "with words that the chat template leaves out",
        }
        firsts = {name: f" (the first: {first})" for name, first in self.firsts.items() if first}
        parts += [
            f"{getattr(self, f.name)} {words[f.name]}{firsts.get(f.name, '')}"
            for f in fields(self)
            if f.name in words and getattr(self, f.name)
        ]
        return ", ".join(parts)

    @property
    def firsts(self) -> dict[str, str]:
        """The first row of each count that has one."""
        return {"special": self.special_first, "left_out": self.left_out_first}
