"""What every format has in common: a row is prepared, read, freed of what its responses repeat, and looked at for what
was not read."""

import ast
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fastpref.data.rows.columns import CONTEXT
from fastpref.data.rows.content import Paired, Row, RowError, Unpaired, Writing, shown
from fastpref.data.rows.messages import Reader, is_turns
from fastpref.data.rows.overlap import untangle
from fastpref.data.rows.parts import refuse_media
from fastpref.data.rows.tool_calls import read_keywords, read_tools

_KEYWORDS = "chat_template_kwargs"
_MESSAGES_AS_TEXT = re.compile(r"\s*\[\s*\{\s*(['\"])(role|content|from|value)\1\s*:|\s*\{\s*(['\"])(role|from)\3\s*:")
JSON_CELLS = "columns of text held messages as JSON, and were read as messages"


@dataclass(frozen=True)
class Format:
    name: str
    """What is read, in words."""
    parse: Callable[[Row], Paired | Unpaired]
    """From a row's columns to its content, as the row has it. Raises RowError for a row that is not of the format."""
    whole_row: bool = False
    """Whether the format answers for all of this itself: a user's function, whose result is read by another format."""

    def read(self, row: Row) -> Paired | Unpaired:
        """What a row becomes. Raises RowError for a row that is not of the format, or that is misread by it."""
        if self.whole_row:
            return self.parse(row)
        refuse_media(row)
        plain = without_json(row)
        seen = _Seen(plain)
        content = untangle(self.parse(seen))
        remarks = [JSON_CELLS] if plain is not row else []
        remarks += [
            f"the column {name} is filled, and {self.name} does not read it"
            for name in CONTEXT
            if name not in seen.names and _says_something(plain.get(name))
        ]
        return replace(content, remarks=(*content.remarks, *remarks)) if remarks else content


def writing(row: Row, *, chat_template: str | None = None, tools: Any = None, tools_column: str = "tools") -> Writing:
    """How a chat's row is written: with its own tools, else those given for all rows, and its own keywords."""
    own = read_tools(row.get(tools_column), tools_column)
    keywords = read_keywords(row.get(_KEYWORDS), _KEYWORDS)
    return Writing(chat_template, own or (read_tools(list(tools), "tools") if tools else None), keywords)


def without_json(row: Row) -> Row:
    """The row itself, or a copy whose cells of JSON that holds messages are these messages.

    Raises RowError for a cell that looks like messages and cannot be read as such, so that no text of it is trained.
    """
    changed = {
        name: _messages(value, name)
        for name, value in row.items()
        if isinstance(value, str) and _MESSAGES_AS_TEXT.match(value)
    }
    changed = {name: value for name, value in changed.items() if value is not None}
    return {**row, **changed} if changed else row


def _messages(value: str, name: Any) -> Any:
    """Messages of JSON text, or of the text that Python makes of a list; None if the text is something else."""
    turns: Any = None
    for read in (json.loads, ast.literal_eval):
        try:
            turns = read(value.strip())
            break
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    if turns is None:
        if value.rstrip()[-1:] not in ("]", "}"):
            return None
        raise RowError(
            f"{name} looks like a list of messages, and is neither valid JSON nor a list of Python's: {shown(value)}",
            "with messages that are no JSON",
        )
    one = [turns] if isinstance(turns, Mapping) else turns
    known = Reader().known_roles
    roles = [turn.get("role") or turn.get("from") for turn in one] if is_turns(one) else [None]
    return turns if all(isinstance(role, str) and role in known for role in roles) else None


def _says_something(value: Any) -> bool:
    if isinstance(value, str):
        return bool(value.strip())
    return isinstance(value, list | Mapping) and bool(value)


class _Seen(Mapping[str, Any]):
    """A row that knows which of its columns were read: asked for by [], as `get` only looks."""

    def __init__(self, row: Row):
        self._row, self.names = row, set[str]()

    def __getitem__(self, name: str) -> Any:
        value = self._row[name]
        self.names.add(name)
        return value

    def get(self, name: str, default: Any = None) -> Any:
        return self._row.get(name, default)

    def __contains__(self, name: object) -> bool:
        return name in self._row

    def __iter__(self) -> Iterator[str]:
        return iter(self._row)

    def __len__(self) -> int:
        return len(self._row)
