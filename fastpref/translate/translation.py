"""Translate a config of another trainer: apply its rules, and keep what the schema accepts."""

import re
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastpref.commands.init import kept
from fastpref.config import Config
from fastpref.config.paths import path_marks
from fastpref.config.text import Line, Table, mistake, render, sections
from fastpref.config.toml import toml_value
from fastpref.translate.fields import Fields, Left, Setting
from fastpref.translate.rule import Dialect

_MARKS = dict(path_marks(Config))
_OFF = (False, 0, "", [], {})


@dataclass(frozen=True)
class Translation:
    """The settings that the schema accepts, and with the reasons those it refuses and the fields left out."""

    source: Path
    settings: tuple[Setting, ...]
    refused: tuple[tuple[Setting, str], ...]
    left: tuple[Left, ...]

    @property
    def left_out(self) -> list[str]:
        """Return a line for each field that is not taken over: its name and the reason."""
        refused = [
            f"{_whence(setting)}: would be {name_of(setting.key)} = {toml_value(setting.value)}: {reason}"
            for setting, reason in self.refused
        ]
        return [*refused, *(f"{left.field}: {left.reason}" for left in self.left)]

    @property
    def text(self) -> str:
        """Return the text of the config, which lists the omitted fields in comments."""
        intro = [
            f"Translated from {self.source.name} by fastpref init. The comment of a key names the field it comes from."
        ]
        ending = ["Not taken over:", *(f" {line}" for line in self.left_out)] if self.left_out else []
        return render(intro, _tables(self), ending)


def translate(dialect: Dialect, path: Path, folder: Path, loss: str | None = None) -> Translation:
    """Translate a file into a config for `folder`. Raises UserError unless it trains what fastpref trains.

    `loss` is what the command line says that the file trains, for trainers whose configs do not say so.
    """
    config = dialect.read(path, loss)
    words = [_placed(word, path.parent, folder) for word in _translated(dialect, config)]
    settings, refused = _accepted([word for word in words if isinstance(word, Setting)])
    return Translation(path, settings, refused, tuple(dict.fromkeys(word for word in words if isinstance(word, Left))))


def name_of(key: Sequence[str | int]) -> str:
    """Return a key as people write it: data[0].path."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key).lstrip(".")


def _whence(setting: Setting) -> str:
    return ", ".join(setting.fields) or setting.words


def _translated(dialect: Dialect, config: Fields) -> Iterator[Setting | Left]:
    ruled = {field for rule in dialect.rules for field in rule.fields}
    read = {field for rule in dialect.rules if config.method in rule.methods for field in rule.fields}
    for rule in dialect.rules:
        if config.method in rule.methods:
            yield from rule.make(config)
        else:
            for field in config.given(*rule.fields):
                if config.get(field) not in _OFF and field not in read:
                    yield Left(field, f"means nothing to {config.called}")
    for field, value in config.values.items():
        if field in ruled:
            continue
        reason = dialect.reason_for(field)
        if reason is None:
            yield Left(field, "unknown field")
        elif value not in _OFF or field in dialect.even_if_off:
            yield Left(field, reason)


def _placed(word: Setting | Left, home: Path, folder: Path) -> Setting | Left:
    """Rewrite the paths of a setting, which the trainer resolves, so that a config in `folder` finds the same files."""
    if isinstance(word, Left):
        return word
    mark = _MARKS.get(".".join("*" if isinstance(part, int) else part for part in word.key))
    if mark is None or mark.written:
        return word
    return replace(word, value=mark.map(word.value, lambda path: kept(path, folder, (home,))))


def _accepted(settings: list[Setting]) -> tuple[tuple[Setting, ...], tuple[tuple[Setting, str], ...]]:
    """Return the settings that the schema accepts, tried one after the other, and the refused ones with the reason."""
    raw: dict[str, Any] = {}
    for setting in settings:
        _put(raw, setting)
    if mistake(raw) is None:
        return tuple(settings), ()
    raw = {}
    for setting in settings:
        if setting.key == ("model", "name") or (setting.key[0] == "data" and setting.key[-1] == "path"):
            _put(raw, setting)
    waiting, refused = settings, {}
    while True:  # a setting may need another one that comes after it
        refused = {}
        for setting in waiting:
            tried = deepcopy(raw)
            _put(tried, setting)
            reason = mistake(tried)
            if reason is None:
                raw = tried
            else:
                refused[setting.key] = _short(reason, setting)
        if len(refused) == len(waiting):
            break
        waiting = [setting for setting in waiting if setting.key in refused]
    accepted = tuple(setting for setting in settings if setting.key not in refused)
    return accepted, tuple((setting, refused[setting.key]) for setting in waiting)


def _put(raw: dict[str, Any], setting: Setting) -> None:
    table: Any = raw
    for part, following in zip(setting.key, setting.key[1:]):
        if isinstance(part, int):
            table += [{} for _ in range(part + 1 - len(table))]
            table = table[part]
        else:
            table = table.setdefault(part, [] if isinstance(following, int) else {})
    last = setting.key[-1]
    table[last] = table.get(last, {}) if setting.value == {} else setting.value


def _short(reason: str, setting: Setting) -> str:
    """Remove the name of the key and the list of all formats from a message of the schema."""
    named = reason.removeprefix(name_of(setting.key)).removeprefix(f"{setting.key[0]}: ").lstrip(": ")
    return re.sub(r"; leave the key out$", "", re.sub(r"known are .*", "docs/data.md has all, and your own", named))


# --- As text ---------------------------------------------------------------------------------------------------------


def _tables(translation: Translation) -> list[Table]:
    headers: dict[tuple[str | int, ...], list[Line]] = {}
    lines = [(setting, "") for setting in translation.settings] + list(translation.refused)
    for setting, reason in lines:
        if setting.key == ("lora",):
            headers.setdefault(("lora",), [])
            continue
        fields = [field.rpartition("].")[2] for field in setting.fields]
        whence = ", ".join(fields) if fields != [setting.key[-1]] else ""
        beside = reason or setting.words or whence
        line = Line(str(setting.key[-1]), setting.value, beside=beside, active=not reason)
        headers.setdefault(setting.key[:-1], []).append(line)
    order = {name: at for at, name in enumerate(sections())}
    ranked = sorted(headers, key=lambda path: (order[str(path[0])], [str(part) for part in path if part != path[-1]]))
    return [Table(_header(path), tuple(headers[path])) for path in ranked]


def _header(path: tuple[str | int, ...]) -> str:
    name = ".".join(part for part in path if isinstance(part, str))
    return f"[[{name}]]" if isinstance(path[-1], int) else f"[{name}]"
