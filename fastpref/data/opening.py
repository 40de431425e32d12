"""Open a [[data]] source: a file, a folder written by `save_to_disk`, or a data set on the hub."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastpref.config import DataConfig
from fastpref.data.records import ArrowRecords, Csv, JsonLines, Records, read_json
from fastpref.data.rows.columns import LABELS, MARGIN, WEIGHT
from fastpref.errors import UserError, one_line

if TYPE_CHECKING:
    import datasets

_SUFFIXES = (".json", ".jsonl", ".parquet", ".csv", ".arrow")


def open_records(data: DataConfig) -> Records:
    """Open the rows of a source. Raises UserError, naming the file, if there are none or they cannot be read."""
    records = _open(data)
    if not len(records):
        raise UserError(f"{data.path}: there are no rows")
    return records


def content_hash(data: DataConfig) -> str:
    """Return a hash of a source's contents: the bytes of its files, or the fingerprint that `datasets` gives hub data.

    Raises UserError as `open_records` does, OSError if the file cannot be read.
    """
    path = Path(os.path.expanduser(data.path))
    if path.is_file():
        return _digest([path])
    records = _open(data)
    if path.is_dir():
        return _digest(sorted(file for file in path.rglob("*") if file.is_file()), beneath=path)
    assert isinstance(records, ArrowRecords)
    return records.fingerprint


def _digest(files: Iterable[Path], beneath: Path | None = None) -> str:
    total = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            total.update(str(beneath and path.relative_to(beneath)).encode())
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def _open(data: DataConfig) -> Records:
    try:
        path = Path(data.path).expanduser()
    except RuntimeError:  # ~name of a user who does not exist
        raise UserError(f"{data.path}: there is no such file") from None
    _check_keys_of_the_hub(data, path)
    if path.is_dir():
        return ArrowRecords(data.path, _from_disk(data, path))
    if not path.is_file():
        if path.suffix in _SUFFIXES or data.path.startswith(("/", ".", "~")):
            raise UserError(f"{data.path}: there is no such file")
        return ArrowRecords(data.path, _from_hub(data))
    if path.suffix not in _SUFFIXES:
        raise UserError(f"{data.path}: files of kind {path.suffix!r} are not read; known are {', '.join(_SUFFIXES)}")
    if path.stat().st_size == 0:
        raise UserError(f"{data.path}: the file is empty")
    try:
        if path.suffix == ".jsonl":
            return JsonLines(data.path, path)
        if path.suffix == ".json":
            return read_json(data.path, path)
        if path.suffix == ".csv":
            options = data.format if isinstance(data.format, dict) else {}
            numbers = [options.get(f"field_{name}", name) for name in (LABELS[0], WEIGHT, MARGIN)]
            return Csv(data.path, path, numbers=[*numbers, *LABELS[1:]])
    except OSError as error:
        raise UserError(f"{data.path}: cannot be read: {error.strerror}") from None
    return ArrowRecords(data.path, _from_table(data, path))


def _check_keys_of_the_hub(data: DataConfig, path: Path) -> None:
    """Raise UserError for a key that says which part of a data set is meant, if `path` has no such parts."""
    if not path.exists():
        return
    what = "a folder" if path.is_dir() else "a file"
    keys = ("name", "revision") if path.is_dir() else ("name", "revision", "split")
    for key in keys:
        if getattr(data, key) != DataConfig.model_fields[key].default:
            raise UserError(
                f"{data.path}: data.{key} = {getattr(data, key)!r}: this is {what} on this machine, which has no such "
                "part; leave the key out"
            )


def _datasets() -> Any:
    """Import the library, which takes most of a second, for what only it can read."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # our own message reports what it cannot read
    return datasets


def _from_table(data: DataConfig, path: Path) -> "datasets.Dataset":
    kind = path.suffix.removeprefix(".")
    datasets = _datasets()
    try:
        loaded = datasets.load_dataset(kind, data_files=str(path), split="train")
    except Exception as error:  # datasets raises whatever its reader raises
        if "corresponds to no data" in str(error):
            raise UserError(f"{data.path}: there are no rows") from None
        raise UserError(f"{data.path}: cannot be read as {kind}: {_cause(error)}") from None
    assert isinstance(loaded, datasets.Dataset)
    return loaded


def _from_disk(data: DataConfig, path: Path) -> "datasets.Dataset":
    datasets = _datasets()
    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:
        if not (path / "dataset_info.json").exists() and not (path / "dataset_dict.json").exists():
            raise UserError(
                f"{data.path}: this is a folder, and none that save_to_disk wrote; name a file in it, of kind "
                f"{', '.join(_SUFFIXES)}"
            ) from None
        raise UserError(f"{data.path}: cannot be read: {_cause(error)}") from None
    if isinstance(loaded, datasets.Dataset):
        if data.split != DataConfig.model_fields["split"].default:
            raise UserError(
                f"{data.path}: data.split = {data.split!r}: this folder holds one data set without splits; leave the "
                "key out"
            )
        return loaded
    splits: Any = dict(loaded)
    if data.split not in splits:
        raise UserError(f"{data.path}: there is no split {data.split!r}; there are {', '.join(splits)}")
    return splits[data.split]


def _from_hub(data: DataConfig) -> "datasets.Dataset":
    datasets = _datasets()
    try:
        loaded = datasets.load_dataset(data.path, data.name, split=data.split, revision=data.revision)
    except Exception as error:  # the hub, the network, the split, the configuration: each has its own kind
        raise UserError(
            f"{data.path}: neither a file here nor a data set that the hub gives us: {_cause(error)}"
        ) from None
    assert isinstance(loaded, datasets.Dataset)
    return loaded


def _cause(error: BaseException) -> str:
    """Return the message of the innermost cause on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return one_line(error, named=True)
