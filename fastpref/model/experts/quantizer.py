"""Fused experts in few bits as transformers loads a model: one layer's weights at a time.

transformers' own quantizers for bitsandbytes replace linear layers. These also quantise the parameters of fused
experts, each when its tensors have been read and fused, so that the whole model is never in memory at once.
"""

from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.integrations.bitsandbytes import Bnb4bitQuantize, Bnb8bitQuantize
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module
from transformers.utils.quantization_config import QuantizationMethod

from fastpref.model.experts.bits import Bits, pack
from fastpref.model.experts.compute import forward
from fastpref.model.experts.kinds import fused_experts, weight_names

_BITS = "_fastpref_bits"


def with_experts(settings: BitsAndBytesConfig) -> BitsAndBytesConfig:
    """Return settings with which transformers also quantises fused experts."""
    settings.quant_method = _name("int8" if settings.load_in_8bit else "nf4")  # pyright: ignore[reportAttributeAccessIssue]
    return settings


def bits_of(module: nn.Module, name: str) -> Bits | None:
    """Return the bits in which a module's parameter is loaded if it is one of fused experts, else None."""
    bits = getattr(module, _BITS, None)
    return bits if bits is not None and name in weight_names(module) else None


class _Experts:
    """What is the same for 4 and for 8 bits."""

    bits: Bits

    def _process_model_before_weight_loading(self: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        super()._process_model_before_weight_loading(model, *args, **kwargs)  # pyright: ignore
        for name, experts in fused_experts(model):
            if should_convert_module(name, self.modules_to_not_convert):
                setattr(experts, _BITS, self.bits)
                experts.forward = forward.__get__(experts)

    def param_needs_quantization(self: Any, model: Any, param_name: str, **kwargs: Any) -> bool:
        module, name = get_module_from_name(model, param_name)
        return bits_of(module, name) is not None or super().param_needs_quantization(model, param_name, **kwargs)  # pyright: ignore

    def _process_model_after_weight_loading(self: Any, model: Any, **kwargs: Any) -> Any:
        self.quantization_config.quant_method = QuantizationMethod.BITS_AND_BYTES  # as all other code knows it
        return super()._process_model_after_weight_loading(model, **kwargs)  # pyright: ignore


class _Quantize:
    """What is the same for the operations that quantise a tensor."""

    def convert(self: Any, input_dict: dict[str, Any], model: Any = None, **kwargs: Any) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for name, value in input_dict.items():
            value = value[0] if isinstance(value, list) else value
            module, own = get_module_from_name(model, name)
            bits = bits_of(module, own)
            if bits is None:
                result |= super().convert({name: value}, model=model, **kwargs)  # pyright: ignore
                continue
            wanted = tuple(module._parameters[own].shape)
            if tuple(value.shape) != wanted:
                raise ValueError(
                    f"{name} has the shape {list(value.shape)} in the files and {list(wanted)} in the model"
                )
            with torch.no_grad():
                result[name] = pack(value, bits, transposed=module.is_transposed)
        return result


class _Quantize4(_Quantize, Bnb4bitQuantize):
    pass


class _Quantize8(_Quantize, Bnb8bitQuantize):
    pass


class _Experts4(_Experts, Bnb4BitHfQuantizer):
    bits = "nf4"

    def get_quantize_ops(self) -> Any:
        return _Quantize4(self)


class _Experts8(_Experts, Bnb8BitHfQuantizer):
    bits = "int8"

    def get_quantize_ops(self) -> Any:
        return _Quantize8(self)


def _name(bits: Bits) -> str:
    return f"fastpref_{bits}"


for _kind in (_Experts4, _Experts8):
    AUTO_QUANTIZER_MAPPING[_name(_kind.bits)] = _kind
