"""`linear_logprob` as `torch.library` operators, for the dispatcher, autograd, FakeTensor and `torch.compile`.

    fastpref::linear_logprob            one walk over the vocabulary; with `with_grad` it returns g = ∂logp/∂h
    fastpref::linear_logprob_scale      the backward pass of a frozen head: g is scaled and written to its positions
    fastpref::linear_logprob_recompute  the backward pass of a trained head: every tile's logits are recomputed

Operators take tensors, numbers and strings only. So a head is passed as its tensors and its kind (`head_weight.py`),
and an output that was not requested is a tensor without elements.
"""

import importlib.util
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref.kernels import linear_logprob_torch
from fastpref.kernels.head_weight import HeadWeight, assemble
from fastpref.kernels.linear_logprob_torch import LogitTransform, compute_dtype
from fastpref.kernels.operators import operator


class OperatorOutput(NamedTuple):
    """The results of `fastpref::linear_logprob`: [N] unless noted otherwise; without elements if not requested."""

    logp: Tensor
    entropy: Tensor
    mean_logit: Tensor
    log_sum_sq_probs: Tensor
    is_top1: Tensor
    statistics: Tensor  # [3, N] z_target, maximum and sum_others for a recomputation, without `with_grad`
    grad: Tensor  # [N, H] with `with_grad`


def kernels_for(backend: str, hidden: Tensor) -> ModuleType:
    """Return the module with the kernels for these tensors. Raises ValueError if "triton" cannot run for them."""
    if backend == "torch" or (backend == "auto" and hidden.device.type != "cuda"):
        return linear_logprob_torch
    reason = "Triton is not installed"
    if importlib.util.find_spec("triton") is not None:
        from fastpref.kernels import linear_logprob_launch, tiles

        if tiles.choose_tiles(hidden) is not None:
            return linear_logprob_launch
        reason = "the kernels have no tile for it"
    if backend == "triton":
        raise ValueError(f"linear_logprob: backend is 'triton', hidden is {hidden.dtype} on {hidden.device}: {reason}")
    return linear_logprob_torch


