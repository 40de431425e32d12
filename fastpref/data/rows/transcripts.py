"""Read conversations written as one text, "\\n\\nHuman: ...\\n\\nAssistant: ...", as in Anthropic's hh-rlhf."""

import re
from typing import Any

from fastpref.data.rows.content import Message

_SPEAKER = re.compile(r"(?:\A|\n\n)\s*(Human|Assistant):[ \t]?")
TEMPLATE = (
    "{% for m in messages %}"
    "{{ ('\n\nHuman: ' if m['role'] == 'user' else '\n\nAssistant: ' if m['role'] == 'assistant' else '') "
    "+ m['content'] }}{% endfor %}{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"
)
"""The chat template for such conversations if the tokenizer has none."""


def is_transcript(value: Any) -> bool:
    """Return whether a text begins with a turn of the human that a turn of the assistant follows."""
    return isinstance(value, str) and value.lstrip().startswith("Human:") and "\n\nAssistant:" in value


def read_transcript(text: str, *, answered: bool = False) -> list[Message]:
    """Read the turns of a transcript. An empty last turn of the assistant is a placeholder for an answer and is
    left out, unless the transcript is `answered`: then the answer is empty.
    """
    marks = list(_SPEAKER.finditer(text))
    stops = [mark.start() for mark in marks[1:]] + [len(text)]
    roles = {"Human": "user", "Assistant": "assistant"}
    turns: list[Message] = [
        {"role": roles[mark.group(1)], "content": text[mark.end() : stop].strip()} for mark, stop in zip(marks, stops)
    ]
    open_place = not answered and turns[-1:] == [{"role": "assistant", "content": ""}]
    return turns[:-1] if open_place else turns
