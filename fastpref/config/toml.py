"""Write a config back as TOML."""

import json
import re
from typing import Any

from fastpref.config import Config


def to_toml(config: Config) -> str:
    """Return a config as TOML that `load_config` reads back. Keys without a value are left out."""

    def table(header: str, content: dict[str, Any]) -> list[str]:
        own = {k: v for k, v in content.items() if v is not None}
        nested = {k: v for k, v in own.items() if isinstance(v, list | tuple) and v and isinstance(v[0], dict)}
        out = [header, *(f"{k} = {toml_value(v)}" for k, v in own.items() if k not in nested), ""]
        for key, entries in nested.items():
            for entry in entries:
                out += table(f"[[{header.strip('[]')}.{key}]]", entry)
        return out

    lines: list[str] = []
    for name, content in config.model_dump(mode="json").items():
        if content is None:
            continue
        for entry in content if isinstance(content, list) else [content]:
            lines += table(f"[[{name}]]" if isinstance(content, list) else f"[{name}]", entry)
    return "\n".join(lines)


def toml_value(v: Any) -> str:
    """Return a string, number, boolean, list or table as TOML, on one line."""
    if isinstance(v, list | tuple):
        return f"[{', '.join(map(toml_value, v))}]"
    if isinstance(v, dict):
        return f"{{ {', '.join(f'{_toml_key(k)} = {toml_value(inner)}' for k, inner in v.items())} }}"
    # JSON and TOML write strings, numbers and booleans alike, except for the one character that only TOML escapes.
    return json.dumps(v, ensure_ascii=False).replace("\x7f", "\\u007f")


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else toml_value(key)
