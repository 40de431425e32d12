"""Read files and data sets as numbered rows, with a place of each for messages. Memory holds only where rows begin.

JSON and CSV are read here, so that a broken row affects no other row and its line is known; `datasets` reads the rest.
"""

import csv
import io
import json
import mmap
from array import array
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fastpref.data.rows.content import RowError, shown
from fastpref.errors import UserError

if TYPE_CHECKING:
    import datasets

BLOCK = 256  # rows of an Arrow table that are decoded at once
_BOM = b"\xef\xbb\xbf"


class Records(Protocol):
    """Rows by number, counted from 0. Reading a broken one raises RowError."""

    def __len__(self) -> int: ...
    def __getitem__(self, at: int) -> dict[str, Any]: ...
    def place(self, at: int) -> str:
        """Return `file:line`, or `file, row N` if there are no lines."""
        ...


class ArrowRecords:
    """A table of `datasets`, memory-mapped."""

    def __init__(self, name: str, table: "datasets.Dataset"):
        self._name, self._table = name, table
        self._block: tuple[int, list[dict[str, Any]]] = (-1, [])

    def __len__(self) -> int:
        return len(self._table)

    @property
    def fingerprint(self) -> str:
        """The fingerprint that `datasets` gives this version of the data."""
        return self._table._fingerprint

    def __getitem__(self, at: int) -> dict[str, Any]:
        block, within = divmod(at, BLOCK)
        if self._block[0] != block:
            columns: Any = self._table[block * BLOCK : (block + 1) * BLOCK]
            # A table stores null for keys that only the messages, calls or schemas of other rows have.
            rows = zip(*([_without_nulls(value) for value in values] for values in columns.values()))
            self._block = block, [dict(zip(columns, values)) for values in rows]
        return self._block[1][within]

    def place(self, at: int) -> str:
        return f"{self._name}, row {at}"


