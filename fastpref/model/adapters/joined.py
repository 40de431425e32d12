"""A stack of two adapters as one: what a run with `lora.stack` saves.

The sum of two low-rank products is a low-rank product of their ranks together: with A = [A₁; A₂] and B = [s₁B₁, s₂B₂],
B·A = s₁B₁A₁ + s₂B₂A₂. So the result is a plain LoRA adapter of the base model, which every program that reads PEFT's
files computes rightly, and nothing of the old adapter is needed beside it. Layers that only one of the two adapts have
zeros in the other's place, so that one rank holds for all.
"""

from copy import deepcopy
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor

from fastpref.model.adapters.agreement import adapted_parts
from fastpref.model.adapters.switch import BELOW, POLICY

_SIDES = {".lora_A.weight": "a", ".lora_B.weight": "b", ".lora_embedding_A": "a", ".lora_embedding_B": "b"}


def is_stacked(wrapped: Any) -> bool:
    """Return whether a model's trained adapter is stacked on another."""
    return BELOW in getattr(wrapped, "peft_config", {})


def joined_settings(wrapped: Any) -> peft.LoraConfig:
    """Return PEFT's settings of the one adapter."""
    settings, below = deepcopy(wrapped.peft_config[POLICY]), wrapped.peft_config[BELOW]
    rank = sum(_ranks(wrapped).values())
    parts = [adapted_parts(wrapped, name) for name in (BELOW, POLICY)]
    settings.r = settings.lora_alpha = rank  # a scaling of 1, which the weights have in them
    settings.use_rslora, settings.rank_pattern, settings.alpha_pattern = False, {}, {}
    settings.lora_dropout, settings.exclude_modules = 0.0, None
    settings.layers_to_transform = settings.layers_pattern = None
    settings.init_lora_weights = True
    settings.target_modules = set().union(*(part.modules for part in parts))
    settings.target_parameters = sorted(set().union(*(part.parameters for part in parts))) or None
    settings.modules_to_save = sorted({*(below.modules_to_save or ()), *(settings.modules_to_save or ())}) or None
    settings.inference_mode = True
    return settings


@torch.no_grad()
def joined_weights(wrapped: Any) -> dict[str, Tensor]:
    """Return the weights of the one adapter on the CPU, under the names with which PEFT saves it."""
    ranks = _ranks(wrapped)
    own: dict[str, Any] = {
        name: peft.get_peft_model_state_dict(wrapped, adapter_name=name, save_embedding_layers=False) for name in ranks
    }
    joined: dict[str, Tensor] = {}
    for key in dict.fromkeys([*own[BELOW], *own[POLICY]]):
        suffix = next((suffix for suffix in _SIDES if key.endswith(suffix)), None)
        if suffix is None:  # a module in full, which the new adapter has last
            joined[key] = own[POLICY].get(key, own[BELOW].get(key)).cpu()
            continue
        layer = wrapped.get_submodule(key.removesuffix(suffix))
        parts = [_part(layer, name, own[name].get(key), _SIDES[suffix], ranks[name]) for name in (BELOW, POLICY)]
        given = next(part for part in parts if part is not None)
        axis = _axis(layer, _SIDES[suffix])
        filled = [
            given.new_zeros([rank if at == axis else size for at, size in enumerate(given.shape)])
            if part is None
            else part
            for part, rank in zip(parts, (ranks[BELOW], ranks[POLICY]))
        ]
        joined[key] = _flat(layer, torch.cat(filled, dim=axis), _SIDES[suffix]).contiguous().cpu()
    return joined


def _ranks(wrapped: Any) -> dict[str, int]:
    """Return the largest rank of each of the two adapters."""
    layers = [module for module in wrapped.modules() if isinstance(module, LoraLayer)]
    return {name: max(layer.r[name] for layer in layers if name in layer.r) for name in (BELOW, POLICY)}


def _part(layer: Any, name: str, weight: Any, side: str, rank: int) -> Tensor | None:
    """Return one side of an adapter in float32, with its scaling in B, and zeros up to `rank`."""
    if weight is None:
        return None
    weight = weight.float()
    if side == "b":
        weight = weight * layer.scaling[name]
    if (experts := _experts(layer)) > 1:  # as PEFT reads them: A of each expert after another, B the other way round
        own = layer.r[name]
        weight = weight.view(experts, own, -1) if side == "a" else weight.view(-1, own, experts)
    axis = _axis(layer, side)
    missing = rank - weight.shape[axis]
    zeros = weight.new_zeros([missing if at == axis else size for at, size in enumerate(weight.shape)])
    return torch.cat([weight, zeros], dim=axis)


def _axis(layer: Any, side: str) -> int:
    """Return the dimension of the rank."""
    return 1 if side == "b" or _experts(layer) > 1 else 0


def _flat(layer: Any, weight: Tensor, side: str) -> Tensor:
    if _experts(layer) == 1:
        return weight
    return weight.reshape(-1, weight.shape[-1]) if side == "a" else weight.reshape(weight.shape[0], -1)


def _experts(layer: Any) -> int:
    return layer.num_experts if isinstance(layer, ParamWrapper) else 1
