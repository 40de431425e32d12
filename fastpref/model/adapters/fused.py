"""LoRA layers (arXiv 2106.09685) that add little to the cost of the layer they adapt.

PEFT computes base(x) + scaling · B(A(x)) in several steps: two products, their scaling, a sum, and the same in the
backward pass. Each step stores or copies a tensor of the layer's width. Here the low-rank product is added inside the
matrix product, in both passes. If the layer ends a gated MLP, down(act(gate) · up), only gate and up are stored for
the backward pass, which recomputes the activation and the product. Adapters of experts are in experts.py.

PEFT's own code still computes all other cases: dropout, DoRA, biases of adapters, several adapters, merged or disabled
ones, and layers that are neither nn.Linear nor in 4 bits.
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

from fastpref.model.adapters.experts import fuse_expert_lora, unfuse_expert_lora

_GATED_MLP = ("down_proj", "act_fn", "gate_proj", "up_proj")  # of down(act(gate(x)) * up(x)), in the code's order
_LIGERS = {"LigerSwiGLUMLP.forward": "LigerSiLUMulFunction", "LigerGEGLUMLP.forward": "LigerGELUMulFunction"}


def fuse_lora(model: nn.Module) -> None:
    """Give a model's LoRA layers, and the gated MLPs that end in one, the forward methods of this module."""
    for module in model.modules():
        if (product := _gated_product(module)) is not None:
            module.forward = _GatedMLP(module, product, vars(module).get("forward"))
        elif _is_lora_linear(module) and "forward" not in vars(module):
            module.forward = MethodType(_forward, module)
    fuse_expert_lora(model)


def unfuse_lora(model: nn.Module) -> None:
    """Undo `fuse_lora`."""
    for module in model.modules():
        forward = vars(module).get("forward")
        if isinstance(forward, _GatedMLP) or getattr(forward, "__func__", None) is _forward:
            del module.forward
        if isinstance(forward, _GatedMLP) and forward.before is not None:
            module.forward = forward.before
    unfuse_expert_lora(model)


def _is_lora_linear(module: Any) -> bool:
    base = module.base_layer if isinstance(module, LoraLayer) else None
    return type(base) is nn.Linear or isinstance(base, Linear4bit)


def _forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    adapter = None if args or kwargs else _adapter(self, x)
    if adapter is None:
        return type(self).forward(self, x, *args, **kwargs)
    flat = x.to(adapter.dtype).reshape(-1, x.shape[-1])
    out: Any = _Adapted.apply(flat, *adapter.tensors(), adapter)
    return out.view(*x.shape[:-1], -1)


# --- gated MLPs ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plain:
    """The product act(gate) · up with a torch activation, which allocates as few tensors as possible."""

    act: Callable[[Tensor], Tensor]

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        activated = self.act(gate)
        if torch.is_grad_enabled() or activated is gate:
            return activated * up
        return activated.mul_(up)

    def again(self, gate: Tensor, up: Tensor) -> tuple[Tensor, Callable[[Tensor], Any]]:
        """Return the product, and a function from its gradient to those of gate and up.

        The function is called at most once. It and this method may overwrite their arguments.
        """
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
    """The same by one of liger-kernel's kernels, which overwrites gate and up with their gradients."""

    function: type[torch.autograd.Function]

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.function.apply(gate, up)  # pyright: ignore[reportReturnType]

    def again(self, gate: Tensor, up: Tensor) -> tuple[Tensor, Callable[[Tensor], Any]]:
        leaves = gate.detach().requires_grad_(), up.detach().requires_grad_()
        with torch.enable_grad():
            product: Any = self.function.apply(*leaves)
        return product.detach(), lambda grad: torch.autograd.grad(product, leaves, grad)


_Product = _Plain | _Liger


def _gated_product(module: nn.Module) -> _Product | None:
    """Return the product of an MLP that computes down_proj(act_fn(gate_proj(x)) * up_proj(x)) and ends in LoRA."""
    last = getattr(module, "down_proj", None)
    if not _is_lora_linear(last) or not hasattr(module, "gate_proj") or not hasattr(module, "up_proj"):
        return None
    if "forward" in vars(module):
        return _ligers(vars(module)["forward"])
    code = getattr(type(module).forward, "__code__", None)
    activation = getattr(module, "act_fn", None)
    if code is None or code.co_names != _GATED_MLP or activation is None or getattr(activation, "inplace", False):
        return None
    trained = isinstance(activation, nn.Module) and list(activation.parameters())
    return None if trained else _Plain(activation)


