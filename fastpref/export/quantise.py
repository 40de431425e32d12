"""The types in which tensors are written, and what rounding to each of them may change."""

from collections.abc import Sequence
from dataclasses import dataclass

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from gguf import LlamaFileType
from torch import Tensor

from fastpref.errors import UserError

QUANTS = {
    "f32": (Type.F32, LlamaFileType.ALL_F32),
    "f16": (Type.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (Type.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (Type.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (Type.Q4_0, LlamaFileType.MOSTLY_Q4_0),
}
_LARGEST = {  # magnitude of a weight; q8_0 and q4_0 keep a float16 scale per block of 32
    Type.F16: 65504.0, Type.Q8_0: 65504.0 * 127, Type.Q4_0: 65504.0 * 8,
}  # fmt: skip
_WHOLE = ("ffn_gate_inp", "ffn_gate_inp_shexp", "rope_freqs")  # routers, whose rounding would choose other experts
_ENDS = ("token_embd", "output")


@dataclass(frozen=True)
class Written:
    """How a tensor is written."""

    type: Type
    shape: tuple[int, ...]
    fallback: bool = False  # whether its rows are no multiple of a block, so that it is written in f16

    @property
    def bytes(self) -> int:
        block, size = gguf.GGML_QUANT_SIZES[self.type]
        return int(np.prod(self.shape)) // block * size


def choose(name: str, shape: Sequence[int], quant: str) -> Written:
    """Choose a tensor's type: f32 for vectors, norms and routers, q8_0 for embeddings and head of a q4_0 file."""
    wanted, shape = QUANTS[quant][0], tuple(shape)
    part = name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]
    if len(shape) < 2 or part.endswith("_norm") or part in _WHOLE or not name.endswith(".weight"):
        return Written(Type.F32, shape)
    if wanted is Type.Q4_0 and part in _ENDS:
        wanted = Type.Q8_0
    block = gguf.GGML_QUANT_SIZES[wanted][0]
    return Written(Type.F16, shape, fallback=True) if shape[-1] % block else Written(wanted, shape)


def quantised(name: str, tensor: Tensor, written: Written) -> np.ndarray:
    """Return a float32 tensor in the type in which it is written. Raises UserError for numbers it cannot hold."""
    largest = float(tensor.abs().max()) if tensor.numel() else 0.0
    if not largest <= _LARGEST.get(written.type, torch.finfo(torch.float32).max):
        advice = "the training went wrong" if not np.isfinite(largest) else "try --quant bf16"
        raise UserError(f"{name}: holds {largest:g}, which {written.type.name} cannot; {advice}")
    return gguf.quants.quantize(tensor.contiguous().numpy(), written.type)


def rounding(tensor: np.ndarray, kind: Type) -> np.ndarray:
    """Return the largest error of each number of `tensor` [..., n] if it is written in a type and read back.

    f16 and bf16 have 11 and 8 significant bits, and f16 no number below 2⁻²⁴. The blocks of 32 numbers of q8_0 and q4_0
    have a scale, in float16: the largest magnitude / 127, and / 8 with the sign of that number; a number is rounded to
    a multiple of it, in q4_0 between -8 and 7.
    """
    size = np.abs(tensor)
    if kind is Type.F32:
        return np.zeros_like(size)
    if kind is Type.F16:
        return np.maximum(size * 2.0**-11, 2.0**-25)
    if kind is Type.BF16:
        return size * 2.0**-8
    blocks = size.reshape(*size.shape[:-1], -1, 32).max(axis=-1, keepdims=True)
    steps, share = (127, 0.5) if kind is Type.Q8_0 else (8, 1.0)
    bound = blocks / steps * share + blocks * 2.0**-10 + 2.0**-24 * steps
    return np.broadcast_to(bound, (*size.shape[:-1], size.shape[-1] // 32, 32)).reshape(size.shape)