class _TextRecords:
    """Rows that are spans of a text file."""

    def __init__(self, name: str, path: Path, *, numbered: bool):
        self._name, self._numbered = name, numbered
        with path.open("rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._starts, self._stops = array("q"), array("q")
        self._counted = 0, 1  # a byte and its line: rows are mostly read in order
        if self._bytes[:3] == _BOM:
            self._bytes.seek(3)

    def __len__(self) -> int:
        return len(self._starts)

    def place(self, at: int) -> str:
        start = self._starts[at]
        byte, line = self._counted if self._counted[0] <= start else (0, 1)
        line += self._bytes[byte:start].count(b"\n")
        self._counted = start, line
        return f"{self._name}:{line}" + (f", row {at}" if self._numbered else "")

    def _add(self, start: int, stop: int) -> None:
        self._starts.append(start)
        self._stops.append(stop)

    def _text(self, at: int) -> str:
        raw = self._bytes[self._starts[at] : self._stops[at]]
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise RowError(
                f"byte {error.start + 1} of the row, 0x{raw[error.start]:02x}, is not UTF-8; save the file as UTF-8",
                "not UTF-8",
            ) from None


class JsonLines(_TextRecords):
    """A file with one JSON object per line. Empty lines are skipped."""

    def __init__(self, name: str, path: Path):
        super().__init__(name, path, numbered=False)
        start = self._bytes.tell()
        for line in iter(self._bytes.readline, b""):
            stop = start + len(line)
            if not line.isspace():
                self._add(start, stop)
            start = stop

    def __getitem__(self, at: int) -> dict[str, Any]:
        return _object(self._text(at))


class JsonArray(_TextRecords):
    """A file with one JSON array of objects. Broken JSON is a UserError, as the start of the next row is unknown."""

    def __init__(self, name: str, path: Path):
        super().__init__(name, path, numbered=True)
        text = self._bytes[self._bytes.tell() :].decode(errors="surrogateescape")
        character, byte = 0, self._bytes.tell()

        def bytes_until(place: int) -> int:
            nonlocal character, byte
            byte += place - character if ascii_only else len(text[character:place].encode(errors="surrogateescape"))
            character = place
            return byte

        ascii_only = text.isascii()
        try:
            for start, stop in _elements(text):
                first = bytes_until(start)
                self._add(first, bytes_until(stop))
        except json.JSONDecodeError as error:
            raise UserError(
                f"{name}:{error.lineno}: not valid JSON at column {error.colno}: {error.msg}; mend it, or write one "
                'row a line (.jsonl), of which on_error = "drop" leaves out the broken ones'
            ) from None

    def __getitem__(self, at: int) -> dict[str, Any]:
        return _object(self._text(at))


class Csv(_TextRecords):
    """A CSV file with a header. Cells are text, except numbers in the columns named `numbers`."""

    def __init__(self, name: str, path: Path, numbers: Collection[str]):
        super().__init__(name, path, numbered=True)
        csv.field_size_limit(2**31 - 1)  # its default of 128 KiB is less than a long chat
        self._numbers = numbers
        end = self._bytes.tell()

        def lines() -> Iterator[str]:
            nonlocal end
            for line in iter(self._bytes.readline, b""):
                end += len(line)
                yield line.decode(errors="surrogateescape")

        reader = csv.reader(lines())
        try:
            self.header = next(reader, [])
            start = end
            for fields in reader:
                if fields:
                    self._add(start, end)
                start = end
        except csv.Error as error:
            raise UserError(f"{name}:{reader.line_num}: not valid CSV: {error}") from None
        if twice := [column for column in self.header if self.header.count(column) > 1]:
            raise UserError(f"{name}:1: the header names the column {twice[0]!r} twice")

    def __getitem__(self, at: int) -> dict[str, Any]:
        fields = next(csv.reader(io.StringIO(self._text(at), newline="")))
        if len(fields) != len(self.header):
            raise RowError(
                f"there are {len(fields)} fields, and the header names {len(self.header)}; text that holds a comma or "
                'a line end stands in "quotes"',
                "with more or fewer fields than the header",
            )
        row: dict[str, Any] = dict(zip(self.header, fields))
        for column in self._numbers:
            if column in row:
                with suppress(ValueError):
                    row[column] = float(row[column])
        return row


def read_json(name: str, path: Path) -> Records:
    """Open a JSON array, or one object per line, whatever the suffix. Raises UserError for one object of many lines."""
    with path.open("rb") as file:
        begins = file.read(4096).removeprefix(_BOM).lstrip()
        if begins.startswith(b"[") and path.suffix == ".json":
            return JsonArray(name, path)
    records = JsonLines(name, path)
    if path.suffix == ".json" and len(records) > 1:
        try:
            records[0]
        except RowError:
            try:
                keys = json.loads(path.read_text(encoding="utf-8-sig"))
            except (RecursionError, ValueError):
                return records
            raise UserError(
                f"{name}: this is one {type(keys).__name__}, and a file of rows is a list of objects, [{{...}}, ...]"
            ) from None
    return records


def _without_nulls(value: Any) -> Any:
    """Return a cell without the keys whose values are null; a cell that is null itself stays."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _elements(text: str) -> Iterator[tuple[int, int]]:
    """Yield where each element of a JSON array begins and ends. Raises JSONDecodeError."""
    decoder, blank = json.JSONDecoder(), json.decoder.WHITESPACE.match  # pyright: ignore[reportAttributeAccessIssue]

    def skip(at: int) -> int:
        return blank(text, at).end()

    at = skip(skip(0) + 1)
    if text[at : at + 1] == "]":
        at += 1
    else:
        while True:
            start = at
            try:
                _, at = decoder.raw_decode(text, start)
            except json.JSONDecodeError:
                raise
            except (RecursionError, ValueError) as error:  # a thousand brackets, a number of 5,000 digits
                raise json.JSONDecodeError(str(error), text, start) from None
            yield start, at
            at = skip(at)
            if text[at : at + 1] == "]":
                at += 1
                break
            if text[at : at + 1] != ",":
                raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
            at = skip(at + 1)
    if skip(at) != len(text):
        raise json.JSONDecodeError("Something follows the array", text, skip(at))


def _object(text: str) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise RowError(f"not valid JSON at column {error.pos + 1}: {error.msg}", "not valid JSON") from None
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, a thousand brackets
        raise RowError(f"not readable as JSON: {error}", "not valid JSON") from None
    if not isinstance(row, dict):
        raise RowError(f"a row is an object {{...}}, got {shown(row)}", "no object")
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise RowError(f"{half!a} is half a character, which no text holds", "not UTF-8") from None
    return row
