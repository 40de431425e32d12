"""The columns of a row and the keys of a message that formats read, grouped by their content."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

PROMPTS = ("prompt", "input", "question", "instruction")
"""The columns in which the formats `*.default` look for the prompt, in this order."""
QUESTIONS = ("prompt", "question", "instruction", "input", "query")
"""The columns that may hold the prompt of an unknown data set, the likeliest first."""
CONTEXT = ("system", "system_prompt", "instruction", "input", "history", "context", "question", "query", "functions")
"""Columns of text that are part of the prompt in some data sets. A format that ignores one must say so."""
CHOSEN, REJECTED = ("chosen", "chosen_response"), ("rejected", "rejected_response")
LABELS = ("label", "kto_tag")
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
REASONING = ("reasoning_content", "reasoning", "thinking")
"""The keys of a message under which data sets store the reasoning before the answer."""

Columns = tuple[tuple[str, ...], ...]
"""The columns that a format needs: one of each group."""
PAIR: Columns = (("prompt",), ("chosen",), ("rejected",))
SINGLE: Columns = (("prompt",), ("completion",), ("label",))


@dataclass(frozen=True)
class NamedFormat:
    """The readers of a named format for pairs and, if it supports them, single responses, and their columns.

    Each reader is a function of the format's options that returns a function from a row to its content.
    """

    paired: Callable[..., Any]
    columns: Columns = PAIR
    unpaired: Callable[..., Any] | None = None
    unpaired_columns: Columns = ()
