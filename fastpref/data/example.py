"""What tokenising makes of a row, and its counts of what became of the rows."""

from dataclasses import dataclass, fields

Ids = list[int]


@dataclass(frozen=True)
class Origin:
    """Where an example comes from, and what tokenising did to it."""

    place: str
    """`file:line`, or `file, row N` counted from 0."""
    question: str = ""
    """The prompt as a person would ask it, as far as it is shown."""
    prompt_cut: int = 0
    """Tokens that the prompt lost on its left."""
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


@dataclass
class Counts:
    """What tokenising did to the rows."""

    rows: int = 0
    kept: int = 0
    prompts_cut: int = 0
    responses_cut: int = 0
    overlong: int = 0
    empty: int = 0
    equal: int = 0
    promptless: int = 0
    refused: int = 0
    merged: int = 0
    foreign: int = 0

    def __str__(self) -> str:
        said = [f"{self.kept} of {self.rows} rows used"]
        words = {
            "prompts_cut": "prompts cut from the left",
            "responses_cut": "responses cut from the right",
            "overlong": "dropped as too long",
            "empty": "dropped with an empty response",
            "equal": "dropped with equal responses",
            "promptless": "dropped without a prompt",
            "refused": "dropped as the chat template refuses them",
            "merged": "with a token across the end of the prompt",
            "foreign": "that end with EOS because their format's end of a turn is no token of this tokenizer",
        }
        said += [
            f"{getattr(self, f.name)} {words[f.name]}"
            for f in fields(self)
            if f.name in words and getattr(self, f.name)
        ]
        return ", ".join(said)
