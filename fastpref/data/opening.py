"""Open a [[data]] source: files, a folder written by `save_to_disk`, or a data set on the hub.

`datasets` is imported only for what is no text, because importing it takes a second.
"""

import glob
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastpref.config import DataConfig
from fastpref.data.found import Found, find, kind_of, path_of, shown
from fastpref.data.records import Joined, Records, twice
from fastpref.data.rows.columns import LABELS, MARGIN, WEIGHT
from fastpref.data.text_records import Csv, read_json
from fastpref.errors import UserError, one_line

if TYPE_CHECKING:
    import datasets

    from fastpref.data.arrow import ArrowRecords


def open_records(data: DataConfig) -> Records:
    """Open the rows of a source. Raises UserError, naming the file, if there are none or they cannot be read."""
    found = find(data)
    records = _open_table(data) if found is None else _open_files(data, found)
    if not len(records):
        raise UserError(f"{data.path}: there are no rows")
    return records


def content_hash(data: DataConfig) -> str:
    """Return a hash of a source's contents: the bytes of its files, or the fingerprint that `datasets` gives hub data.

    Raises UserError as `open_records` does, OSError if the file cannot be read.
    """
    path, found = path_of(data), find(data)
    if found is not None:
        several = len(found.files) > 1 or path.is_dir()
        return _digest((str(file) if several else "None", file) for file in found.files)
    if path.is_dir():
        _open_table(data)
        files = sorted(file for file in path.rglob("*") if file.is_file())
        return _digest((str(file.relative_to(path)), file) for file in files)
    return _open_table(data).fingerprint


def _digest(files: Iterable[tuple[str, Path]]) -> str:
    total = hashlib.sha256()
    for name, path in files:
        with path.open("rb") as file:
            total.update(name.encode())
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def _open_files(data: DataConfig, found: Found) -> Records:
    parts = [open_file(data, file) for file in found.files]
    return parts[0] if len(parts) == 1 and not found.notes else Joined(parts, found.notes)


def open_file(data: DataConfig, path: Path) -> Records:
    """Open a file of a source. Raises UserError."""
    name, kind = shown(data, path), kind_of(path)
    try:
        if kind in (".jsonl", ".ndjson", ".json"):
            return read_json(name, path, kind)
        if kind in (".csv", ".tsv"):
            return open_csv(data, path)
    except OSError as error:
        raise UserError(f"{name}: cannot be read: {error.strerror}") from None
    return _records(name, _from_file(name, path))


def open_csv(data: DataConfig, path: Path, most: int | None = None) -> Csv:
    """Open a CSV or TSV file, of which `most` bytes are read."""
    options = data.format if isinstance(data.format, dict) else {}
    numbers = [options.get(f"field_{name}", name) for name in (LABELS[0], WEIGHT, MARGIN)]
    return Csv(shown(data, path), path, [*numbers, *LABELS[1:]], "\t" if kind_of(path) == ".tsv" else ",", most)


def _open_table(data: DataConfig) -> "ArrowRecords":
    path = path_of(data)
    return _records(data.path, _from_disk(data, path) if path.is_dir() else _from_hub(data))


def _records(name: str, table: "datasets.Dataset") -> "ArrowRecords":
    from fastpref.data.arrow import ArrowRecords

    return ArrowRecords(name, table)


def _datasets() -> Any:
    """Return the library, which prints nothing: our own message reports what it cannot read."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    return datasets


def _from_file(name: str, path: Path) -> "datasets.Dataset":
    kind = kind_of(path).removeprefix(".")
    library = _datasets()
    try:
        if kind == "parquet" and not _parquet_rows(name, path):  # which the library cannot read
            return library.Dataset.from_dict({})
        return library.load_dataset(kind, data_files=glob.escape(str(path)), split="train")
    except UserError:
        raise
    except Exception as error:  # datasets raises whatever its reader raises
        if "corresponds to no data" in str(error):
            return library.Dataset.from_dict({})
        raise UserError(f"{name}: cannot be read as {kind}: {_cause(error)}") from None


def _parquet_rows(name: str, path: Path) -> int:
    """Return the number of rows of a parquet file. Raises UserError if two of its columns have one name."""
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        if column := twice(file.schema_arrow.names):
            raise UserError(f"{name}: two columns are named {column!r}; rename or remove one")
        return file.metadata.num_rows


def _from_disk(data: DataConfig, path: Path) -> "datasets.Dataset":
    library = _datasets()
    try:
        loaded = library.load_from_disk(str(path))
    except Exception as error:
        raise UserError(f"{data.path}: cannot be read: {_cause(error)}") from None
    if isinstance(loaded, library.Dataset):
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
    try:
        return _datasets().load_dataset(data.path, data.name, split=data.split, revision=data.revision)
    except Exception as error:  # the hub, the network, the split, the configuration: each has its own kind
        raise UserError(
            f"{data.path}: neither a file here nor a data set that the hub gives us: {_cause(error)}"
        ) from None


def _cause(error: BaseException) -> str:
    """Return the message of the innermost cause on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return one_line(error, named=True)