@operator("fastpref::linear_logprob")
def linear_logprob(
    hidden: Tensor,  # [M, H]
    head: Sequence[Tensor],
    targets: Tensor,  # [N] int64
    bias: Tensor | None,  # [V]
    positions: Tensor | None,  # [N] int64: the row of `hidden` that predicts each target
    kind: str,  # of the head
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    outputs: str,  # names joined by commas
    budget: int,  # bytes
    backend: str,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    weight = assemble(kind, head)
    kernels = kernels_for(backend, hidden)
    _check_range("targets", targets, weight.shape[0], "weight")
    rows = hidden
    if positions is not None:
        _check_range("positions", positions, hidden.shape[0], "hidden")
        rows = hidden.index_select(0, positions)
    if not len(targets):
        return _shapes(hidden, targets, outputs, with_grad)
    transform, names = LogitTransform(softcap, logit_scale, temperature), tuple(filter(None, outputs.split(",")))
    with torch.autocast(hidden.device.type, enabled=False):
        walk = kernels.walk_vocabulary(
            rows, weight, targets, bias, transform, outputs=names, budget=budget, with_grad=with_grad
        )
    statistics = None if with_grad else torch.stack([walk.z_target, walk.maximum, walk.sum_others])
    results = (walk.logp, walk.entropy, walk.mean_logit, walk.log_sum_sq_probs, walk.is_top1, statistics, walk.grad)
    return OperatorOutput._make(hidden.new_empty(0) if value is None else value for value in results)


def _check_range(name: str, index: Tensor, length: int, of: str) -> None:
    """Check that every entry is in [0, length). On a GPU this is a device-side assertion: the host does not wait."""
    if type(index) is not Tensor:  # a FakeTensor, which has no values
        return
    inside = ((index >= 0) & (index < length)).all()
    if index.device.type != "cpu":
        torch._assert_async(inside, f"linear_logprob: {name} must lie within the rows of {of}")
    elif not inside:
        low, high = (int(x) for x in torch.aminmax(index))
        raise ValueError(f"linear_logprob: {name} holds {low if low < 0 else high}, {of} has rows 0 to {length - 1}")


def _shapes(hidden: Tensor, targets: Tensor, outputs: str, with_grad: bool) -> OperatorOutput:
    """Return results with the right shapes and dtypes, and undefined values."""
    n, dtype = targets.shape[0], compute_dtype(hidden)
    names = ("logp", *outputs.split(","))
    shapes = {name: hidden.new_empty(n if name in names else 0, dtype=dtype) for name in OperatorOutput._fields[:5]}
    shapes["is_top1"] = shapes["is_top1"].bool()
    grad_dtype = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
    return OperatorOutput(
        **shapes,
        statistics=hidden.new_empty(0 if with_grad else (3, n), dtype=dtype),
        grad=hidden.new_empty((n, hidden.shape[1]) if with_grad else 0, dtype=grad_dtype),
    )


@linear_logprob.register_fake
def _(hidden, head, targets, bias, positions, kind, softcap, scale, temperature, outputs, budget, backend, with_grad):
    return _shapes(hidden, targets, outputs, with_grad)


@operator("fastpref::linear_logprob_scale")
def scale(
    grad: Tensor,  # [N, H]
    coefficient: Tensor,  # [N]
    positions: Tensor | None,  # [N]
    rows: int,  # M
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    return kernels_for(backend, grad).scale_rows(grad, coefficient, positions, rows, dtype)


@scale.register_fake
def _(grad, coefficient, positions, rows, dtype, backend):
    return grad.new_empty((rows, grad.shape[1]), dtype=dtype)


@operator("fastpref::linear_logprob_recompute")
def recompute(
    grad_logp: Tensor,  # [N]
    hidden: Tensor,  # [M, H]
    head: Sequence[Tensor],
    targets: Tensor,
    bias: Tensor | None,
    positions: Tensor | None,
    statistics: Tensor,  # [3, N]
    kind: str,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    budget: int,
    backend: str,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    weight, kernels = assemble(kind, head), kernels_for(backend, hidden)
    wanted = (want_hidden, want_weight, want_bias)
    if not len(targets):
        shapes = _grad_shapes(hidden, weight, bias, *wanted)
        return tuple(tensor.zero_() for tensor in shapes)  # pyright: ignore[reportReturnType]
    rows = hidden if positions is None else hidden.index_select(0, positions)
    transform = LogitTransform(softcap, logit_scale, temperature)
    with torch.autocast(hidden.device.type, enabled=False):
        gradients = kernels.recompute_gradients(
            grad_logp, rows, weight, targets, bias, transform, statistics, budget=budget, wanted=wanted
        )
    d_hidden = gradients.hidden
    if d_hidden is not None and positions is not None:
        d_hidden = kernels.scale_rows(d_hidden, torch.ones_like(grad_logp), positions, hidden.shape[0], hidden.dtype)
    return tuple(hidden.new_empty(0) if t is None else t for t in (d_hidden, gradients.weight, gradients.bias))  # pyright: ignore[reportReturnType]


def _grad_shapes(
    hidden: Tensor, weight: HeadWeight, bias: Tensor | None, want_hidden: bool, want_weight: bool, want_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    wanted = ((hidden, want_hidden), (weight.trained, want_weight), (bias, want_bias))
    return tuple(torch.empty_like(t) if want and t is not None else hidden.new_empty(0) for t, want in wanted)  # pyright: ignore[reportReturnType]


@recompute.register_fake
def _(grad_logp, hidden, head, targets, bias, positions, statistics, kind, *settings):
    return _grad_shapes(hidden, assemble(kind, head), bias, *settings[-3:])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, head, targets, bias, positions, *settings = inputs
    ctx.settings = settings
    results = OperatorOutput._make(output)
    ctx.mark_non_differentiable(*(t for t in results if t is not results.logp))
    ctx.rows, ctx.dtype, ctx.heads = hidden.shape[0], hidden.dtype, len(head)
    if settings[-1]:  # with_grad
        ctx.save_for_backward(results.grad, positions)
    else:
        ctx.save_for_backward(hidden, targets, bias, positions, results.statistics, *head)


def _backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    *of_logits, _, budget, backend, with_grad = ctx.settings  # kind, softcap, logit_scale and temperature
    no_settings = (None,) * len(ctx.settings)
    if with_grad:
        grad, positions = ctx.saved_tensors
        d_hidden = scale(grad, grads[0], positions, ctx.rows, ctx.dtype, backend)
        return d_hidden, [None] * ctx.heads, None, None, None, *no_settings
    hidden, targets, bias, positions, statistics, *head = ctx.saved_tensors
    want_hidden, want_head, _, want_bias, *_ = ctx.needs_input_grad
    wanted = (want_hidden, want_head[-1], want_bias)
    d_hidden, d_weight, d_bias = recompute(
        grads[0], hidden, head, targets, bias, positions, statistics, *of_logits, budget, backend, *wanted
    )
    d_head = [None] * (ctx.heads - 1) + [d_weight if want_head[-1] else None]
    return d_hidden if want_hidden else None, d_head, None, d_bias if want_bias else None, None, *no_settings


linear_logprob.register_autograd(_backward, setup_context=_keep)
