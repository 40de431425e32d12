"""The names, shapes and sizes of the tensors in safetensors files, from their first bytes."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

_LONGEST = 100_000_000  # bytes of a header, by the format's definition


@dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    shape: tuple[int, ...]
    dtype: str  # as the format spells it, such as "BF16"

    @property
    def count(self) -> int:
        return prod(self.shape)


def read_header(path: Path) -> dict[str, Stored]:
    """Read the tensors of a file by their names. Raises ValueError for a damaged or shortened file, OSError."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        size = path.stat().st_size
        if not 2 <= length <= min(_LONGEST, size):
            raise ValueError("it does not begin as a safetensors file does")
        content: Mapping[str, Any] = json.loads(file.read(length))
    tensors = {name: entry for name, entry in content.items() if name != "__metadata__"}
    end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    if 8 + length + end != size:
        raise ValueError(f"it has {size:,} bytes instead of {8 + length + end:,}")
    return {name: Stored(tuple(entry["shape"]), entry["dtype"]) for name, entry in tensors.items()}


def read_headers(folder: Path) -> dict[str, Stored]:
    """Read the tensors of all files of a model's folder. What cannot be read is left out."""
    stored: dict[str, Stored] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            stored |= read_header(path)
        except (OSError, ValueError, KeyError, TypeError, IndexError):
            continue
    return stored
