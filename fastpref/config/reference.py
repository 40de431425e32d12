"""Write docs/config.md from the schema: `python -m fastpref.config.reference > docs/config.md`."""

from collections.abc import Iterator
from typing import Any

from fastpref.config import Config

_HEAD = """\
# Config

This page lists every key of a config; `python -m fastpref.config.reference` writes it from the schema. `fastpref
schema` prints the JSON schema, `fastpref check` finds mistakes, and `KEY=VALUE` on the command line sets a key:
`train.steps=10`.
"""
_NAMED = {
    "integer": "whole number", "number": "number", "string": "text", "boolean": "true, false", "object": "table",
}  # fmt: skip


def reference() -> str:
    """Return the page: a table of keys for every table of the TOML, in the order of the schema."""
    schema = Config.model_json_schema()
    parts = [_HEAD]
    for name, spec in schema["properties"].items():
        many = spec.get("type") == "array"
        required = " Required." if name in schema["required"] else ""
        parts.append(f"## {f'[[{name}]]' if many else f'[{name}]'}\n\n{spec['description']}{required}")
        for target in _tables(spec):
            table = schema["$defs"][target]
            kind = table["properties"].get("type", {}).get("const")
            if kind:
                parts.append(f'### type = "{kind}"')
            parts.append(_table(table, schema["$defs"]))
    return "\n\n".join(part.strip() for part in parts) + "\n"


def explain_keys(wanted: str) -> list[str]:
    """Return a key or the keys of a table, each with its type, default and meaning. [] if there is no such key.

    A table of several kinds, such as [loss], has the keys of all of them.
    """
    schema = Config.model_json_schema()
    lines: dict[str, None] = {}

    def walk(place: str, table: dict[str, Any]) -> None:
        kind_of = table.get("properties", {}).get("type", {}).get("const")
        of = f'with type = "{kind_of}", ' if kind_of else ""
        for key, spec in table.get("properties", {}).items():
            name = f"{place}{key}"
            if name == wanted or name.startswith(f"{wanted}."):
                kind = _type(spec, schema["$defs"]).replace("`", "")
                default = "required" if key in table.get("required", ()) else f"default {_value(spec.get('default'))}"
                default = default.replace("`", "") if default != "default " else "no default"
                meaning = " ".join(spec.get("description", "").split())
                lines[f"{name}  ({of}{kind}; {default})\n    {meaning}"] = None
            for target in _tables(spec):
                walk(f"{name}.", schema["$defs"][target])

    walk("", schema)
    return list(lines)


def _tables(spec: dict[str, Any]) -> Iterator[str]:
    """Yield the definitions that a key refers to: one, or one for each loss."""
    for inner in [spec, spec.get("items", {}), *spec.get("anyOf", []), *spec.get("oneOf", [])]:
        if "$ref" in inner:
            yield inner["$ref"].rpartition("/")[2]


def _table(table: dict[str, Any], definitions: dict[str, Any]) -> str:
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key, spec in table["properties"].items():
        default = "required" if key in table.get("required", ()) else _value(spec.get("default"))
        meaning = " ".join(spec.get("description", "").split()).replace("|", "\\|")
        rows.append(f"| `{key}` | {_type(spec, definitions)} | {default} | {meaning} |")
    return "\n".join(rows)


def _type(spec: dict[str, Any], definitions: dict[str, Any]) -> str:
    if "$ref" in spec:
        return "table"
    if "enum" in spec:
        return ", ".join(_value(value) for value in spec["enum"])
    if "const" in spec:
        return _value(spec["const"])
    choices = [inner for inner in spec.get("anyOf", spec.get("oneOf", ())) if inner.get("type") != "null"]
    if choices:
        return " or ".join(dict.fromkeys(_type(inner, definitions) for inner in choices))
    if spec.get("type") == "array":
        return f"list of {_type(spec.get('items', {}), definitions)}"
    return _NAMED.get(spec.get("type", ""), "any") + _bounds(spec)


def _bounds(spec: dict[str, Any]) -> str:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {spec[name]:g}" for name, sign in signs.items() if name in spec]
    return f" {', '.join(bounds)}" if bounds else ""


def _value(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, list | tuple):
        return f"`[{', '.join(repr(v) for v in value)}]`".replace("'", '"')
    return f'`"{value}"`' if isinstance(value, str) else f"`{value:g}`"


if __name__ == "__main__":
    print(reference(), end="")
