"""Turn a validation error into lines for people: `cfg.toml:LINE: key: what is wrong (did you mean 'x'?)`."""

import re
import tomllib
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, ValidationError

from fastpref.config.annotations import classes_in
from fastpref.config.losses import LOSSES
from fastpref.config.others import answer

Path = tuple[str | int, ...]


class TomlLines:
    """The line of each key in a valid TOML text, and the keys that overrides set."""

    def __init__(self, file: str, text: str):
        self.file = file
        self._lines: dict[Path, int] = {}
        for path, line in _scan(text.split("\n")):  # TOML knows no other line ends
            for end in range(1, len(path) + 1):  # [a.b] and a.b = 1 make a, too
                self._lines.setdefault(path[:end], line)
        self._overrides: dict[Path, str] = {}

    def override(self, keys: tuple[str, ...], text: str) -> None:
        path: Path = tuple(int(k) if k.isdecimal() else k for k in keys)
        self._lines = {p: line for p, line in self._lines.items() if p[: len(path)] != path}
        self._overrides[path] = text

    def __contains__(self, path: Path) -> bool:
        return path in self._lines or path in self._overrides

    def place(self, path: Path) -> str:
        """Return `file:line` of the key or of the nearest table around it, or the override that set it."""
        for end in range(len(path), 0, -1):
            if path[:end] in self._overrides:
                return f"override {self._overrides[path[:end]]!r}"
            if path[:end] in self._lines:
                return f"{self.file}:{self._lines[path[:end]]}"
            for keys, text in self._overrides.items():
                if keys[:end] == path[:end]:
                    return f"override {text!r}"
        return self.file


def _scan(lines: list[str]) -> Iterator[tuple[Path, int]]:
    """Yield every table header and key with its line. A value over several lines is read until it parses."""
    table: Path = ()
    seen: dict[Path, int] = {}
    at = 0
    while at < len(lines):
        start, text = at, lines[at].strip()
        at += 1
        if not text or text.startswith("#"):
            continue
        parsed = _parse(text)
        while parsed is None and at < len(lines):
            text += "\n" + lines[at]
            at += 1
            parsed = _parse(text)
        if parsed is None:
            return
        if text.startswith("["):
            table = _header(parsed, seen, array=text.startswith("[["))
            yield table, start + 1
        else:
            yield from ((table + keys, start + 1) for keys in _paths(parsed))


def _parse(text: str) -> dict[str, Any] | None:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return None


def _header(parsed: dict[str, Any], seen: dict[Path, int], *, array: bool) -> Path:
    """Return the path of `[a.b]`, or of the next entry of `[[a.b]]`; after `[[a]]` it belongs to the last entry."""
    path: Path = ()
    inner: Any = parsed
    while inner:
        inner = inner[0] if isinstance(inner, list) else inner
        if not inner:
            break
        key, inner = next(iter(inner.items()))
        path += (key,)
        if path in seen and (inner and inner != [{}]):
            path += (seen[path],)
    if array:
        seen[path] = seen.get(path, -1) + 1
        path += (seen[path],)
    return path


def _paths(table: dict[str, Any]) -> Iterator[Path]:
    for key, value in table.items():
        yield (key,)
        if isinstance(value, dict):
            yield from ((key, *rest) for rest in _paths(value))


def explain(error: ValidationError, schema: type[BaseModel], lines: TomlLines) -> list[str]:
    """Return one line for each mistake, in the order of the file."""
    messages: dict[str, list[str]] = {}  # of each key
    for problem in error.errors():
        path = _without_tags(problem["loc"], problem["type"])
        message = _message(problem, path, schema)
        if message is None:
            continue
        for line in message.split("\n"):
            at, what = _named_key(path, line, lines) if problem["type"] == "value_error" else (path, line)
            key = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in at).lstrip(".")
            place = f"{lines.place(at)}: {key}" if key else lines.file
            messages.setdefault(place, []).append(what)
    texts = [f"{place}: {text}" for place, wants in messages.items() for text in _joined(wants)]
    return sorted(texts, key=lambda line: _line_number(line.removeprefix(lines.file)))


def _line_number(message: str) -> int:
    digits = message.split(":")[1] if message.startswith(":") else ""
    return int(digits) if digits.isdecimal() else 0


def _named_key(path: Path, message: str, lines: TomlLines) -> tuple[Path, str]:
    """Split the message of a table's own check, which begins with a key: `eval.every: …`, `data.0.pairs: …`."""
    words = re.match(r"([^\W\d][\w.]*)(: )?", message)
    key: Path = (*path, *(int(k) if k.isdecimal() else k for k in words[1].split("."))) if words else path
    array = next((at for at, part in enumerate(key) if at > len(path) and isinstance(part, int)), len(key))
    if key[:array] not in lines:  # the entries of an array may have no lines of their own
        return path, message
    return key, message[words.end() :] if words and words[2] else message


