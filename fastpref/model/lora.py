"""LoRA layers (arXiv 2106.09685) that cost little beside the layer they adapt.

PEFT computes base(x) + scaling · B(A(x)) in steps of which each keeps or moves a tensor of the layer's width: two
products, their scaling, a sum, and the same again backwards. Here the low-rank product is added inside the matrix
product, forwards and backwards. Where the layer ends a gated MLP, down(act(gate) · up), only gate and up are kept: the
activation and the product are made again in the backward pass.

PEFT's own code goes on to compute what is asked for otherwise: dropout, DoRA, biases of adapters, several adapters,
merged or disabled ones, layers that are neither plain nor in 4 bits.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_GATED_MLP = ("down_proj", "act_fn", "gate_proj", "up_proj")  # the names of down(act(gate(x)) * up(x)), in code's order


def fuse_lora(model: nn.Module) -> None:
    """Give a model's LoRA layers, and the gated MLPs that end in one, the forward of this module."""
    for module in model.modules():
        if "forward" in vars(module):
            continue  # somebody else's
        if _is_lora_linear(module):
            module.forward = MethodType(_forward, module)
        elif _is_gated_mlp(module):
            module.forward = MethodType(_gated_forward, module)


def unfuse_lora(model: nn.Module) -> None:
    """Give them their own forward back."""
    for module in model.modules():
        forward = vars(module).get("forward")
        if isinstance(forward, MethodType) and forward.__func__ in (_forward, _gated_forward):
            del module.forward


def _is_lora_linear(module: nn.Module) -> bool:
    return isinstance(module, LoraLayer) and isinstance(module, nn.Module) and _base_fits(module.base_layer)


def _base_fits(base: Any) -> bool:
    return type(base) is nn.Linear or isinstance(base, Linear4bit)


def _is_gated_mlp(module: nn.Module) -> bool:
    """Whether its code is down_proj(act_fn(gate_proj(x)) * up_proj(x)), as most models' is, and ends in LoRA."""
    code = getattr(type(module).forward, "__code__", None)
    if code is None or code.co_names != _GATED_MLP or not all(hasattr(module, name) for name in _GATED_MLP):
        return False
    activation: Any = module.act_fn
    trained = isinstance(activation, nn.Module) and any(True for _ in activation.parameters())
    pure = not trained and not getattr(activation, "inplace", False)
    return pure and _is_lora_linear(module.get_submodule("down_proj"))


def _forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    adapter = None if args or kwargs else _adapter(self, x)
    if adapter is None:
        return type(self).forward(self, x, *args, **kwargs)
    flat = x.to(adapter.dtype).reshape(-1, x.shape[-1])
    out: Any = _Adapted.apply(flat, *adapter.tensors, adapter)
    return out.view(*x.shape[:-1], -1)


def _gated_forward(self: Any, x: Tensor) -> Tensor:
    gate, up = self.gate_proj(x), self.up_proj(x)
    adapter = _adapter(self.down_proj, gate)
    if adapter is None or gate.dtype != adapter.dtype or up.dtype != adapter.dtype:
        return self.down_proj(self.act_fn(gate) * up)
    width = gate.shape[-1]
    out: Any = _GatedAdapted.apply(
        gate.reshape(-1, width), up.reshape(-1, width), *adapter.tensors, adapter, self.act_fn
    )
    return out.view(*x.shape[:-1], -1)


# --- one adapter -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Adapter:
    """A frozen layer and its one adapter, in the dtype in which both are computed."""

    base: Any  # nn.Linear or Linear4bit
    a: Tensor  # [r, in]
    b: Tensor  # [out, r]
    scaling: float
    dtype: torch.dtype

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.base.weight, self.a, self.b

    def low_rank(
        self,
        x: Tensor,  # [N, in]
        a: Tensor,
    ) -> Tensor:
        """[N, r]"""
        return F.linear(x, a).mul_(self.scaling)

    def dense(self, weight: Tensor) -> Tensor:
        """The layer's weight [out, in]."""
        if type(self.base) is nn.Linear:
            return weight
        return dequantize_4bit(weight.data, self.base.weight.quant_state).to(self.dtype)


