"""The first rows of a config's data: whether the files are there, and whether their columns are of a known format."""

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from fastpref.checks.model import has_chat_template
from fastpref.config import Config, DataConfig
from fastpref.data.found import find, kind_of, path_of, shown
from fastpref.data.records import Records
from fastpref.data.rows.auto import AutoFormat
from fastpref.data.rows.content import RowError
from fastpref.errors import UserError
from fastpref.places import means_a_path

LOOKED_AT = 20  # rows of each source
_LARGEST = 1 << 24  # bytes of a file of text: longer ones are only seen to be there, which takes no time


@dataclass(frozen=True)
class _First:
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


def data_mistakes(config: Config) -> Iterator[str]:
    """Yield the first mistake of each source. Sources on the hub are not looked at."""
    for data in (*config.data, *config.eval.data):
        try:
            chats = _look(data, config)
        except UserError as error:
            yield str(error)
            continue
        if chats and has_chat_template(config) is False:
            yield (
                f"{data.path}: its rows are chats, and the tokenizer of {config.model.name} has no chat template; set "
                "tokens.chat_template, to chatml for example"
            )


def leaves_out_template(config: Config) -> bool:
    """Return whether the first source has rows of plain text although the model has a chat template, as far as both can
    be read on this machine.
    """
    try:
        return has_chat_template(config) is True and _look(config.data[0], config) is False
    except UserError:
        return False


def _look(data: DataConfig, config: Config) -> bool | None:
    """Read the first rows of a source. Returns whether `auto` finds chats there, which a template writes; None if other
    formats read them, or if they are not read. Raises UserError.
    """
    from fastpref.data.source import find_source, remedy, row_error

    records = _records(data)
    if records is None:
        return None
    source = find_source(data, records, config.loss)
    for at in range(min(LOOKED_AT, data.rows or len(records), len(records))):
        try:
            source.read(at)
        except RowError as error:
            if data.on_error == "error":
                raise UserError(row_error(source, at, error) + remedy(error, after=at)) from None
    return source.form.chat if isinstance(source.form, AutoFormat) else None


def _records(data: DataConfig) -> Records | None:
    """Open the first file of a source whose first rows can be read at once; None for others. Raises UserError if it is
    not there.
    """
    from fastpref.data.opening import open_records

    if path_of(data).is_dir():  # only `datasets` can tell its splits apart, which takes a second to import
        return None
    found = find(data)
    if found is None:
        if means_a_path(data.path):
            raise UserError(f"{data.path}: there is no such file or folder")
        return None
    file, kind = found.files[0], kind_of(found.files[0])
    name = shown(data, file)
    if kind == ".parquet":
        return _First(name, _first_of_table(name, file))
    if kind == ".arrow":
        return None
    if file.stat().st_size <= _LARGEST:
        return open_records(data.model_copy(update={"path": data.path if len(found.files) == 1 else str(file)}))
    return _First(name, _first_of_lines(file)) if file.suffix in (".jsonl", ".ndjson") else None


def _first_of_lines(path: Path) -> list[dict[str, Any]]:
    """Read the first objects of a file with one JSON object per line. What is none is left out."""
    rows = []
    with path.open("rb") as file:
        for line in islice(file, LOOKED_AT):
            with suppress(ValueError):
                rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


def _first_of_table(name: str, path: Path) -> list[dict[str, Any]]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        batch = next(parquet.ParquetFile(path).iter_batches(batch_size=LOOKED_AT), None)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{name}: cannot be read as parquet: {' '.join(str(error).split())}") from None
    if batch is None or not batch.num_rows:
        raise UserError(f"{name}: there are no rows")
    return batch.to_pylist()
