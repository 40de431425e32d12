"""The fields of another trainer's config, and the parts of a translation: settings, and fields that are left out."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastpref.errors import UserError


@dataclass(frozen=True)
class Setting:
    """A key of a fastpref config, its value, the fields it comes from, and words for its comment."""

    key: tuple[str | int, ...]
    value: Any
    fields: tuple[str, ...]
    words: str = ""


@dataclass(frozen=True)
class Left:
    """A field that is not taken over, or only in part, and the reason."""

    field: str
    reason: str


Made = Iterator[Setting | Left]


def dotted(name: str) -> tuple[str, ...]:
    """Return the key of a dotted name."""
    return tuple(name.split("."))


@dataclass(frozen=True)
class Fields:
    """The fields of a config that have a value; those of nested tables may have dotted names.

    `method` is the loss that is trained, as `loss.type` spells it, and `called` what the file or the command says of
    it, for messages. `lora` tells whether adapters are trained. `trainer` is whose config it is.
    """

    file: Path
    values: Mapping[str, Any]
    trainer: str
    method: str
    called: str
    lora: bool

    def __contains__(self, field: str) -> bool:
        return field in self.values

    def get(self, field: str, default: Any = None) -> Any:
        return self.values.get(field, default)

    def given(self, *fields: str) -> tuple[str, ...]:
        return tuple(field for field in fields if field in self.values)

    def on(self, field: str, default: bool = False) -> bool:
        return self._read(field, _as(bool, "true or false"), default)

    def number(self, field: str, default: Any = None) -> Any:
        return self._read(field, _as_number, default)

    def whole(self, field: str, default: Any = None) -> Any:
        return self._read(field, _as_whole, default)

    def text(self, field: str, default: Any = None) -> Any:
        return self._read(field, _as(str, "text"), default)

    def table(self, field: str) -> dict[str, Any]:
        return self._read(field, _as_table, {})

    def names(self, field: str) -> list[str]:
        """Return the names of a list, or of a text in which commas separate them."""
        return self._read(field, _as_names, [])

    def refused(self, field: str, why: str) -> UserError:
        """Return the error for a field with which no run like it can be made."""
        return UserError(f"{self.file}: {field}: {why}")

    def _read(self, field: str, convert: Callable[[Any], Any], default: Any) -> Any:
        if field not in self.values:
            return default
        try:
            return convert(self.values[field])
        except ValueError as error:
            raise self.refused(field, str(error)) from None


def _as_number(value: Any) -> float | int:
    # YAML reads 1e-4, without a decimal point, as text
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise ValueError(f"must be a number, got {shown(value)}") from None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"must be a number, got {shown(value)}")
    return value


def _as_whole(value: Any) -> int:
    number = _as_number(value)
    if number != number or number in (float("inf"), float("-inf")) or int(number) != number:
        raise ValueError(f"must be a whole number, got {shown(value)}")
    return int(number)


def _as_table(value: Any) -> dict[str, Any]:
    if isinstance(value, str):  # the command line's way to write a table
        try:
            value = json.loads(value)
        except ValueError:
            raise ValueError(f"must be a table of keywords, got {shown(value)}") from None
    return _as(dict, "a table of keywords")(value)


def _as_names(value: Any) -> list[str]:
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        raise ValueError(f"must be names, got {shown(value)}")
    return [part.strip() for part in parts if part.strip()]


def _as(kind: type, words: str) -> Callable[[Any], Any]:
    """Return a function that returns values of this kind, and refuses others in these words."""

    def checked(value: Any) -> Any:
        if not isinstance(value, kind):
            raise ValueError(f"must be {words}, got {shown(value)}")
        return value

    return checked


def shown(value: Any) -> str:
    """Return a value as text on one line of at most 60 characters."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def word(value: Any) -> str:
    """Return a name as it is, and any other value as `shown`."""
    return value if isinstance(value, str) and value.isprintable() and len(value) <= 60 else shown(value)
