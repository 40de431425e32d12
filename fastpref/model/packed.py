"""Quantised checkpoints: their format, by the `quantization_config` of a config.json, and their size in bytes.

bitsandbytes' own modules make its weights (`skeleton.py`). Other methods need packages and GPUs that this machine may
lack, so the size of their weights is computed from bits, groups and scales, as each format defines them:
GPTQ arXiv 2210.17323, AWQ 2306.00978, FP8 by blocks 2412.19437, MXFP4 of the OCP's microscaling formats.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

from fastpref.model.experts.quantizer import bits_of

_BITSANDBYTES = ("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit")
_GROUP = {"mxfp4": 32, "mxfp8": 32, "nvfp4": 16, "gptq": 128, "awq": 128, "auto-round": 128, "hqq": 64}
_SCALE_BYTES = {"mxfp4": 1, "mxfp8": 1, "nvfp4": 1, "fp8": 4, "fbgemm_fp8": 4}  # others: two
_BITS = {"mxfp4": 4.0, "nvfp4": 4.0, "fp_quant": 4.0, "mxfp8": 8.0, "fp8": 8.0, "fbgemm_fp8": 8.0, "eetq": 8.0,
         "bitnet": 2.0, "aqlm": 2.0, "vptq": 2.0, "spqr": 4.0, "higgs": 4.0}  # fmt: skip
_NAMED_BITS = {"int8": 8.0, "float8": 8.0, "int4": 4.0, "int2": 2.0, "nf4": 4.0}  # quanto's "weights"
# What bare_experts counts, in words.
EXPERTS_LEFT = (
    "experts that are not quantised: of experts in bare tensors only those are that the files hold whole and that "
    "transformers computes by its common function"
)
_EXPERTS = re.compile(r"\.experts\.")  # in the names of a mixture's experts that are bare tensors


@dataclass(frozen=True)
class Packing:
    """The format in which the weights of linear layers are stored."""

    method: str
    bits: float  # per weight
    group: int | None = None  # number of weights of a row that share a scale; None: all of them
    block: tuple[int, int] | None = None  # or rows and columns of a block that shares a scale
    scale_bytes: int = 2
    zeros: bool = False  # whether each scale has a zero point, with as many bits as a weight
    order: bool = False  # whether each column has a 32-bit group number (GPTQ)
    left: tuple[str, ...] = ()  # modules that keep their dtype

    def bytes_of(self, rows: int, columns: int) -> int:
        """Return the bytes of a weight [rows, columns], which is [out, in]."""
        if self.block is not None:
            scales = ceil(rows / self.block[0]) * ceil(columns / self.block[1])
        else:
            scales = rows * ceil(columns / (self.group or columns))
        beside = self.scale_bytes + (self.bits / 8 if self.zeros else 0)
        return ceil(rows * columns * self.bits / 8 + scales * beside) + (4 * columns if self.order else 0)


def own_quantization(architecture: PretrainedConfig) -> dict[str, Any] | None:
    """Return the `quantization_config` of a quantised checkpoint's config.json, or None."""
    own = getattr(architecture, "quantization_config", None)
    if own is None:
        own = getattr(architecture.get_text_config(), "quantization_config", None)
    if own is None:
        return None
    return dict(own) if isinstance(own, Mapping) else own.to_dict()


def of_bitsandbytes(own: Mapping[str, Any]) -> bool:
    return _method(own) in _BITSANDBYTES


def lies_quantised(architecture: PretrainedConfig) -> str | None:
    """Return the quantization of a checkpoint in words, such as "bitsandbytes, nf4" or "gptq, 4 bits", or None."""
    own = own_quantization(architecture)
    if own is None:
        return None
    if of_bitsandbytes(own):
        four = own.get("load_in_4bit") or own.get("_load_in_4bit")
        return f"bitsandbytes, {own.get('bnb_4bit_quant_type', 'fp4') if four else 'int8'}"
    if (packing := packing_of(own)) is None:
        return f"{_method(own)}, which is not known here and counts as if it were not"
    return f"{packing.method}, {packing.bits:g} bits"


