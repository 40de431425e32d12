"""From the tensors of a model in memory to those of a GGUF file: their names, and the order of their numbers."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import gguf
from torch import Tensor

from fastpref.errors import UserError
from fastpref.export.families import Family

_ARCHITECTURES = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
_BUFFERS = ("rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")  # computed, not learned


@dataclass(frozen=True)
class Piece:
    """A tensor of the file: rows of one of the model's, perhaps in another order."""

    name: str  # in the file
    rows: Callable[[Tensor], Tensor] = lambda tensor: tensor
    """Takes [..., out, in] or [out] to that of the file. It selects and orders rows only, as LoRA's B needs too."""
    offset: float = 0.0  # added to the numbers
    flat: bool = False  # whether the tensor [1, n] is a vector in the file

    def of(self, tensor: Tensor) -> Tensor:
        """Return the tensor of the file for one of the model."""
        rows = self.rows(tensor) + self.offset if self.offset else self.rows(tensor)
        return rows.flatten() if self.flat else rows


class TensorNames:
    """Names the tensors of a model of a family."""

    def __init__(self, config: Any, family: Family):
        self._config, self._family = config, family
        self._map = gguf.get_tensor_name_map(_ARCHITECTURES[family.arch], config.num_hidden_layers)

    def pieces(self, name: str) -> list[Piece]:
        """Return the tensors that a tensor of the model becomes. Raises UserError for one that GGUF has no name for."""
        if re.search(r"\.experts\.(gate_up_proj|down_proj)$", name):
            return self._experts(name)
        known = self._map.get_name(name, try_suffixes=(".weight", ".bias"))
        if known is None:
            raise UserError(f"{name}: llama.cpp's {self._family.arch} has no such tensor, so the model is not written")
        heads = {"q_proj": self._config.num_attention_heads, "k_proj": self._config.num_key_value_heads}
        layer = name.split(".")[-2]
        if self._family.interleaved and layer in heads:
            return [Piece(known, partial(interleaved, heads=heads[layer]))]
        offset = self._family.norm_offset if name.endswith("norm.weight") else 0.0
        return [Piece(known, offset=offset, flat="_shexp" in known and layer == "shared_expert_gate")]

    def _experts(self, name: str) -> list[Piece]:
        """Name the tensors [experts, out, in] of all experts of a layer."""
        layer = next(part for part in name.split(".") if part.isdecimal())
        if name.endswith("down_proj"):
            return [Piece(f"blk.{layer}.ffn_down_exps.weight")]
        return [
            Piece(f"blk.{layer}.ffn_gate_exps.weight", partial(_half, which=0)),
            Piece(f"blk.{layer}.ffn_up_exps.weight", partial(_half, which=1)),
        ]


def learned(names: Iterable[str]) -> list[str]:
    """Return the names of tensors that belong into a file, without those that a model computes from its config."""
    return [name for name in names if not name.endswith(_BUFFERS)]


def interleaved(tensor: Tensor, heads: int) -> Tensor:
    """Order the rows of each head as pairs: transformers rotates rows i and i + half of a head, llama.cpp 2i and 2i+1.

    `tensor`: [heads * head_dim] or [heads * head_dim, n].
    """
    size = tensor.shape[0] // heads
    halves = tensor.reshape(heads, 2, size // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def _half(tensor: Tensor, which: int) -> Tensor:
    return tensor.chunk(2, dim=-2)[which]


def check_complete(written: Iterable[str], config: Any) -> None:
    """Raise UserError if a layer of a model has no tensors."""
    layers = {name.split(".")[1] for name in written if name.startswith("blk.")}
    if missing := [str(at) for at in range(config.num_hidden_layers) if str(at) not in layers]:
        raise UserError(f"the model's layer {missing[0]} has no tensors that can be written")
