"""The first rows of files, read without the rest of large ones and without `datasets`, whose import takes a second."""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastpref.config import DataConfig
from fastpref.data.found import checked, is_saved, kind_of, nothing_readable, readable, shown
from fastpref.data.opening import open_csv, open_file
from fastpref.data.records import Records, twice
from fastpref.data.rows.content import RowError
from fastpref.data.source import LOOKED_AT
from fastpref.data.text_records import PACKED, JsonArray, JsonLines
from fastpref.errors import UserError, one_line

WHOLE = 1 << 24  # bytes of a file of text that is read whole; a compressed one has a quarter of it
BEGINNING = 1 << 20  # bytes of text that are read of a larger one

# How `datasets` tells the splits of a folder apart: names of folders, or else of files, that contain one of the words.
_WORDS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "dev", "val"},
    "test": {"test", "testing", "eval", "evaluation"},
}
_SHARD = re.compile(r"data/([^/]+)-\d{5}-of-\d{5}[^/]*\.[^/]*")  # of the hub; if there is one, nothing else is read
_IGNORED = {"config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json"}
_OTHER = {"task.toml", "instruction.md"}  # files of folders with rules of their own, like those that end in .eval


@dataclass(frozen=True)
class TableRows:
    """The first rows of a table, as records."""

    name: str
    rows: Sequence[dict[str, Any]]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, at: int) -> dict[str, Any]:
        return self.rows[at]

    def place(self, at: int) -> str:
        return f"{self.name}, row {at}"


def first_rows(data: DataConfig, path: Path) -> Records | None:
    """Open at least the first rows of a file of a source; None if that takes long. Raises UserError."""
    name, kind, size = shown(data, path), kind_of(path), path.stat().st_size
    if kind in (".parquet", ".arrow"):
        return TableRows(name, _of_table(name, path, kind.removeprefix(".")))
    if size <= (WHOLE // 4 if path.suffix.lower() in PACKED else WHOLE):
        return open_file(data, path)
    beginning = open_csv(data, path, BEGINNING) if kind in (".csv", ".tsv") else _json(name, path, kind)
    return beginning if beginning and len(beginning) else None


def _json(name: str, path: Path, kind: str) -> Records | None:
    lines = JsonLines(name, path, BEGINNING)
    if lines.begins.startswith(b"["):
        return JsonArray(name, path, most=BEGINNING)
    if kind == ".json" and len(lines):
        try:
            lines[0]
        except RowError:  # perhaps one object that has the rows under a key
            return None
    return lines


def _of_table(name: str, path: Path, kind: str) -> list[dict[str, Any]]:
    import pyarrow as pa

    try:
        batch = _first_batch(path, kind)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{name}: cannot be read as {kind}: {one_line(error)}") from None
    if batch is None:
        return []
    if column := twice(batch.schema.names):
        raise UserError(f"{name}: two columns are named {column!r}; rename or remove one")
    return batch.slice(0, LOOKED_AT).to_pylist()


def _first_batch(path: Path, kind: str) -> Any:
    """Return the first rows as a pyarrow.RecordBatch, or None without rows. Raises ArrowException."""
    import pyarrow as pa
    from pyarrow import ipc, parquet

    if kind == "parquet":
        with parquet.ParquetFile(path) as file:
            return next(file.iter_batches(batch_size=LOOKED_AT), None)
    with pa.memory_map(str(path)) as file:
        try:
            return next(iter(ipc.open_stream(file)), None)
        except pa.ArrowInvalid:
            file.seek(0)
            reader = ipc.open_file(file)
            return reader.get_batch(0) if reader.num_record_batches else None


def files_in(data: DataConfig, folder: Path) -> list[Path]:
    """Return the files of a folder that surely belong to a source's split, or none if only `datasets` can tell.

    Raises UserError if there is nothing in the folder that is read.
    """
    if is_saved(folder):
        return _saved(data, folder)
    if not any(readable(folder)):
        raise nothing_readable(data)
    readme = folder / "README.md"
    if data.name is not None or (readme.is_file() and readme.read_bytes().lstrip().startswith(b"---")):
        return []
    names = sorted(_visible(folder))
    if any(Path(name).name in _OTHER or name.endswith(".eval") for name in names):
        return []
    files = [folder / name for name in _of_split(names, data.split)]
    kinds = Counter(map(kind_of, files))
    certain = len(kinds) == 1 and set(files) <= set(readable(folder))
    return [checked(data, file) for file in files] if certain else []


def _visible(folder: Path) -> Iterator[str]:
    """Yield the names of the files in a folder and beneath it that `datasets` looks at."""
    for file in folder.rglob("*"):
        name = file.relative_to(folder)
        unseen = name.name in _IGNORED or any(part.startswith((".", "__")) for part in name.parts)
        if not unseen and name.as_posix() != "README.md" and file.is_file():
            yield name.as_posix()


def _of_split(names: Sequence[str], split: str) -> list[str]:
    shards = [(name, match[1]) for name in names if (match := _SHARD.fullmatch(name))]
    if shards:
        return [name for name, of in shards if of == split]
    for part in (lambda name: name.rpartition("/")[0], lambda name: name.rpartition("/")[2]):
        words = {name: set(re.split(r"[-._ 0-9/]+", part(name))) for name in names}
        if any(words[name] & known for name in names for known in _WORDS.values()):
            return [name for name in names if words[name] & _WORDS.get(split, set())]
    return list(names) if split == "train" else []


def _saved(data: DataConfig, folder: Path) -> list[Path]:
    """Return the files of a folder that `save_to_disk` wrote."""
    if (folder / "dataset_dict.json").is_file():
        folder = folder / data.split
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        files = [folder / file["filename"] for file in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return files if state.get("_format_columns") is None and all(file.is_file() for file in files) else []
