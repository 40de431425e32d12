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
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_GATED_MLP = ("down_proj", "act_fn", "gate_proj", "up_proj")  # the names of down(act(gate(x)) * up(x)), in code's order
_LIGERS = {"LigerSwiGLUMLP.forward": "LigerSiLUMulFunction", "LigerGEGLUMLP.forward": "LigerGELUMulFunction"}


def fuse_lora(model: nn.Module) -> None:
    """Give a model's LoRA layers, and the gated MLPs that end in one, the forward of this module."""
    for module in model.modules():
        product = _gated_product(module)
        if product is not None:
            module.forward = _GatedMLP(module, product, vars(module).get("forward"))
        elif _is_lora_linear(module) and "forward" not in vars(module):
            module.forward = MethodType(_forward, module)


def unfuse_lora(model: nn.Module) -> None:
    """Give them the forward back that they had."""
    for module in model.modules():
        forward = vars(module).get("forward")
        before = forward.before if isinstance(forward, _GatedMLP) else None
        if before is not None:
            module.forward = before
        elif isinstance(forward, _GatedMLP) or getattr(forward, "__func__", None) is _forward:
            del module.forward


def _is_lora_linear(module: nn.Module) -> bool:
    return isinstance(module, LoraLayer) and isinstance(module, nn.Module) and _base_fits(module.base_layer)


def _base_fits(base: Any) -> bool:
    return type(base) is nn.Linear or isinstance(base, Linear4bit)


def _forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    adapter = None if args or kwargs else _adapter(self, x)
    if adapter is None:
        return type(self).forward(self, x, *args, **kwargs)
    flat = x.to(adapter.dtype).reshape(-1, x.shape[-1])
    out: Any = _Adapted.apply(flat, *adapter.tensors(), adapter)
    return out.view(*x.shape[:-1], -1)


# --- gated MLPs ------------------------------------------------------------------------------------------------------


class Product(Protocol):
    """act(gate) · up"""

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor: ...

    def again(self, gate: Tensor, up: Tensor) -> tuple[Tensor, Callable[[Tensor], Any]]:
        """The product, and from the gradient by it those by gate and up. Both are called once, and may write to what
        they are given."""
        ...


@dataclass(frozen=True)
class _Plain:
    """By an activation of torch, in as few new tensors as can be."""

    act: Callable[[Tensor], Tensor]

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        activated = self.act(gate)
        if torch.is_grad_enabled() or activated is gate:
            return activated * up
        return activated.mul_(up)

    def again(self, gate: Tensor, up: Tensor) -> tuple[Tensor, Callable[[Tensor], Any]]:
        with torch.enable_grad():
            leaf = gate.detach().requires_grad_()
            activated = self.act(leaf)
        product = activated.detach() * up

        def back(grad: Tensor) -> tuple[Tensor, Tensor]:
            (by_gate,) = torch.autograd.grad(activated, leaf, torch.mul(grad, up, out=product))
            return by_gate, grad.mul_(activated.detach())

        return product, back


@dataclass(frozen=True)
class _Liger:
    """By a kernel of liger-kernel's, which overwrites gate and up with their gradients."""

    function: type[torch.autograd.Function]

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.function.apply(gate, up)  # pyright: ignore[reportReturnType]

    def again(self, gate: Tensor, up: Tensor) -> tuple[Tensor, Callable[[Tensor], Any]]:
        leaves = gate.detach().requires_grad_(), up.detach().requires_grad_()
        with torch.enable_grad():
            product: Any = self.function.apply(*leaves)
        return product.detach(), lambda grad: torch.autograd.grad(product, leaves, grad)


def _gated_product(module: nn.Module) -> Product | None:
    """The product of an MLP whose code is down_proj(act_fn(gate_proj(x)) * up_proj(x)), if that ends in LoRA."""
    last, others = getattr(module, "down_proj", None), _GATED_MLP[2:]
    if (
        not isinstance(last, nn.Module)
        or not _is_lora_linear(last)
        or not all(hasattr(module, name) for name in others)
    ):
        return None
    if "forward" in vars(module):
        return _ligers(vars(module)["forward"])
    code = getattr(type(module).forward, "__code__", None)
    activation = getattr(module, "act_fn", None)
    if code is None or code.co_names != _GATED_MLP or activation is None or getattr(activation, "inplace", False):
        return None
    trained = isinstance(activation, nn.Module) and any(True for _ in activation.parameters())
    return None if trained else _Plain(activation)


def _ligers(forward: Any) -> Product | None:
    """The product of a forward that liger-kernel has given a module."""
    function = getattr(forward, "__func__", forward)
    name = _LIGERS.get(getattr(function, "__qualname__", ""))
    if name is None or not function.__module__.startswith("liger_kernel."):
        return None
    from liger_kernel import ops

    return _Liger(getattr(ops, name))


@dataclass(eq=False)
class _GatedMLP:
    """The forward of an MLP."""

    mlp: Any
    product: Product
    before: Any  # a forward of the module's own, or None

    def __call__(self, x: Tensor) -> Tensor:
        mlp = self.mlp
        gate, up = mlp.gate_proj(x), mlp.up_proj(x)
        adapter = None if _hooked(mlp.down_proj) else _adapter(mlp.down_proj, gate)
        if adapter is None or gate.dtype != adapter.dtype or up.dtype != adapter.dtype:
            return mlp.down_proj(self.product(gate, up))
        width = gate.shape[-1]
        inner = gate.reshape(-1, width), up.reshape(-1, width)
        out: Any = _GatedAdapted.apply(*inner, *adapter.tensors(), adapter, self.product)
        return out.view(*x.shape[:-1], -1)


# --- one adapter -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Adapter:
    """A frozen layer and its one adapter. Kept for the backward pass: no tensors of its own."""

    layer: Any
    name: str
    dtype: torch.dtype  # in which both are computed

    @property
    def base(self) -> Any:
        """nn.Linear or Linear4bit"""
        return self.layer.base_layer

    @property
    def scaling(self) -> float:
        return self.layer.scaling[self.name]

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """The layer's weight, A [r, in] and B [out, r]."""
        a, b = self.layer.lora_A[self.name].weight, self.layer.lora_B[self.name].weight
        return self.base.weight, a.to(self.dtype), b.to(self.dtype)

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
    if not _computes_in(base, dtype):
        return None
    if layer.lora_A[name].weight.dtype != dtype and not torch.is_autocast_enabled(kind):
        return None  # PEFT computes in the adapter's
    return _Adapter(layer, name, dtype)


def _plain(module: nn.Module) -> bool:
    """Nothing but its weight is needed of it: no hook, of accelerate's offloading for one, has to run."""
    return "forward" not in vars(module) and not _hooked(module)


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


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
        product: Product,
    ) -> Tensor:
        x = product(gate, up)
        low = adapter.low_rank(x, a)
        ctx.save_for_backward(gate, up, low, weight, a, b)
        ctx.adapter, ctx.product = adapter, product
        return adapter.base(x).addmm_(low, b.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads  # [N, out]
        gate, up, low, weight, a, b = ctx.saved_tensors
        needs = ctx.needs_input_grad
        d_low, d_x = _back(grad, weight, a, b, ctx.adapter, through=needs[0] or needs[1])
        d_b = grad.t() @ low if needs[4] else None
        x, back = ctx.product.again(gate, up)
        d_a = d_low.t() @ x if needs[3] else None
        d_gate, d_up = (None, None) if d_x is None else back(d_x)
        return d_gate, d_up, None, d_a, d_b, None, None


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
