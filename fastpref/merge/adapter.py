"""Put an adapter on a model whose own weights take no memory, and merge a tensor with PEFT's arithmetic."""

import warnings
from typing import Any

import peft
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastpref.errors import UserError
from fastpref.model.adapters.token_rows import with_rows
from fastpref.model.adapters.trained import load_adapter, rows_for
from fastpref.model.experts.bits import through_bits
from fastpref.model.new_tokens import grow
from fastpref.run.trained import Trained


def with_adapter(model: PreTrainedModel, trained: Trained) -> None:
    """Put an adapter on a model on the meta device, in place. Raises UserError if it does not fit."""
    grow(model, rows_for(trained.weights), trained.weights)  # before its weights become expanded numbers
    _shrink(model)
    with warnings.catch_warnings(action="ignore"):  # they concern decisions made when the adapter was trained
        wrapped = load_adapter(model, trained.weights)
    settings = wrapped.peft_config["default"]
    if not isinstance(settings, peft.LoraConfig):
        raise UserError(f"{trained.weights}: a {settings.peft_type} adapter; LoRA, rsLoRA and DoRA can be merged")
    if settings.bias != "none" or settings.lora_bias:
        raise UserError(f"{trained.weights}: this adapter has trained biases too, which cannot be merged here")
    if getattr(settings, "ensure_weight_tying", False):
        raise UserError(f"{trained.weights}: ensure_weight_tying cannot be merged here")


def adapted(model: nn.Module) -> dict[str, Any]:
    """Return the PEFT modules that change tensors, by the tensors' names in the model without adapters.

    Raises UserError for a kind of adapter that cannot be merged."""
    parts: dict[str, Any] = {}
    for name, module in model.named_modules():
        owner = ".".join(part for part in name.split(".") if part not in ("base_layer", "original_module"))
        if isinstance(module, ModulesToSaveWrapper):
            copy = module.modules_to_save[module.active_adapters[0]]
            parts |= {f"{owner}.{key}": module for key in copy.state_dict(keep_vars=True)}
        elif isinstance(module, TrainableTokensWrapper):
            if module.token_adapter.tied_adapter is None:  # else the same rows as the embeddings'
                parts[f"{owner}.weight"] = module
        elif isinstance(module, ParamWrapper):
            parts[f"{owner}.{module.parameter_name}"] = module
        elif isinstance(module, LoraLayer):
            parts[f"{owner}.weight"] = module
        elif isinstance(module, BaseTunerLayer) and not isinstance(module, TrainableTokensLayer):
            raise UserError(f"{name} has a {type(module).__name__}, which cannot be merged here")
    return parts


def merged(part: Any, name: str, tensor: Tensor) -> Tensor:
    """Merge a float32 tensor of the model with `part`, one of `adapted`, by PEFT's own arithmetic."""
    if isinstance(part, ModulesToSaveWrapper):
        copy = part.modules_to_save[part.active_adapters[0]].state_dict()
        key = max((key for key in copy if name.endswith(f".{key}")), key=len)
        return copy[key].detach().to(tensor.dtype)
    if isinstance(part, TrainableTokensWrapper):
        return with_rows(part, tensor)
    layer, kind = part.get_base_layer(), name.rpartition(".")[2]
    before = getattr(layer, kind)
    setattr(layer, kind, nn.Parameter(tensor.clone(), requires_grad=False))
    try:
        part.merge()
        return getattr(layer, kind).data
    finally:
        setattr(layer, kind, before)  # restore it, so that the next tensor is merged alone
        part.merged_adapters.clear()


def through_four_bits(weight: Tensor) -> Tensor:
    """Quantise a weight, or each expert's of [experts, ., .], to nf4 with quantised scales, and dequantise it.

    bitsandbytes does both.
    """
    if weight.dim() == 3:
        return through_bits(weight.float(), "nf4").to(weight.dtype)
    packed, state = quantize_4bit(weight.float().contiguous(), quant_type="nf4", compress_statistics=True)
    return dequantize_4bit(packed, state).to(weight.dtype)


def _shrink(model: nn.Module) -> None:
    """Replace each meta weight by one expanded number, as PEFT puts adapters on the device of their layer's weight."""
    shrunk: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                small = torch.zeros((), dtype=weight.dtype).expand(weight.shape)
                module._parameters[name] = shrunk.setdefault(id(weight), nn.Parameter(small, requires_grad=False))
