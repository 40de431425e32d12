"""Read a YAML file of fields, the form in which other trainers keep their configs."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from fastpref.errors import UserError
from fastpref.translate.fields import shown


def read_fields(
    path: Path, trainer: str, option: str, example: str, *, nested: Collection[str] = (), nulls: Collection[str] = ()
) -> dict[str, Any]:
    """Return the fields that have a value; those of the tables `nested` have dotted names.

    A field of `nulls` without a value, which differs from its default, is the text "none".
    Raises UserError, one message, for a file that cannot be read or has no fields; `option` and `example` say how
    the file is named and what a field looks like.
    """
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
        raw = _plain(loaded)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: this is a folder; {option} takes a .yml file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that does not exist
        raise UserError(_broken(path, error)) from None
    if not isinstance(raw, dict):
        article = "an" if trainer[0] in "AEIOU" else "a"
        raise UserError(f"{path}: not {article} {trainer} config: it has no fields, such as {example}: ...")
    raw |= {field: "none" for field in nulls if field in loaded and loaded[field] is None}
    return _flat(path, raw, nested)


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


def _flat(path: Path, raw: Mapping[str, Any], nested: Collection[str]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for key, value in raw.items():
        if value == "":  # an empty text is unset
            continue
        if key in nested:
            if not isinstance(value, dict):
                raise UserError(f"{path}: {key}: must be a table of fields, got {shown(value)}")
            fields |= {f"{key}.{inner}": v for inner, v in value.items()}
        else:
            fields[key] = value
    return fields
