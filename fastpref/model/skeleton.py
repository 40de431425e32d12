"""A model made from its config.json alone: fake tensors with the shapes and dtypes of a loaded one, without memory."""

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.quantizers import AutoHfQuantizer

from fastpref.config import Config
from fastpref.model.adapters.placed import BASE_ALONE, ReferenceAdapters, place_adapters
from fastpref.model.experts.bits import unfilled
from fastpref.model.experts.quantizer import bits_of
from fastpref.model.freeze import freeze
from fastpref.model.liger import take_kernels
from fastpref.model.new_tokens import make_room
from fastpref.model.packed import bare_experts, of_bitsandbytes, own_quantization, packing_of, saved_by_packing
from fastpref.model.quantize import keep_weights_as_loaded, quantization_config

_BLOCK = 64  # weights per scale, as in bitsandbytes
_SCALES = 256  # scales per scale of scales, as in bitsandbytes


@dataclass(frozen=True)
class Skeleton:
    """A model without weights."""

    model: PreTrainedModel
    wrapped: PreTrainedModel | PeftModel
    reference: ReferenceAdapters = BASE_ALONE
    packed: int = 0  # bytes by which its weights are larger than those of a checkpoint that is stored quantised
    bare_experts: int = 0  # bytes of experts that stay as they are in a quantised model


def skeleton(config: Config, architecture: PretrainedConfig, dtype: torch.dtype, *, kernels: bool = False) -> Skeleton:
    """Make the model that `load_model` would load, on the meta device, quantised and with adapters.

    With `kernels` it also has liger's kernels.
    """
    architecture = copy.deepcopy(architecture)  # quantising changes it
    trust = config.model.trust_remote_code
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(architecture, dtype=dtype, trust_remote_code=trust)
        make_room(config, model)
        packed, experts = 0, 0
        own = own_quantization(architecture)  # has precedence over the config's, as in transformers
        if own is not None and not of_bitsandbytes(own):
            if (packing := packing_of(own)) is not None:
                packed = saved_by_packing(model, packing)
        elif (quantization := own or quantization_config(config.model.quantization, dtype)) is not None:
            # transformers' quantizer decides which layers to quantise.
            quantizer: Any = AutoHfQuantizer.from_config(quantization, pre_quantized=own is not None)
            quantizer.preprocess_model(model=model, dtype=dtype, device_map={"": "cpu"})
            quantizer.postprocess_model(model)
            experts = bare_experts(model)
        keep_weights_as_loaded(model)
        model.config.use_cache = False
        if kernels:
            take_kernels(model)
        _let_dora_dequantise(model)
        freeze(config, model)
        placed = place_adapters(config, model.eval(), weights=False)
        return Skeleton(model, placed.wrapped, placed.reference, packed, experts)


def _let_dora_dequantise(model: nn.Module) -> None:
    """Give modules their own `dequantize` for DoRA, which PEFT calls on a module that has W_q, as HQQ's have."""
    for module in model.modules():
        if isinstance(module, Linear4bit | Linear8bitLt):
            vars(module).update(W_q=module.weight.data, dequantize=partial(_dequantised, module))


def _dequantised(module: Linear4bit | Linear8bitLt) -> nn.Parameter:
    dtype = module.compute_dtype if isinstance(module, Linear4bit) else torch.float32
    weight = torch.empty((module.out_features, module.in_features), dtype=dtype, device=module.weight.device)
    return nn.Parameter(weight, requires_grad=False)


def materialise(model: PreTrainedModel) -> None:
    """Replace the meta tensors by fake CPU tensors of the active FakeTensorMode. Shared parameters stay shared."""
    fakes: dict[int, Any] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in fakes:
                fakes[id(parameter)] = parameter, _parameter(module, name, parameter)  # kept, so that ids stay unique
            module._parameters[name] = fakes[id(parameter)][1]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _parameter(module: nn.Module, name: str, parameter: Tensor) -> nn.Parameter:
    if (bits := bits_of(module, name)) is not None:
        return unfilled(parameter.shape, parameter.dtype, bits, transposed=cast(Any, module).is_transposed)
    if name == "weight" and isinstance(module, Linear4bit):
        return _four_bits(module, parameter)
    if name == "weight" and isinstance(module, Linear8bitLt):
        return _eight_bits(module)
    return nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype), requires_grad=parameter.requires_grad)


def _four_bits(module: Linear4bit, parameter: Any) -> nn.Parameter:
    """Make a weight like Params4bit: two numbers per byte, and scales in float32 or in 8 bits with their own scales."""
    count = module.in_features * module.out_features
    scales = -(-count // _BLOCK)
    weight: Any = nn.Parameter(torch.empty((-(-count // 2), 1), dtype=torch.uint8), requires_grad=False)
    nested: dict[str, Any] = {}
    if parameter.compress_statistics:
        nested["offset"] = torch.empty(())
        nested["state2"] = QuantState(
            absmax=torch.empty(-(-scales // _SCALES)), code=torch.empty(256), blocksize=_SCALES, dtype=torch.float32
        )
    weight.quant_state = QuantState(
        absmax=torch.empty(scales, dtype=torch.uint8 if nested else torch.float32),
        shape=torch.Size((module.out_features, module.in_features)),
        code=torch.empty(16),
        blocksize=_BLOCK,
        quant_type=parameter.quant_type,
        dtype=module.compute_dtype,
        **nested,
    )
    weight.compress_statistics, weight.quant_type = parameter.compress_statistics, parameter.quant_type
    weight.quant_storage, weight.blocksize, weight.bnb_quantized = torch.uint8, _BLOCK, True
    return weight


def _eight_bits(module: Linear8bitLt) -> nn.Parameter:
    """Make a weight like Int8Params: one byte per number, and one scale per row."""
    shape = (module.out_features, module.in_features)
    weight: Any = nn.Parameter(torch.empty(shape, dtype=torch.int8), requires_grad=False)
    module.state.threshold = 0.0  # which columns are outliers depends on numbers; they are few
    weight.CB, weight.SCB, weight.has_fp16_weights = weight.data, torch.empty(module.out_features), False
    return weight
