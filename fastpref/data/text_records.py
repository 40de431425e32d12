"""Rows of JSON and CSV files, which may be compressed. A broken row affects no other row, and its line is known.

Memory holds only where rows begin. Nothing here imports `datasets`.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import mmap
import re
import shutil
import tempfile
import zlib
from array import array
from collections.abc import Collection, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from fastpref.data.records import Records, twice
from fastpref.data.rows.content import RowError, shown
from fastpref.errors import UserError, one_line

PACKED: dict[str, type[gzip.GzipFile | bz2.BZ2File | lzma.LZMAFile]] = {
    ".gz": gzip.GzipFile,
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
}
"""The suffixes of compressed files, and what unpacks each."""
LISTS = ("data", "rows", "examples", "instances", "items", "records", "train")
"""The keys under which a JSON file that is one object may hold its rows."""
_OF_A_ROW = ("prompt", "messages", "conversations", "instruction", "question", "input", "chosen", "completion")
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_SEPARATED = re.compile(rb'"?sep=([,;\t|])"?\r?\n')  # the line by which Excel is told what separates columns
_BOM = b"\xef\xbb\xbf"
_HEADER = 100  # lines at most that a header is looked for in
_DELIMITERS = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "a bar"}


class _TextRecords:
    """Rows that are spans of a text file. With `most`, only those that end in so many first bytes of its text."""

    notes: tuple[str, ...] = ()

    def __init__(self, name: str, path: Path, most: int | None, *, numbered: bool):
        self._name, self._numbered = name, numbered
        self._bytes = _mapped(name, path) if most is None else _beginning(name, path, most)
        self._cut = most is not None and len(self._bytes) == most
        self._starts, self._stops = array("q"), array("q")
        self._counted = 0, 1  # a byte and its line: rows are mostly read in order
        if self._bytes[:2] in _UTF16 or b"\0" in self._bytes[:2]:
            raise UserError(f"{name}: the file is UTF-16, and UTF-8 is read; save it as UTF-8 (in Excel: CSV UTF-8)")
        self._begin = len(_BOM) if self._bytes[:3] == _BOM else 0
        self._bytes.seek(self._begin)

    def __len__(self) -> int:
        return len(self._starts)

    def place(self, at: int) -> str:
        start = self._starts[at]
        byte, line = self._counted if self._counted[0] <= start else (0, 1)
        line += self._bytes[byte:start].count(b"\n")
        self._counted = start, line
        return f"{self._name}:{line}" + (f", row {at}" if self._numbered else "")

    @property
    def begins(self) -> bytes:
        """The first bytes after white space."""
        return self._bytes[self._begin : 4096].lstrip()

    @property
    def whole(self) -> str:
        """The text of the file. Raises UnicodeDecodeError, a ValueError."""
        return self._bytes[self._begin :].decode()

    def _add(self, start: int, stop: int) -> None:
        self._starts.append(start)
        self._stops.append(stop)

    def _without_cut_row(self) -> None:
        """Leave out the last row if the text was cut, perhaps within it."""
        if self._cut and self._starts:
            self._starts.pop()
            self._stops.pop()

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

    def __init__(self, name: str, path: Path, most: int | None = None):
        super().__init__(name, path, most, numbered=False)
        start = self._bytes.tell()
        for line in iter(self._bytes.readline, b""):
            stop = start + len(line)
            if not line.isspace():
                self._add(start, stop)
            start = stop
        self._without_cut_row()

    def __getitem__(self, at: int) -> dict[str, Any]:
        return _object(self._text(at))


class JsonArray(_TextRecords):
    """A file with one JSON array of objects, or an object with such an array under a key.

    Broken JSON is a UserError, as the start of the next row is unknown.
    """

    def __init__(self, name: str, path: Path, key: str | None = None, most: int | None = None):
        super().__init__(name, path, most, numbered=True)
        text = self._bytes[self._begin :].decode(errors="surrogateescape")
        character, byte = 0, self._begin

        def bytes_until(place: int) -> int:
            nonlocal character, byte
            byte += place - character if ascii_only else len(text[character:place].encode(errors="surrogateescape"))
            character = place
            return byte

        ascii_only = text.isascii()
        try:
            begin = 0 if key is None else next(start for own, start, _ in _members(text) if own == key)
            for start, stop in _elements(text, begin, last=key is None):
                first = bytes_until(start)
                self._add(first, bytes_until(stop))
        except json.JSONDecodeError as error:
            if self._cut:
                return
            raise UserError(
                f"{name}:{error.lineno}: not valid JSON at column {error.colno}: {error.msg}; mend it, or write one "
                'row a line (.jsonl), of which on_error = "drop" leaves out the broken ones'
            ) from None

    def __getitem__(self, at: int) -> dict[str, Any]:
        return _object(self._text(at))


class Csv(_TextRecords):
    """A CSV file with a header. Cells are text, except numbers in the columns named `numbers`.

    What separates its columns is seen in the header and in the first row, in which it makes equally many columns, and
    the most; `usual` goes first.
    """

    def __init__(self, name: str, path: Path, numbers: Collection[str], usual: str = ",", most: int | None = None):
        super().__init__(name, path, most, numbered=True)
        csv.field_size_limit(2**31 - 1)  # its default of 128 KiB is less than a long chat
        self._numbers = numbers
        told = _SEPARATED.match(self._bytes, self._begin)
        end = told.end() if told else self._begin
        self._bytes.seek(end)
        self._delimiter = told[1].decode() if told else self._separator(usual)
        self._bytes.seek(end)
        if self._delimiter != usual:
            self.notes = (f"{Path(name).name}: {_DELIMITERS[self._delimiter]} separates the columns",)

        def lines() -> Iterator[str]:
            nonlocal end
            for line in iter(self._bytes.readline, b""):
                end += len(line)
                yield line.decode(errors="surrogateescape")

        reader = csv.reader(lines(), delimiter=self._delimiter)
        try:
            self.header = next(reader, [])
            start = end
            for fields in reader:
                if fields:
                    self._add(start, end)
                start = end
        except csv.Error as error:
            raise UserError(f"{name}:{reader.line_num}: not valid CSV: {_without_jargon(error)}") from None
        self._without_cut_row()
        if column := twice(self.header):
            raise UserError(f"{name}:1: the header names the column {column!r} twice")

    def __getitem__(self, at: int) -> dict[str, Any]:
        # Strict, because a quote that does not end would swallow the rows that follow.
        reader = csv.reader(io.StringIO(self._text(at), newline=""), delimiter=self._delimiter, strict=True)
        try:
            fields = next(reader)
        except csv.Error as error:
            raise RowError(
                f"not valid CSV: {error}; a field that begins with a quote ends with one, and quotes in between are "
                'doubled, "such as ""this"" one"',
                "not valid CSV",
            ) from None
        if len(fields) != len(self.header):
            raise RowError(
                f"there are {len(fields)} fields, and the header names {len(self.header)}; text that holds "
                f'{_DELIMITERS[self._delimiter]} or a line end stands in "quotes"',
                "with more or fewer fields than the header",
            )
        row: dict[str, Any] = dict(zip(self.header, fields))
        for column in self._numbers:
            if column in row:
                with suppress(ValueError):
                    row[column] = float(row[column])
        return row

    def _separator(self, usual: str) -> str:
        start, columns = self._bytes.tell(), dict[str, tuple[bool, int]]()
        for delimiter in (usual, *_DELIMITERS):
            self._bytes.seek(start)
            lines = (line.decode(errors="replace") for line in iter(self._bytes.readline, b""))
            with suppress(csv.Error):
                rows = csv.reader(islice(lines, _HEADER), delimiter=delimiter)
                header, first = (len(next(rows, [])) for _ in range(2))
                columns[delimiter] = header == first > 1, header
        return max(columns, key=columns.__getitem__, default=usual)


def _without_jargon(error: csv.Error) -> str:
    if "new-line character" in str(error):
        return "a carriage return stands outside quotes without a line feed; end lines with line feeds"
    return str(error)


def read_json(name: str, path: Path, kind: str) -> Records:
    """Open one object per line, a JSON array, or one object that holds the rows under one of LISTS.

    `kind` is the file's suffix without that of its packing. Raises UserError for broken JSON in an array, and for
    another object that spans several lines.
    """
    records = JsonLines(name, path)
    begins = records.begins
    if begins.startswith(b"[") and kind == ".json":
        return JsonArray(name, path)
    if begins.startswith(b"["):
        with suppress(UserError):  # a line may begin so, too
            return JsonArray(name, path)
    if kind != ".json" or not begins.startswith(b"{") or not _is_one_object(records):
        return records
    try:
        members = {key: value for key, _, value in _members(records.whole)}
    except ValueError:
        return records
    lists = [key for key in LISTS if _is_rows(members.get(key))]
    if len(lists) == 1 and members.keys().isdisjoint(_OF_A_ROW):
        return JsonArray(name, path, lists[0])
    if len(records) == 1:
        return records
    also = f"; {' and '.join(lists)} are lists here, so write a file of each" if len(lists) > 1 else ""
    raise UserError(
        f'{name}: this is one object, and a file of rows is a list of objects, [{{...}}, ...], or has it under "data"'
        + also
    )


def _is_one_object(records: JsonLines) -> bool:
    """Return whether a file may be one object: its first line is none, or is the only one."""
    if len(records) == 1:
        return True
    try:
        records[0]
    except RowError:
        return True
    return False


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _mapped(name: str, path: Path) -> mmap.mmap:
    """Map a file into memory. A compressed one is unpacked into a temporary file. Raises UserError, or OSError."""
    unpack = PACKED.get(path.suffix.lower())
    if unpack is None:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    with tempfile.TemporaryFile() as file:
        try:
            with unpack(path) as packed:
                shutil.copyfileobj(packed, file, 2**20)
        except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
            raise UserError(f"{name}: cannot be unpacked: {one_line(error)}") from None
        file.flush()
        if file.tell() == 0:
            raise UserError(f"{name}: the file is empty")
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _beginning(name: str, path: Path, most: int) -> mmap.mmap:
    """Return the first bytes of a file's text, in memory that is used like a mapped file. Raises as `_mapped`."""
    unpack = PACKED.get(path.suffix.lower())
    with path.open("rb") if unpack is None else unpack(path) as file:
        try:
            beginning = file.read(most)
        except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
            raise UserError(f"{name}: cannot be unpacked: {one_line(error)}") from None
    if not beginning:
        raise UserError(f"{name}: the file is empty")
    memory = mmap.mmap(-1, len(beginning))
    memory.write(beginning)
    return memory