def _adapter(layer: Any, x: Tensor) -> _Adapter | None:
    """What a LoRA layer computes for x, or None if that is not a frozen layer with one plain adapter."""
    if not _is_lora_linear(layer):
        return None  # the adapters were taken out meanwhile
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return None
    (name,) = layer.active_adapters
    if name not in layer.lora_A or name in layer.lora_variant or layer.lora_B[name].bias is not None:
        return None
    if layer.training and not isinstance(layer.lora_dropout[name], nn.Identity):
        return None
    if not all(map(_plain, (layer.base_layer, layer.lora_A[name], layer.lora_B[name]))):
        return None
    base, kind = layer.base_layer, x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    if not _computes_in(base, dtype) or (a.dtype != dtype and not torch.is_autocast_enabled(kind)):
        return None
    return _Adapter(base, a.to(dtype), b.to(dtype), layer.scaling[name], dtype)


def _plain(module: nn.Module) -> bool:
    """Nothing but its weight is needed of it: no hook, of accelerate's offloading for one, has to run."""
    return "forward" not in vars(module) and not module._forward_hooks and not module._forward_pre_hooks


def _computes_in(base: Any, dtype: torch.dtype) -> bool:
    """Whether a frozen layer's products come out in this dtype."""
    if type(base) is nn.Linear:
        bias = base.bias is None or (base.bias.dtype == dtype and not base.bias.requires_grad)
        return base.weight.dtype == dtype and not base.weight.requires_grad and bias
    repacked = getattr(base.weight.quant_state, "packing_format_for_cpu", False)
    return not repacked and base.bias is None and base.compute_dtype in (None, dtype)


# --- the computation -------------------------------------------------------------------------------------------------


class _Adapted(torch.autograd.Function):
    """base(x) + scaling · B(A(x))"""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [N, in]
        weight: Tensor,  # [out, in], or its 4 bits
        a: Tensor,  # [r, in]
        b: Tensor,  # [out, r]
        adapter: _Adapter,
    ) -> Tensor:
        low = adapter.low_rank(x, a)
        ctx.save_for_backward(x, low, weight, a, b)
        ctx.adapter = adapter
        return adapter.base(x).addmm_(low, b.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads  # [N, out]
        x, low, weight, a, b = ctx.saved_tensors
        d_low, d_x = _back(grad, weight, a, b, ctx.adapter, through=ctx.needs_input_grad[0])
        d_a = d_low.t() @ x if ctx.needs_input_grad[2] else None
        d_b = grad.t() @ low if ctx.needs_input_grad[3] else None
        return d_x, None, d_a, d_b, None


class _GatedAdapted(torch.autograd.Function):
    """base(x) + scaling · B(A(x)) with x = act(gate) · up, which is not kept."""

    @staticmethod
    def forward(
        ctx: Any,
        gate: Tensor,  # [N, in]
        up: Tensor,  # [N, in]
        weight: Tensor,  # [out, in], or its 4 bits
        a: Tensor,  # [r, in]
        b: Tensor,  # [out, r]
        adapter: _Adapter,
        act: Callable[[Tensor], Tensor],
    ) -> Tensor:
        x = _times(act(gate), up, gate)
        low = adapter.low_rank(x, a)
        ctx.save_for_backward(gate, up, low, weight, a, b)
        ctx.adapter, ctx.act = adapter, act
        return adapter.base(x).addmm_(low, b.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads  # [N, out]
        gate, up, low, weight, a, b = ctx.saved_tensors
        needs = ctx.needs_input_grad
        d_low, d_x = _back(grad, weight, a, b, ctx.adapter, through=needs[0] or needs[1])
        d_b = grad.t() @ low if needs[4] else None
        with torch.enable_grad():
            leaf = gate.detach().requires_grad_()
            activated = ctx.act(leaf)
        x = activated.detach() * up
        d_a = d_low.t() @ x if needs[3] else None
        d_gate = d_up = None
        if d_x is not None:
            (d_gate,) = torch.autograd.grad(activated, leaf, torch.mul(d_x, up, out=x))
            d_up = d_x.mul_(activated.detach())
        return d_gate, d_up, None, d_a, d_b, None, None


def _times(activated: Tensor, up: Tensor, gate: Tensor) -> Tensor:
    """Their product, in place unless an activation has returned what it was given."""
    return activated * up if activated.data_ptr() == gate.data_ptr() else activated.mul_(up)


def _back(
    grad: Tensor,  # [N, out]
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    adapter: _Adapter,
    *,
    through: bool,
) -> tuple[Tensor, Tensor | None]:
    """The gradients by what A makes of x, [N, r], and by x, [N, in]."""
    d_low = (grad @ b).mul_(adapter.scaling)
    if not through:
        return d_low, None
    return d_low, (grad @ adapter.dense(weight)).addmm_(d_low, a)
