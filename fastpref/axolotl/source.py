"""Read an Axolotl config, and define the parts of a translation."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fastpref.errors import UserError

PAIRED = ("dpo", "ipo", "orpo", "simpo")
METHODS = (*PAIRED, "kto")
_GENERATING = ("grpo", "gdpo", "ebft")
_NESTED = ("trl", "peft")


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
class Axolotl:
    """The fields of a config that have a value; the fields of `trl` and `peft` have dotted names."""

    file: Path
    values: Mapping[str, Any]

    @property
    def method(self) -> str:
        return self.values["rl"]

    @property
    def lora(self) -> bool:
        return "adapter" in self.values

    def __contains__(self, field: str) -> bool:
        return field in self.values

    def get(self, field: str, default: Any = None) -> Any:
        return self.values.get(field, default)

    def given(self, *fields: str) -> tuple[str, ...]:
        return tuple(field for field in fields if field in self.values)

    def on(self, field: str) -> bool:
        return self._read(field, _as(bool, "true or false"), False)

    def number(self, field: str, default: Any = None) -> Any:
        return self._read(field, _as_number, default)

    def whole(self, field: str, default: Any = None) -> Any:
        return self._read(field, _as_whole, default)

    def text(self, field: str, default: Any = None) -> Any:
        return self._read(field, _as(str, "text"), default)

    def table(self, field: str) -> dict[str, Any]:
        return self._read(field, _as(dict, "a table of keywords"), {})

    def _read(self, field: str, convert: Callable[[Any], Any], default: Any) -> Any:
        if field not in self.values:
            return default
        try:
            return convert(self.values[field])
        except ValueError as error:
            raise UserError(f"{self.file}: {field}: {error}") from None


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


def read(path: Path) -> Axolotl:
    """Read an Axolotl config of a preference method. Raises UserError with one message for anything else."""
    try:
        raw = _plain(yaml.safe_load(path.read_text(encoding="utf-8-sig")))
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: this is a folder; --from-axolotl takes a .yml file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that does not exist
        raise UserError(_broken(path, error)) from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: not an Axolotl config: it has no fields, such as base_model: ...")
    config = Axolotl(path, _flat(path, raw))
    _check_method(config)
    return config


def _broken(path: Path, error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    line = f":{mark.line + 1}" if mark else ""
    what = getattr(error, "problem", None) or str(error).partition("\n")[0]
    return f"{path}{line}: not valid YAML: {what}"


def _plain(value: Any) -> Any:
    """Reduce a value to what TOML can write: keys and dates become text, fields without a value are removed."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


def _flat(path: Path, raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields by name; those of nested tables have dotted names."""
    fields: dict[str, Any] = {}
    for key, value in raw.items():
        if value == "":  # an empty text is unset, as for Axolotl
            continue
        if key in _NESTED:
            if not isinstance(value, dict):
                raise UserError(f"{path}: {key}: must be a table of fields, got {shown(value)}")
            fields |= {f"{key}.{inner}": v for inner, v in value.items()}
        else:
            fields[key] = value
    return fields


def _check_method(config: Axolotl) -> None:
    method = config.get("rl")
    known = f"fastpref trains rl: {', '.join(METHODS)}"
    if not method:
        raise UserError(f"{config.file}: there is no rl: in it, so it trains on no preferences; {known}")
    if method not in METHODS:
        why = (
            f"{method.upper()} generates while it trains" if method in _GENERATING else "this method is not known here"
        )
        raise UserError(f"{config.file}: rl: {method}: {why}; {known}")
    for field, need in (("base_model", "a model's name or folder"), ("datasets", "a list of tables with a path")):
        if field not in config:
            raise UserError(f"{config.file}: there is no {field}: in it; add {need}")
    adapter = config.get("adapter")
    if adapter not in (None, "lora", "qlora"):
        raise UserError(
            f"{config.file}: adapter: {adapter}: fastpref trains lora, qlora, or the whole model (no adapter)"
        )
