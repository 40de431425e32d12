"""Write a config as TOML for people: keys with comments, some of them commented out."""

import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from fastpref.config import Config
from fastpref.config.annotations import classes_in
from fastpref.config.losses import LOSSES
from fastpref.config.mistakes import TomlLines, explain
from fastpref.config.toml import toml_value

WIDTH = 118


@dataclass(frozen=True)
class Line:
    """`key = value`, or `#key = value` if it is not active, with comments above it and on its line."""

    key: str
    value: Any
    above: tuple[str, ...] = ()
    beside: str = ""
    active: bool = True


@dataclass(frozen=True)
class Table:
    """The header of a table, such as `[[data]]`, and its lines."""

    header: str
    lines: tuple[Line, ...]
    above: tuple[str, ...] = ()


def render(intro: Iterable[str], tables: Iterable[Table], ending: Iterable[str] = ()) -> str:
    """Return the text of a config: comments, the tables, and comments at the end."""
    parts = ["\n".join(_comments(intro)), *("\n".join(_table(table)) for table in tables), "\n".join(_comments(ending))]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(table: Table) -> list[str]:
    return [*_comments(table.above), table.header, *(text for line in table.lines for text in _line(line))]


def _line(line: Line) -> list[str]:
    text = f"{'' if line.active else '#'}{line.key} = {toml_value(line.value)}"
    beside = _one_line(line.beside)
    if beside and len(text) + len(beside) + 4 <= WIDTH:
        return [*_comments(line.above), f"{text}  # {beside}"]
    return [*_comments((*line.above, *([beside] if beside else []))), text]


def _comments(texts: Iterable[str]) -> list[str]:
    """Wrap texts as comments; an empty text is an empty comment, and one that begins with a space is not wrapped."""
    lines: list[str] = []
    for text in texts:
        plain = text.startswith(" ")
        wrapped = [_one_line(text)] if plain else textwrap.wrap(_one_line(text), WIDTH - 2, break_long_words=False)
        lines += [f"#{'   ' if plain else ' '}{part}".rstrip() for part in wrapped or [""]]
    return lines


def _one_line(text: str) -> str:
    """Remove what a comment of TOML may not contain: line ends and control characters."""
    return "".join(c if c.isprintable() else " " for c in " ".join(text.split()))


# --- The schema, as the text needs it --------------------------------------------------------------------------------


def sections() -> dict[str, FieldInfo]:
    """Return the tables of a config, in the order of the schema."""
    return dict(Config.model_fields)


def keys_of(section: str, loss: str) -> Mapping[str, FieldInfo]:
    """Return the keys of a table with their defaults and meanings; those of [loss] are the keys of one loss."""
    if section == "loss":
        options: Any = LOSSES[loss]
        return options.__pydantic_fields__
    tables = classes_in(Config.model_fields[section].annotation)
    fields = next(table for table in tables if issubclass(table, BaseModel)).model_fields
    return {field.alias or name: field for name, field in fields.items()}


def is_array(section: str) -> bool:
    """Return whether a table is an array of tables: `[[data]]`."""
    return "tuple" in str(Config.model_fields[section].annotation)


def mistake(raw: Mapping[str, Any]) -> str | None:
    """Return why the schema refuses the tables of a config, or None."""
    try:
        Config.model_validate(raw)
    except ValidationError as error:
        return "; ".join(line.strip(": ") for line in explain(error, Config, TomlLines("", "")))
    return None
