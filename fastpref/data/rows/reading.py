"""The steps that every format shares: prepare a row, read it, remove repeated prompts, and remark on unread columns."""

import ast
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fastpref.data.rows.columns import CONTEXT, LABELS, MARGIN, WEIGHT, column, read_number
from fastpref.data.rows.content import Paired, Row, RowContent, RowError, Unpaired, Writing, shown
from fastpref.data.rows.messages import STANDARD, is_turns
from fastpref.data.rows.overlap import untangle
from fastpref.data.rows.parts import refuse_media
from fastpref.data.rows.tool_calls import read_keywords, read_tools

_KEYWORDS = "chat_template_kwargs"
_MESSAGES_AS_TEXT = re.compile(r"\s*\[\s*\{\s*(['\"])(role|content|from|value)\1\s*:|\s*\{\s*(['\"])(role|from)\3\s*:")
JSON_CELLS = "columns of text held messages as JSON, and were read as messages"


@dataclass(frozen=True)
class Format:
    name: str
    """The rows that the format reads, in words."""
    parse: Callable[[Row], RowContent]
    """Reads a row's content. Raises RowError for a row that is not of the format."""
    whole_row: bool = False
    """Whether `parse` does all steps itself, as for a user's function, whose result another format reads."""
    weight: str = WEIGHT
    """The column of the factor of the row's loss; "" reads none."""
    margin: str = MARGIN
    """The column of the difference of rewards that a pair should have at least; "" reads none."""
    label: str = LABELS[0]
    """The column that says whether a single completion is a good one."""
    plain: bool = False
    """Whether text columns are taken as they are, with nothing around them."""
    as_chat: Callable[[Row, RowContent], RowContent] | None = None
    """Makes a chat of the text that `parse` returns."""

    def read(self, row: Row) -> RowContent:
        """Read a row. Raises RowError for a row that is not of the format or would be misread."""
        if self.whole_row:
            return self.parse(row)
        refuse_media(row)
        plain = without_json(row)
        seen = _Seen(plain)
        content = untangle(self.parse(seen))
        content = self._with_numbers(seen, self.as_chat(seen, content) if self.as_chat else content)
        remarks = [JSON_CELLS] if plain is not row else []
        remarks += [
            f"the column {name} is filled, and {self.name} does not read it"
            for name in CONTEXT
            if name not in seen.names and _says_something(plain.get(name))
        ]
        return replace(content, remarks=(*content.remarks, *remarks)) if remarks else content

    def _with_numbers(self, row: Row, content: RowContent) -> RowContent:
        """Add the row's weight and margin to its content. Raises RowError."""
        weight = _optional(row, self.weight, WEIGHT)
        margin = _optional(row, self.margin, MARGIN)
        if weight is not None:
            what = f"a {WEIGHT} is a number above 0, by which the row's loss is multiplied"
            number = read_number(weight, self.weight, what, f"with a {WEIGHT} that is no number above 0", positive=True)
            content = replace(content, weight=number)
        if margin is None:
            return content
        if not isinstance(content, Paired):
            raise RowError(
                f"the column {self.margin} is filled, and a {MARGIN} is one of a pair: here is "
                f"{'a single completion' if isinstance(content, Unpaired) else 'a list of completions'}; remove or "
                f"rename the column",
                f"with a {MARGIN}, which only a pair can have",
            )
        what = f"a {MARGIN} is a finite number, the difference of rewards that the pair should have at least"
        return replace(content, margin=read_number(margin, self.margin, what, f"with a {MARGIN} that is no number"))


def _optional(row: Row, name: str, usual: str) -> Any:
    """Return a column's value; None if it is not read, or is missing under its usual name. Raises RowError."""
    if not name or (name == usual and row.get(name) is None):
        return None
    return column(row, name)


def writing(row: Row, *, chat_template: str | None = None, tools: Any = None, tools_column: str = "tools") -> Writing:
    """Return the writing of a chat: the row's own tools or else those given, and the row's keywords."""
    own = read_tools(row.get(tools_column), tools_column)
    keywords = read_keywords(row.get(_KEYWORDS), _KEYWORDS)
    return Writing(chat_template, own or (read_tools(list(tools), "tools") if tools else None), keywords)


def without_json(row: Row) -> Row:
    """Decode cells that hold messages as JSON. Returns the row itself if there are none.

    Raises RowError for a cell that looks like messages but cannot be read, so that its JSON is not trained on as text.
    """
    changed = {
        name: _messages(value, name)
        for name, value in row.items()
        if isinstance(value, str) and _MESSAGES_AS_TEXT.match(value)
    }
    changed = {name: value for name, value in changed.items() if value is not None}
    return {**row, **changed} if changed else row


def _messages(value: str, name: Any) -> Any:
    """Read messages from JSON or from a printed Python list. Returns None if the text is something else."""
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
    known = STANDARD.known_roles
    roles = [turn.get("role") or turn.get("from") for turn in one] if is_turns(one) else [None]
    return turns if all(isinstance(role, str) and role in known for role in roles) else None


def _says_something(value: Any) -> bool:
    if isinstance(value, str):
        return bool(value.strip())
    return isinstance(value, list | Mapping) and bool(value)


class _Seen(dict[str, Any]):
    """A row that records which of its columns are read by []. Reading by `get` is not recorded."""

    def __init__(self, row: Row):
        super().__init__(row)
        self.names = set[str]()

    def __getitem__(self, name: str) -> Any:
        self.names.add(name)
        return super().__getitem__(name)
