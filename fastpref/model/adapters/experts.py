"""LoRA on fused experts, by PEFT's `target_parameters`, computed on the tokens that each expert has.

PEFT wraps the module of the experts once for each adapted parameter, and replaces the parameters during a forward pass
by their sums with scaling · B·A. Here the outermost wrapper computes the experts with all adapters. PEFT's own code
still computes merged adapters, and experts that are not of transformers' common kind.
"""

from types import MethodType
from typing import Any

from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from fastpref.errors import UserError
from fastpref.model.experts.compute import LowRank, compute
from fastpref.model.experts.kinds import is_fused_experts, shape_of, weight_names


def fuse_expert_lora(model: nn.Module) -> None:
    """Give the outermost wrapper of each module of fused experts the forward method of this module."""
    wrappers = [module for module in model.modules() if isinstance(module, ParamWrapper)]
    inner = {id(wrapper.base_layer) for wrapper in wrappers}
    for wrapper in wrappers:
        base: Any = wrapper.get_base_layer()
        if wrapper.num_experts != shape_of(wrapper.get_param())[0] and len(shape_of(wrapper.get_param())) == 3:
            raise UserError(
                "lora.target: this version of PEFT cannot adapt experts in few bits; install PEFT 0.21.2 or newer, or "
                "leave the experts out"
            )
        if id(wrapper) in inner or "forward" in vars(wrapper) or not is_fused_experts(base):
            continue
        if all(part.parameter_name in weight_names(base) for part in _chain(wrapper)):
            wrapper.forward = MethodType(_forward, wrapper)


def unfuse_expert_lora(model: nn.Module) -> None:
    """Undo `fuse_expert_lora`, except on weights in few bits, which PEFT's own code cannot read."""
    for module in model.modules():
        if getattr(vars(module).get("forward"), "__func__", None) is _forward and not _in_few_bits(module):
            del module.forward


def _in_few_bits(wrapper: Any) -> bool:
    return any(
        getattr(parameter, "quant_state", None) is not None for parameter in wrapper.get_base_layer().parameters()
    )


def _chain(wrapper: Any) -> list[Any]:
    """Return a wrapper and those inside it."""
    chain = [wrapper]
    while isinstance(chain[-1].base_layer, ParamWrapper):
        chain.append(chain[-1].base_layer)
    return chain


def _forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
    base = self.get_base_layer()
    chain = _chain(self)
    if kwargs or len(args) != 3 or any(part.merged for part in chain) or base._forward_hooks or base._forward_pre_hooks:
        return type(self).forward(self, *args, **kwargs)
    adapters = {part.parameter_name: _adapters(part) for part in chain}
    return compute(base, *args, adapters) if any(adapters.values()) else base(*args)


def _adapters(wrapper: Any) -> list[LowRank]:
    if wrapper.disable_adapters:
        return []
    return [_low_rank(wrapper, name) for name in wrapper.active_adapters if name in wrapper.lora_A]


def _low_rank(wrapper: Any, name: str) -> LowRank:
    """Return an adapter of a wrapper, in which A is [experts · r, in] and B is [out, r · experts]."""
    a, b, count = wrapper.lora_A[name].weight, wrapper.lora_B[name].weight, wrapper.num_experts
    own = b.reshape(b.shape[0], -1, count).permute(2, 0, 1)
    return LowRank(a.reshape(count, -1, a.shape[-1]), own, wrapper.scaling[name])
