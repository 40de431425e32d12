"""The reference's token log-probabilities of completions, by their keys (`completion_key`), in memory-mapped files.

    FOLDER / 00000-DIGEST.safetensors, 00001-DIGEST.safetensors, …

A file is written atomically and never changes. The digest of its contents in its name tells damage, and lets runs write
at the same time without replacing each other's files. If two files hold a completion, the first one that was read
counts. A completion takes four bytes a scored token in a file, and an entry of about 200 bytes in memory.
"""

import hashlib
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from fastpref.atomic import refusals_named, write_file

_SUFFIX = ".safetensors"
_KEY = 16  # bytes


class LogprobStore:
    """Log-probabilities of a folder's files and of what is added to them; without a folder they stay in memory."""

    def __init__(self, folder: Path | None, files: Sequence[str] | None = None):
        """Read the files with these names in this order, or all in the order of their names. Bad ones become notes."""
        self.folder = folder
        self.notes: list[str] = []
        self.files: list[str] = []  # the names of the files read and written, in their order
        self._numbers: dict[bytes, int] = {}  # of the completions, counted over all blocks
        self._starts = array("q", [0])  # the first token of each completion, counted over all blocks, and the end
        self._blocks: list[Tensor] = []  # float32 on the CPU, the tokens of one file each
        self._firsts: list[int] = []  # the number of each block's first completion
        self._added: dict[bytes, Tensor] = {}  # float32 [n] on any device, not yet in a file
        self.waiting = 0  # their tokens
        if folder is not None:
            there = sorted(path.name for path in folder.glob(f"*{_SUFFIX}")) if folder.is_dir() else []
            for name in there if files is None else files:
                self._read(folder / name)
        if len(self.notes) > 1:  # the whole folder may be gone
            self.notes = [f"{self.notes[0]}; and {len(self.notes) - 1} more files"]

    def __len__(self) -> int:
        return len(self._numbers) + len(self._added)

    def __iter__(self) -> Iterator[bytes]:
        yield from self._numbers
        yield from self._added

    def __contains__(self, key: bytes) -> bool:
        return key in self._numbers or key in self._added

    def __getitem__(self, key: bytes) -> Tensor:
        """Return the log-probabilities [n] of a completion, float32 on the CPU, or on the device they were added on."""
        if (number := self._numbers.get(key)) is None:
            return self._added[key]
        at = bisect_right(self._firsts, number) - 1
        base = self._starts[self._firsts[at]]
        return self._blocks[at][self._starts[number] - base : self._starts[number + 1] - base]

    def lookup(self, keys: Iterable[bytes], device: torch.device) -> Tensor:
        """Return the log-probabilities of completions, one after the other, [M] float32. Raises KeyError."""
        parts = [self[key] for key in keys]
        if len({part.device for part in parts}) > 1:
            parts = [part.to(device, non_blocking=True) for part in parts]
        return torch.cat(parts).to(device, non_blocking=True)

    def add(self, keys: Iterable[bytes], logps: Iterable[Tensor]) -> None:
        """Add log-probabilities [n] of completions that are not known yet; the others stay as they are."""
        for key, values in zip(keys, logps, strict=True):
            if key not in self:
                self._added[key] = values.float()
                self.waiting += len(values)

    def write(self) -> None:
        """Write what was added to a new file, and read it from there. Without a folder this does nothing.

        Raises WriteError; then nothing has changed.
        """
        if not self._added or self.folder is None:
            return
        contents = save(_columns(self._added))
        number = int(self.files[-1].partition("-")[0]) + 1 if self.files else 0
        place = self.folder / f"{number:05}-{_digest(contents)}{_SUFFIX}"
        with refusals_named(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        write_file(place, lambda path: _write_bytes(path, contents))
        if self._read(place):
            self.drop()

    def drop(self) -> None:
        """Forget what was added since the last write."""
        self._added, self.waiting = {}, 0

    def keep_only(self, keys: set[bytes]) -> None:
        """Forget all other completions. The files stay as they are."""
        self._numbers = {key: number for key, number in self._numbers.items() if key in keys}

    def _read(self, path: Path) -> bool:
        try:
            if _digest(path.read_bytes()) != path.stem.partition("-")[2]:
                raise ValueError("its contents are not those that were written")
            self._take(load_file(path))
        except (SafetensorError, KeyError, ValueError, RuntimeError, OSError) as error:
            self.notes.append(f"{path}: cannot be used and is computed again: {error}")
            return False
        self.files.append(path.name)
        return True

    def _take(self, columns: dict[str, Tensor]) -> None:
        keys, first = columns["keys"].numpy().tobytes(), len(self._starts) - 1
        ends = columns["lengths"].cumsum(0) + self._starts[-1]
        self._blocks.append(columns["logps"])
        self._firsts.append(first)
        self._starts.extend(ends.tolist())
        for at in range(len(ends)):
            self._numbers.setdefault(keys[at * _KEY : (at + 1) * _KEY], first + at)


def _columns(logps: dict[bytes, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a file, on the CPU."""
    return {
        "keys": torch.frombuffer(bytearray(b"".join(logps)), dtype=torch.uint8).view(-1, _KEY),
        "lengths": torch.tensor([len(values) for values in logps.values()]),
        "logps": torch.cat(list(logps.values())).cpu(),
    }


def _digest(contents: bytes) -> str:
    return hashlib.sha256(contents).hexdigest()[:16]


def _write_bytes(path: Path, contents: bytes) -> None:
    path.write_bytes(contents)
