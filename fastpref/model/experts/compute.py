"""The forward pass of fused experts with weights in few bits, with adapters, or with both.

It follows transformers' grouped products: the tokens are sorted by their experts, and each product is one of groups of
rows. Weights in few bits are dequantised one expert at a time, only of those that have tokens, and again in the
backward pass. An adapter adds scaling · B(A(x)) of the tokens that an expert has; PEFT adds scaling · B·A to the
weights of all experts, which takes as much memory as these, and as much again for the gradient of the sum.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from transformers.integrations.moe import _grouped_linear

from fastpref.model.experts.bits import unpack
from fastpref.model.experts.kinds import weight_names

_ALIGNED = 16  # bytes of a row, or a multiple of them, in torch's grouped products


@dataclass(frozen=True)
class LowRank:
    """An adapter of the weights of a layer's experts."""

    a: Tensor  # [experts, r, in]
    b: Tensor  # [experts, out, r]
    scaling: float


Adapters = Mapping[str, Sequence[LowRank]]  # by the names of the weights


@dataclass
class _Groups:
    """The rows of each expert, which lie one after the other."""

    experts: Tensor  # [S] the expert of each row
    ends: Tensor  # [experts] int32: where the rows of each end

    @cached_property
    def bounds(self) -> list[tuple[int, int, int]]:
        """The experts that have rows, with the first and the end of these: read once, because the host waits for it.

        Fake tensors have no numbers, so that one expert gets all rows.
        """
        if isinstance(self.ends, FakeTensor) or self.ends.device.type == "meta":
            return [(0, 0, len(self.experts))]
        ends = self.ends.tolist()
        firsts = [0, *ends[:-1]]
        return [(expert, first, end) for expert, (first, end) in enumerate(zip(firsts, ends)) if first < end]


def forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute fused experts without adapters, as a method of their module."""
    return compute(self, hidden_states, top_k_index, top_k_weights, {})


def compute(experts: Any, hidden: Tensor, index: Tensor, shares: Tensor, adapters: Adapters) -> Tensor:
    """Return the sum of each token's experts, [T, H].

    Args:
        experts: the module of fused experts.
        hidden: [T, H].
        index: the experts of each token, [T, k].
        shares: what each of them counts, [T, k].
        adapters: the adapters of each weight.
    """
    tokens, each = index.shape
    ids, order = torch.sort(index.reshape(-1))
    numbers = ids.float() if hidden.device.type in ("cpu", "mps") else ids.int()  # as histc takes them
    counts = torch.histc(numbers, bins=experts.num_experts, min=0, max=experts.num_experts - 1)
    groups = _Groups(ids, torch.cumsum(counts, dim=0, dtype=torch.int32))
    first, last = weight_names(experts)
    inner = _product(experts, first, hidden[order // each], groups, adapters)
    inner = experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)
    out = _product(experts, last, inner, groups, adapters)
    if getattr(experts, "has_post_expert_norm", False):
        out = experts.post_expert_norm(out)
    out = out * shares.reshape(-1)[order].unsqueeze(-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return out[back].view(tokens, each, -1).sum(dim=1).to(hidden.dtype)


def _product(experts: Any, name: str, x: Tensor, groups: _Groups, adapters: Adapters) -> Tensor:
    """Return the product of rows [S, in] with their experts' weights and adapters, with the bias: [S, out]."""
    weight = experts._parameters[name]
    state = getattr(weight, "quant_state", None)
    x = x.to(weight.dtype if state is None else state.dtype)
    if state is None:
        out = _grouped_linear(x, weight, groups.ends, is_transposed=experts.is_transposed)
    else:
        out: Any = _Unpacked.apply(x, weight, experts, name, groups)
    for adapter in adapters.get(name, ()):
        out = out + _low_rank(x, adapter, groups)
    return out + experts._parameters[f"{name}_bias"][groups.experts] if experts.has_bias else out


def _low_rank(x: Tensor, adapter: LowRank, groups: _Groups) -> Tensor:
    a, b = adapter.a.to(x.dtype), adapter.b.to(x.dtype).contiguous()
    missing = -a.shape[1] % (_ALIGNED // x.dtype.itemsize)
    if missing:  # a grouped product wants whole rows; zeros change no sum
        a, b = F.pad(a, (0, 0, 0, missing)), F.pad(b, (0, missing))
    return _grouped(_grouped(x, a, groups) * adapter.scaling, b, groups)


def _grouped(x: Tensor, weight: Tensor, groups: _Groups) -> Tensor:
    """Return the product of rows [S, in] with the weights [experts, out, in] of their experts."""
    if any(size * x.dtype.itemsize % _ALIGNED for size in weight.shape[1:]):
        return torch.ops.transformers.grouped_mm_fallback(x, weight.transpose(-2, -1), groups.ends)
    return _grouped_linear(x, weight, groups.ends)


class _Unpacked(torch.autograd.Function):
    """The product of rows [S, in] with weights in few bits, which get no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, experts: Any, name: str, groups: _Groups) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.experts, ctx.name, ctx.groups = experts, name, groups
        width = weight.quant_state.shape[2 if experts.is_transposed else 1]  # pyright: ignore[reportAttributeAccessIssue]
        return _multiplied(x, weight, experts, name, groups, width, forwards=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (weight,), (grad,) = ctx.saved_tensors, grads
        width = ctx.experts._parameters[ctx.name].quant_state.shape[1 if ctx.experts.is_transposed else 2]
        return _multiplied(grad, weight, ctx.experts, ctx.name, ctx.groups, width, forwards=False), *[None] * 4


def _multiplied(
    x: Tensor, weight: Tensor, experts: Any, name: str, groups: _Groups, width: int, *, forwards: bool
) -> Tensor:
    """Multiply the rows of each expert with its weight, or with its transpose: [S, width]."""
    state = experts._parameters[name].quant_state  # that of the present copy, if the layer is streamed
    out = x.new_zeros((len(x), width))
    with torch.autocast(x.device.type, enabled=False):
        for expert, first, end in groups.bounds:
            own = unpack(weight.data, state, expert)
            right = own if experts.is_transposed == forwards else own.t()
            torch.mm(x[first:end], right, out=out[first:end])
            del own, right  # before the next one is dequantised
    return out