def _ligers(forward: Any) -> _Liger | None:
    """Return the product of an MLP whose forward comes from liger-kernel, or None."""
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
    product: _Product
    before: Any  # the forward that the instance had before, or None

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
    """A frozen layer and its only adapter. It holds no tensors, so it costs no memory until the backward pass."""

    layer: Any
    name: str
    dtype: torch.dtype  # of the computation

    @property
    def base(self) -> Any:
        """The frozen layer, nn.Linear or Linear4bit."""
        return self.layer.base_layer

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the layer's weight [out, in] or its 4 bits, A [r, in] and B [out, r]."""
        a, b = self.layer.lora_A[self.name].weight, self.layer.lora_B[self.name].weight
        return self.base.weight, a.to(self.dtype), b.to(self.dtype)

    def low_rank(self, x: Tensor, a: Tensor) -> Tensor:
        """Return scaling · A(x), [N, r], of x [N, in]."""
        return F.linear(x, a).mul_(self.layer.scaling[self.name])

    def dense(self, weight: Tensor) -> Tensor:
        """Return the layer's weight [out, in], dequantised if it is in 4 bits."""
        if type(self.base) is nn.Linear:
            return weight
        return dequantize_4bit(weight.data, self.base.weight.quant_state).to(self.dtype)


def _adapter(layer: Any, x: Tensor) -> _Adapter | None:
    """Return the adapter of a LoRA layer, or None if it is not a frozen layer with one plain adapter."""
    if not _is_lora_linear(layer):
        return None  # the adapters were removed since
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return None
    (name,) = layer.active_adapters
    if name not in layer.lora_A or name in layer.lora_variant or layer.lora_B[name].bias is not None:
        return None
    if layer.training and not isinstance(layer.lora_dropout[name], nn.Identity):
        return None
    if not all(map(_plain, (layer.base_layer, layer.lora_A[name], layer.lora_B[name]))):
        return None
    autocast = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    if not autocast and next(layer.lora_A[name].parameters()).dtype != dtype:
        return None  # PEFT computes in the adapter's dtype
    return _Adapter(layer, name, dtype) if _computes_in(layer.base_layer, dtype) else None


def _plain(module: nn.Module) -> bool:
    """Return whether only the module's weight matters, and no hook, such as Accelerate's offloading hook, must run."""
    return "forward" not in vars(module) and not _hooked(module)


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _computes_in(base: Any, dtype: torch.dtype) -> bool:
    """Return whether the layer is frozen and its output has this dtype."""
    if type(base) is nn.Linear:
        bias = base.bias is None or (base.bias.dtype == dtype and not base.bias.requires_grad)
        return base.weight.dtype == dtype and not base.weight.requires_grad and bias
    repacked = getattr(base.weight.quant_state, "packing_format_for_cpu", False)
    return not repacked and base.bias is None and base.compute_dtype in (None, dtype)


# --- the computation -------------------------------------------------------------------------------------------------


class _Adapted(torch.autograd.Function):
    """The function base(x) + scaling · B(A(x)) of x [N, in], with the tensors of an adapter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, adapter: _Adapter) -> Tensor:
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
    """`_Adapted` of x = act(gate) · up, which is not stored for the backward pass; gate and up are [N, in]."""

    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, up: Tensor, weight: Tensor, a: Tensor, b: Tensor, adapter: _Adapter, product: _Product
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
    grad: Tensor, weight: Tensor, a: Tensor, b: Tensor, adapter: _Adapter, *, through: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients with respect to A(x), [N, r], and to x, [N, in], or None for x unless `through`."""
    d_low = (grad @ b).mul_(adapter.layer.scaling[adapter.name])
    if not through:
        return d_low, None
    return d_low, (grad @ adapter.dense(weight)).addmm_(d_low, a)
