"""Write a GGUF file with the `gguf` package: settings first, then one tensor after the other."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter
from torch import Tensor

from fastpref.export.quantise import Written, quantised
from fastpref.export.settings import apply

_ALIGNMENT = 32  # bytes, of each tensor
_NO_DTYPE: Any = np.float32  # the writer asks for one, and uses the type it is given beside it


def file_size(tensors: Mapping[str, Written]) -> int:
    """Return the bytes of the tensors of a file, which are nearly all of it."""
    return sum(-(-written.bytes // _ALIGNMENT) * _ALIGNMENT for written in tensors.values())


def write_gguf(
    path: Path,
    arch: str,
    settings: Iterable[tuple[str, Any]],
    tensors: Mapping[str, Written],
    values: Callable[[], Iterator[tuple[str, Tensor]]],
) -> None:
    """Write a file. `values` yields the float32 tensors in the order of `tensors`, which says how to write each."""
    writer = GGUFWriter(path, arch)
    try:
        apply(writer, settings)
        for name, written in tensors.items():
            writer.add_tensor_info(name, written.shape, _NO_DTYPE, written.bytes, raw_dtype=written.type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for (name, tensor), (expected, written) in zip(values(), tensors.items(), strict=True):
            assert name == expected, f"{name} is not {expected}"
            writer.write_tensor_data(quantised(name, tensor, written))
            del tensor
    finally:
        writer.close()
