"""Read a config: the TOML file, its overrides, and the folder that its paths are relative to."""

import glob
import os
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fastpref.config.mistakes import TomlLines, explain
from fastpref.config.paths import map_paths, matches
from fastpref.config.schema import Config
from fastpref.errors import UserError


def load_config(
    path: str | Path, overrides: Iterable[str] = (), *, trains: bool = True, given: Mapping[str, Any] | None = None
) -> Config:
    """Read a TOML file, apply `key=value` overrides, and validate the result.

    A config that is not for training (`trains`) may name weights that cannot be trained. `given` has values that a
    program sets before the overrides, by their dotted keys: `{"data": [{"path": "pairs.jsonl"}]}`.
    A relative path that exists in the folder of the file means that one; otherwise it is relative to the working
    directory. Raises UserError with one line for each mistake: `cfg.toml:LINE: key: what is wrong`.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: this is a folder; a config is a .toml file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        if path.suffix in (".yml", ".yaml"):
            raise UserError(
                f"{path}: this is YAML, and a config is TOML; another trainer's is translated by `fastpref init` with "
                f"--from-axolotl, --from-trl or --from-llamafactory {path}"
            ) from None
        what, _, place = str(error).partition(" (at ")  # "(at line 3, column 5)", or "(at end of document)"
        line = place[5:].partition(",")[0] if place.startswith("line ") else text.rstrip().count("\n") + 1
        raise UserError(f"{path}:{line}: not valid TOML: {what}") from None
    lines = TomlLines(str(path), text)
    return _checked(raw, overrides, lines, path.resolve().parent, trains=trains, given=given)


def make_config(
    raw: dict[str, Any],
    overrides: Iterable[str] = (),
    *,
    trains: bool = True,
    given: Mapping[str, Any] | None = None,
    source: str = "the command line",
) -> Config:
    """Make a config of its tables, as `load_config` does of a file's; paths are relative to the working directory.

    `source` names the tables in messages. Raises UserError.
    """
    return _checked(raw, overrides, TomlLines(source, ""), Path.cwd(), trains=trains, given=given)


def _checked(
    raw: dict[str, Any],
    overrides: Iterable[str],
    lines: TomlLines,
    folder: Path,
    *,
    trains: bool,
    given: Mapping[str, Any] | None,
) -> Config:
    for key, value in (given or {}).items():
        _set(raw, key.split("."), value, lines, key)
    for override in overrides:
        _apply(raw, override, lines)
    try:
        config = Config.model_validate(raw, context={"trains": trains})
    except ValidationError as error:
        raise UserError("\n".join(explain(error, Config, lines))) from None
    return _from_folder(config, folder)


def _apply(raw: dict[str, Any], override: str, lines: TomlLines) -> None:
    """Set one `a.b=value` in the raw tables. The value is TOML; a bare word is a string."""
    key, equals, value = override.partition("=")
    keys = key.strip().split(".")
    if not equals or not all(keys):
        raise UserError(f"override {override!r}: not of the form key=value, such as 'train.steps=100'")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError as error:
        word = value.strip()
        if not word or not all(c.isalnum() or c in "-_./:~*?" for c in word):
            raise UserError(f"override {override!r}: the value is not valid TOML: {error}") from None
        parsed = word
    _set(raw, keys, parsed, lines, override)


def _set(raw: dict[str, Any], keys: list[str], value: Any, lines: TomlLines, override: str) -> None:
    """Set the value of a key, given by its parts, in the raw tables, and remember which override did so."""
    table: Any = raw
    for depth, part in enumerate(keys[:-1]):
        if isinstance(table, list):
            if not part.isdecimal() or int(part) >= len(table):
                raise UserError(
                    f"override {override!r}: there is no entry {part}; the config has {len(table)}, counted from 0"
                )
            table = table[int(part)]
        else:
            table = table.setdefault(part, [] if keys[depth + 1].isdecimal() else {})
        if not isinstance(table, dict | list):
            raise UserError(f"override {override!r}: {'.'.join(keys[: depth + 1])} is a value, not a table")
    if isinstance(table, list):
        array = ".".join(keys[:-1])
        raise UserError(
            f"override {override!r}: {array} is an array; set a key of an entry, {array}.0.KEY, or all of it"
        )
    table[keys[-1]] = value
    lines.override(tuple(keys), override)


def _from_folder(config: Config, folder: Path) -> Config:
    """Make paths absolute that exist in the folder of the config; other names stay as they are."""

    def find(name: str) -> str:
        try:
            path = Path(name).expanduser()
            if (folder / path).exists():
                return str((folder / path).resolve())
            return os.path.join(glob.escape(str(folder.resolve())), path) if matches(name, folder) else name
        except (OSError, RuntimeError):  # an inline chat template is no path; ~name names nobody's home
            return name

    return map_paths(config, find)