def _joined(messages: list[str]) -> list[str]:
    """Join what each member of a union wants into one message; the first one also names the value. Messages that name
    no value are no union's, and stay apart."""
    first, *others = dict.fromkeys(messages)
    wanted = [message.rpartition(", got ")[0] for message in others]
    return [", or ".join([*wanted, first])] if all(wanted) else [first, *others]


_UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")


def _without_tags(loc: tuple[str | int, ...], kind: str) -> Path:
    """Drop the chosen member of a union, which pydantic adds to a location."""
    path = [p for i, p in enumerate(loc) if not (i == 1 and loc[0] == "loss" and p in LOSSES)]
    if kind in _UNKNOWN:
        return tuple(path)  # the last part is the user's word; unions have no keys
    if kind == "union_tag_invalid":
        return (*path, "type")
    return tuple(p for p in path if isinstance(p, int) or not ("[" in p or "-" in p or p in ("bool", "int", "str")))


def _message(problem: Any, path: Path, schema: type[BaseModel]) -> str | None:
    kind, given, context = problem["type"], problem["input"], problem.get("ctx", {})
    if kind in _UNKNOWN:
        owners = [name for name, options in LOSSES.items() if path[0] == "loss" and path[-1] in vars(options())]
        if owners:
            return f"this loss has no such key; it belongs to {', '.join(owners)}"
        return "unknown key" + _suggest(str(path[-1]), path[:-1], schema)
    if kind in ("missing", "missing_argument"):
        return "is missing" + (", add a table [[data]] with a path" if path == ("data",) else "")
    if kind == "union_tag_invalid":
        tag = context["tag"]
        return f"must be one of {', '.join(LOSSES)}, got {tag!r}" + _close(tag, list(LOSSES))
    if kind == "literal_error":
        if isinstance(given, list) and str(problem["loc"][-1]).startswith("literal["):
            return None  # a union that takes lists too: the entries say what is wrong
        if path == ("loss", "type"):
            context = {"expected": ", ".join(LOSSES)}
        choices = [c.strip("'") for c in context["expected"].replace(" or ", ", ").split(", ")]
        return f"must be one of {', '.join(choices)}, got {given!r}" + _close(str(given), choices)
    if kind == "value_error":
        return str(context["error"])
    if kind == "too_short":
        return None if given else "needs at least one entry"  # entries that are wrong have their own line
    if kind == "tuple_type":
        if isinstance(given, dict):
            return f"must be an array of tables; write [[{'.'.join(map(str, path))}]]"
        return f"must be an array, got {given!r}"
    if kind in ("model_type", "dataclass_type", "model_attributes_type"):
        return f"must be a table, got {given!r}"
    message = problem["msg"][0].lower() + problem["msg"][1:]
    return f"{message.replace('input should', 'must')}, got {given!r}"


def _suggest(key: str, parents: Path, schema: type[BaseModel]) -> str:
    """Suggest a key of this table that is almost the same, the key that another trainer calls so, the same key of
    another table, a similar key of this table, or at the top a similar table."""
    tables = dict(tables_of(schema))
    here = ".".join(p for p in parents if isinstance(p, str))
    own = list(tables.get(here, ()))
    if near := _close(key, own, cutoff=0.9):
        return near
    if theirs := answer(key):
        return f"; {theirs}"
    for name, keys in tables.items():
        if key in keys:
            return f" (did you mean {f'{name}.{key}' if name else key!r}?)"
    return _close(key, own) or ("" if here else _close(key, [name for name in tables if name]))


def _close(word: str, choices: list[str], cutoff: float = 0.6) -> str:
    near = get_close_matches(word.lower(), choices, n=1, cutoff=cutoff)
    return f" (did you mean {near[0]!r}?)" if near else ""


def tables_of(schema: Any, name: str = "") -> Iterator[tuple[str, list[str]]]:
    """Yield every table of the schema with its keys; all losses share one table."""
    annotations = {f.alias or k: f.annotation for k, f in schema.model_fields.items()}
    yield name, list(annotations)
    for key, annotation in annotations.items():
        inner = list(classes_in(annotation))
        keys = [field.name for c in inner if is_dataclass(c) for field in fields(c)]
        path = f"{name}.{key}" if name else key
        if keys:
            yield path, list(dict.fromkeys(keys))
        for c in inner:
            if issubclass(c, BaseModel):
                yield from tables_of(c, path)
