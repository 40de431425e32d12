"""Find the files of a [[data]] source: one file, those that a pattern matches, or those of a split in a folder."""

import glob
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastpref.config import DataConfig
from fastpref.config.paths import has_wildcards
from fastpref.data.text_records import PACKED
from fastpref.errors import UserError, one_line

TEXTS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv")
TABLES = (".parquet", ".arrow")
KINDS = (*TEXTS, *TABLES)
"""The suffixes of files that are read. Those of text may also be compressed."""
KNOWN = f"{', '.join(KINDS)}, and text with {', '.join(PACKED)} after it"
_SAVED = ("dataset_info.json", "dataset_dict.json", "state.json")  # of a folder that `save_to_disk` wrote


@dataclass(frozen=True)
class Found:
    """The files of a source, and what a user should know about them, one sentence each."""

    files: tuple[Path, ...]
    notes: tuple[str, ...] = ()


def kind_of(path: Path) -> str:
    """Return the suffix that says how a file is read, without that of its packing."""
    inner = Path(path.stem).suffix.lower()
    return inner if path.suffix.lower() in PACKED and inner in TEXTS else path.suffix.lower()


def path_of(data: DataConfig) -> Path:
    """Return a source's path with the user's home. Raises UserError for the home of a user who does not exist."""
    try:
        return Path(data.path).expanduser()
    except RuntimeError:
        raise UserError(f"{data.path}: there is no such file") from None


def name_of(data: DataConfig) -> str:
    """Return a source's short name for notes: the last part of its path, of a pattern the last two."""
    path = Path(data.path)
    return "/".join(path.parts[-2:]) if has_wildcards(path.name) else path.name or data.path


def is_saved(path: Path) -> bool:
    """Return whether a folder is one that `save_to_disk` of the library `datasets` wrote."""
    return any((path / name).exists() for name in _SAVED)


def find(data: DataConfig) -> Found | None:
    """Return the files of a source; None for a folder of `save_to_disk`, and for a name that can only be the hub's.

    Raises UserError if there is no such file, if nothing matches, or if a key asks for a part that is not there.
    """
    path = path_of(data)
    if not data.path.strip():
        raise UserError('data.path = "": name a file, a folder, a pattern of files or a data set of the hub')
    if path.is_dir():
        _refuse(data, "a folder", "revision", *(("name",) if is_saved(path) else ()))
        return None if is_saved(path) else _in_folder(data, path)
    if path.is_file():
        _refuse(data, "a file", "name", "revision", "split")
        return Found((checked(data, path),))
    if has_wildcards(data.path):
        _refuse(data, "a pattern of files", "name", "revision", "split")
        return _matching(data, path)
    if kind_of(path) in KINDS or data.path.startswith(("/", ".", "~")):
        raise UserError(f"{data.path}: there is no such file")
    return None


def _refuse(data: DataConfig, what: str, *keys: str) -> None:
    """Raise UserError for a key that says which part of a data set is meant, if `what` has no such parts."""
    for key in keys:
        if getattr(data, key) != DataConfig.model_fields[key].default:
            raise UserError(
                f"{data.path}: data.{key} = {getattr(data, key)!r}: this is {what} on this machine, which has no such "
                "part; leave the key out"
            )


def checked(data: DataConfig, path: Path) -> Path:
    """Return a file's path. Raises UserError for a kind that is not read, and for an empty file."""
    name = shown(data, path)
    if kind_of(path) not in KINDS:
        raise UserError(f"{name}: files of kind {path.suffix!r} are not read; known are {KNOWN}")
    if path.stat().st_size == 0:
        raise UserError(f"{name}: the file is empty")
    return path


def shown(data: DataConfig, path: Path) -> str:
    """Return a file's name for messages: as the config has it, or else the whole path."""
    return data.path if path == path_of(data) else str(path)


def _matching(data: DataConfig, path: Path) -> Found:
    matches = glob.glob(str(path), recursive=True)
    files = sorted(Path(name) for name in matches if os.path.isfile(name))
    if not files:
        only = f", only folders, such as {min(matches)}; name the files in them" if matches else ""
        raise UserError(f"{data.path}: no file matches this pattern{only}")
    return Found(tuple(checked(data, file) for file in files), (_listed(data, files),))


def _in_folder(data: DataConfig, path: Path) -> Found:
    """Return the files of a split of a folder. The library `datasets` tells splits apart: by the names of files and
    folders, or by the README of a data set that was downloaded from the hub."""
    if has_wildcards(str(path)):
        raise UserError(
            f"{data.path}: a folder with *, ? or [ in its path is not searched for splits; name its files by a "
            "pattern, or rename the folder"
        )
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    logging.getLogger("huggingface_hub.repocard").setLevel(logging.ERROR)  # a README need not be a card
    try:
        folder = str(path.resolve())  # whose name is not "."
        parts = datasets.get_dataset_config_names(folder)
        part = data.name or ("default" if "default" in parts else parts[0] if len(parts) == 1 else None)
        if part not in parts:
            raise UserError(f"{data.path}: data.name selects one of {', '.join(parts)}, got {data.name!r}")
        split_files: Any = datasets.load_dataset_builder(folder, part).config.data_files
    except UserError:
        raise
    except Exception as error:  # datasets raises whatever its readers of names and of YAML raise
        if not any(readable(path)):
            raise nothing_readable(data) from None
        raise UserError(f"{data.path}: its splits cannot be told apart: {one_line(error, named=True)}") from None
    splits = {str(name): sorted(map(Path, files)) for name, files in (split_files or {}).items()}
    if data.split not in splits:
        raise UserError(
            f"{data.path}: there is no split {data.split!r}; there are {', '.join(splits) or 'none'}. Select one by "
            f'data.split, or name the files, such as "{data.path.rstrip("/")}/*.jsonl"'
        )
    files = tuple(checked(data, file) for file in splits[data.split])
    notes = [_listed(data, files)]
    taken = {file.resolve() for some in splits.values() for file in some}
    if rest := [file for file in readable(path) if file.resolve() not in taken]:
        more = f" and {len(rest) - 1} more" if len(rest) > 1 else ""
        first = f"{rest[0].relative_to(path)}{more}"
        notes.append(
            f"{name_of(data)}: not read, because no split has it: {first}; a pattern, such as "
            f'"{data.path.rstrip("/")}/*{"".join(rest[0].suffixes)}", names files by itself'
        )
    return Found(files, tuple(notes))


def nothing_readable(data: DataConfig) -> UserError:
    """Return the error of a folder without files of known kinds."""
    return UserError(f"{data.path}: there is no file in this folder that is read; known are {KNOWN}")


def readable(folder: Path) -> Iterator[Path]:
    """Yield the files of known kinds in a folder and beneath it, except hidden ones."""
    for file in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if not hidden and kind_of(file) in KINDS and file.is_file():
            yield file


def _listed(data: DataConfig, files: Sequence[Path]) -> str:
    names = [file.name for file in files]
    if len(set(names)) < len(names):
        common = os.path.commonpath(file.parent for file in files)
        names = [file.relative_to(common).as_posix() for file in files]
    listed = f"1 file, {names[0]}" if len(names) == 1 else f"{len(names)} files, {names[0]} to {names[-1]}"
    return f"{name_of(data)}: {listed}"