_blank = json.decoder.WHITESPACE.match  # pyright: ignore[reportAttributeAccessIssue]


def _skip(text: str, at: int) -> int:
    return _blank(text, at).end()


def _value(text: str, at: int) -> tuple[Any, int]:
    """Read the JSON value at a place. Returns it and the place after it. Raises JSONDecodeError."""
    try:
        return json.JSONDecoder().raw_decode(text, at)
    except json.JSONDecodeError:
        raise
    except (RecursionError, ValueError) as error:  # a thousand brackets, a number of 5,000 digits
        raise json.JSONDecodeError(str(error), text, at) from None


def _members(text: str) -> Iterator[tuple[str, int, Any]]:
    """Yield each key of a JSON object, where its value begins, and the value. Raises JSONDecodeError."""
    at = _skip(text, _skip(text, 0) + 1)
    while text[at : at + 1] == '"':
        key, at = _value(text, at)
        if text[(at := _skip(text, at)) : at + 1] != ":":
            raise json.JSONDecodeError("Expecting ':'", text, at)
        start = _skip(text, at + 1)
        value, at = _value(text, start)
        yield key, start, value
        at = _skip(text, at)
        if text[at : at + 1] == ",":
            at = _skip(text, at + 1)
    if text[at : at + 1] != "}" or _skip(text, at + 1) != len(text):
        raise json.JSONDecodeError("Expecting the end of the object", text, at)


def _elements(text: str, start: int, *, last: bool) -> Iterator[tuple[int, int]]:
    """Yield where each element of a JSON array begins and ends. Raises JSONDecodeError, with `last` also for text that
    follows the array."""
    at = _skip(text, _skip(text, start) + 1)
    if text[at : at + 1] == "]":
        at += 1
    else:
        while True:
            start = at
            _, at = _value(text, start)
            yield start, at
            at = _skip(text, at)
            if text[at : at + 1] == "]":
                at += 1
                break
            if text[at : at + 1] != ",":
                raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
            at = _skip(text, at + 1)
    if last and _skip(text, at) != len(text):
        raise json.JSONDecodeError("Something follows the array", text, _skip(text, at))


def _members_once(members: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the members of a JSON object as a dict. Raises RowError for a key that is there twice."""
    row = dict(members)
    if len(row) < len(members):
        key = twice([key for key, _ in members])
        raise RowError(f"the key {key!r} is there twice, and only one of its values can be meant", "a key twice")
    return row


def _object(text: str) -> dict[str, Any]:
    try:
        row = json.loads(text, object_pairs_hook=_members_once)
    except RowError:
        raise
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