def packing_of(own: Mapping[str, Any]) -> Packing | None:
    """Return the format of a `quantization_config` other than bitsandbytes', or None if its bits are not known."""
    method = _method(own)
    if method == "compressed-tensors":
        return _compressed(own)
    keys = ("bits", "w_bit", "nbits", "weight_bits")
    bits = next((own[key] for key in keys if isinstance(own.get(key), int | float)), None)
    bits = bits or _BITS.get(method) or _NAMED_BITS.get(str(own.get("weights")))
    if method == "hqq":
        settings = (own.get("quant_config") or {}).get("weight_quant_params") or {}
        bits = settings.get("nbits", bits)
    if bits is None:
        return None
    size = next((own[k] for k in ("group_size", "q_group_size") if isinstance(own.get(k), int)), _GROUP.get(method))
    block = own.get("weight_block_size")
    return Packing(
        method,
        float(bits),
        group=size if size and size > 0 else None,
        block=(int(block[0]), int(block[1])) if block else None,
        scale_bytes=_SCALE_BYTES.get(method, 2),
        zeros=method in ("gptq", "awq", "auto-round", "hqq") and own.get("zero_point", True) is not False,
        order=method == "gptq",
        left=_left_out(own),
    )


def saved_by_packing(model: PreTrainedModel, packing: Packing) -> int:
    """Return how many bytes fewer than in the model's dtype the weights take that the checkpoint packs."""
    weights = list(_weights(model, packing))
    packed = sum(weight[..., 0, 0].numel() * packing.bytes_of(*weight.shape[-2:]) for weight in weights)
    return sum(weight.nbytes for weight in weights) - packed


def bare_experts(model: PreTrainedModel) -> int:
    """Return the bytes of experts that lie in bare tensors and stay as they are in a quantised model."""
    return sum(
        parameter.nbytes
        for name, module in model.named_modules()
        if "expert" in f"{name} {type(module).__name__}".lower() and not isinstance(module, nn.Linear | Conv1D)
        for own, parameter in module.named_parameters(recurse=False)
        if parameter.dim() > 1 and parameter.is_floating_point() and "bias" not in own and bits_of(module, own) is None
    )


def _method(own: Mapping[str, Any]) -> str:
    method = own.get("quant_method", "bitsandbytes")  # bitsandbytes' first configs did not name it
    return str(getattr(method, "value", method))


def _weights(model: PreTrainedModel, packing: Packing) -> Iterator[Tensor]:
    """Yield the weights of all linear layers except the head, and of experts that are bare tensors."""
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if module is head or not should_convert_module(name, list(packing.left) or None):
            continue
        if isinstance(module, nn.Linear | Conv1D):
            yield module.weight
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 3 and _EXPERTS.search(f".{name}.{own}"):
                yield parameter


def _left_out(own: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the patterns of modules that are not quantised."""
    keys = ("modules_to_not_convert", "ignore", "ignored_layers", "skip_modules", "llm_int8_skip_modules")
    named = [name for key in keys for name in (own.get(key) or ()) if isinstance(name, str)]
    return tuple(name.removeprefix("re:") for name in named)


def _compressed(own: Mapping[str, Any]) -> Packing | None:
    """Return the format of the first group of layers: most checkpoints with several groups use the same bits in all."""
    groups = own.get("config_groups") or {}
    weights = next((g.get("weights") for g in groups.values() if isinstance(g, Mapping) and g.get("weights")), None)
    if weights is None or not isinstance(weights.get("num_bits"), int | float):
        return None
    strategy, size, block = weights.get("strategy"), weights.get("group_size"), weights.get("block_structure")
    return Packing(
        "compressed-tensors",
        float(weights["num_bits"]),
        group=size if strategy in ("group", "tensor_group") and size and size > 0 else None,
        block=(int(block[0]), int(block[1])) if block else (1 << 62, 1 << 62) if strategy == "tensor" else None,
        zeros=weights.get("symmetric") is False,
        left=_left_out(own),
    )
