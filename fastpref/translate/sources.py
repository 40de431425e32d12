"""Paths of data as `datasets.load_dataset` takes them."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastpref.translate.fields import Left

SUFFIXES = (".json", ".jsonl", ".parquet", ".csv", ".arrow")
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
