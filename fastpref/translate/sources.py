"""Paths of data as `datasets.load_dataset` takes them, and the config.json of a model in a folder."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastpref.data.found import KINDS
from fastpref.translate.fields import Left

SUFFIXES = KINDS
BUILDERS = ("json", "csv", "parquet", "arrow")
"""Values of `path` that give the kind of the `data_files`."""


def files_of(path: str, files: Any, place: str, folders: Iterable[Path]) -> tuple[list[str], list[Left]]:
    """Return the paths of an entry's rows, and the files that cannot be taken over."""
    if files is None:
        remote = path.partition("://")[0] if "://" in path else ""
        why = f"{remote}:// is not read; copy the data to this machine, or to the hub"
        return [path], [Left(f"{place}path", why)] if remote else []
    names = [str(name) for name in (files if isinstance(files, list) else [files])]
    if path in BUILDERS:
        return names, []
    if any((root / path).is_dir() for root in (Path(), *folders)):
        return [f"{path.rstrip('/')}/{name}" for name in names], []
    why = "single files of a hub data set cannot be named; all of it is read"
    return [path], [Left(f"{place}data_files", why)]


def model_config(name: str, folders: Iterable[Path]) -> dict[str, Any]:
    """Return the content of the config.json of a model in a folder here, or an empty table."""
    for folder in folders:
        try:
            content = json.loads((folder / name / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return content if isinstance(content, dict) else {}
    return {}


def number_of(name: str, key: str, folders: Iterable[Path]) -> int | None:
    """Return a number of a model's text config, or None."""
    content = model_config(name, folders)
    text = content.get("text_config")
    value = (text if isinstance(text, dict) else content).get(key)
    return value if isinstance(value, int) else None
