"""Read the safetensors of a model's folder: names, shapes and dtypes from their headers, and single tensors."""

import json
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, int8_vectorwise_dequant
from bitsandbytes.utils import unpack_tensor_to_dict
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor

from fastpref.config import ModelConfig
from fastpref.errors import UserError, one_line
from fastpref.model.weights import Renaming

INDEX = "model.safetensors.index.json"
COPIED = (
    "generation_config.json", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "LICENSE*", "USE_POLICY*", "NOTICE*",
)  # fmt: skip
_DOWNLOADED = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.py", *COPIED)
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_FOUR_BITS = ".quant_state.bitsandbytes__"
_STATISTICS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """A tensor in a file."""

    file: Path
    shape: Shape  # of its values, even if they are stored quantised
    dtype: torch.dtype | None  # of its values; None for integers, 8-bit floats and the like, which are only copied
    statistics: tuple[str, ...] = ()  # the tensors that bitsandbytes keeps with a quantised weight


class Checkpoint:
    """A folder's config.json and its safetensors. Raises UserError for files that are missing or cannot be read."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = _json(folder / "config.json")
        self.files = _files(folder)
        self._places: dict[str, Path] = {}
        headers: dict[str, tuple[Shape, str]] = {}
        for file in self.files:
            try:
                with safe_open(file, "pt") as opened:
                    for name in opened.keys():  # noqa: SIM118
                        part = opened.get_slice(name)
                        headers[name] = tuple(part.get_shape()), part.get_dtype()
                        self._places[name] = file
            except Exception as error:  # safetensors raises its own kind
                raise UserError(f"{file}: cannot be read: {error}") from None
        self.tensors = self._tensors(headers)
        self._stored = {name: name for name in self.tensors}  # the names in the files

    def read(self, name: str) -> Tensor:
        """Read a tensor. One that bitsandbytes quantised is dequantised to `plain_dtype`."""
        tensor, statistics = self._raw(self._stored[name]), self.tensors[name].statistics
        if not statistics:
            return tensor
        if statistics[0].endswith("SCB"):
            return int8_vectorwise_dequant(tensor, self._raw(statistics[0])).to(self.plain_dtype)
        state = QuantState.from_dict({s: self._raw(s) for s in statistics}, device=torch.device("cpu"))
        return dequantize_4bit(tensor, state).to(self.plain_dtype)

    def renamed(self, renaming: Renaming) -> "Checkpoint":
        """Return the same tensors under other names, as `model.weights` does for files with a wrapper's prefix."""
        other = copy(self)
        other.tensors = {renaming(name): entry for name, entry in self.tensors.items()}
        other._stored = {renaming(name): stored for name, stored in self._stored.items()}
        return other

    @property
    def method(self) -> str | None:
        """The quantisation method of the weights by config.json, or None."""
        settings = self.config.get("quantization_config") or self._text.get("quantization_config") or {}
        unnamed = "bitsandbytes" if "load_in_4bit" in settings else "unknown"
        return str(settings.get("quant_method") or unnamed) if settings else None

    @property
    def dequantised(self) -> bool:
        """Whether quantised weights are dequantised when they are read."""
        return self.method == "bitsandbytes"

    @property
    def plain_dtype(self) -> torch.dtype:
        """The dtype of dequantised weights: the dtype in config.json, or else float16."""
        dtypes = {str(dtype).removeprefix("torch."): dtype for dtype in _DTYPES.values()}
        names = (str(c.get(key)) for c in (self.config, self._text) for key in ("dtype", "torch_dtype"))
        return next((dtypes[name] for name in names if name in dtypes), torch.float16)

    @property
    def _text(self) -> dict[str, Any]:
        text = self.config.get("text_config")
        return text if isinstance(text, dict) else {}

    def _raw(self, name: str) -> Tensor:
        with safe_open(self._places[name], "pt") as opened:
            return opened.get_tensor(name)

    def _tensors(self, headers: dict[str, tuple[Shape, str]]) -> dict[str, Entry]:
        quantised = self._quantised(headers) if self.dequantised else {}
        parts = {part for entry in quantised.values() for part in entry.statistics}
        tensors = {
            name: Entry(self._places[name], shape, _DTYPES.get(dtype)) for name, (shape, dtype) in headers.items()
        }
        return {name: entry for name, entry in (tensors | quantised).items() if name not in parts}

    def _quantised(self, headers: dict[str, tuple[Shape, str]]) -> dict[str, Entry]:
        """Return the weights that bitsandbytes quantised, with the tensors that belong to each."""
        weights: dict[str, Entry] = {}
        for name in headers:
            weight, mark, _ = name.partition(_FOUR_BITS)
            if mark:
                shape = tuple(unpack_tensor_to_dict(self._raw(name))["shape"])
                others = [f"{weight}.{kind}" for kind in _STATISTICS]
            elif name.endswith(".SCB"):
                owner = name.removesuffix(".SCB")
                weight, others = f"{owner}.weight", [f"{owner}.weight_format"]
                shape = headers[weight][0]
            else:
                continue
            if weight in headers:
                statistics = (name, *(other for other in others if other in headers))
                weights[weight] = Entry(self._places[weight], shape, self.plain_dtype, statistics)
        return weights


def model_folder(options: ModelConfig, *, local: bool = False) -> Path:
    """Return the folder of a model's files, downloaded unless `local` forbids it. Raises UserError."""
    folder = Path(options.name).expanduser()
    if folder.is_dir():
        return folder
    files: dict[str, Any] = {"allow_patterns": list(_DOWNLOADED), "local_files_only": local}
    try:
        return Path(snapshot_download(options.name, revision=options.revision, **files))
    except Exception as error:  # the hub raises many kinds
        raise UserError(f"model.name = {options.name!r}: its files cannot be had: {one_line(error)}") from None


def _files(folder: Path) -> tuple[Path, ...]:
    index = folder / INDEX
    names = sorted(set(_json(index).get("weight_map", {}).values())) if index.is_file() else ["model.safetensors"]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder}: {missing[0]} is missing; only safetensors are read")
    return tuple(folder / name for name in names)


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
