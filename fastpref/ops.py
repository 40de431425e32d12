"""The public kernel interface: token log-probabilities of a linear head that never hold the logits."""

import importlib.util
import math
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastpref.kernels import linear_logprob_torch
from fastpref.kernels.linear_logprob_torch import LogitTransform, Walk, compute_dtype

OUTPUTS = ("entropy", "mean_logit", "log_sum_sq_probs", "is_top1")
BACKENDS = ("auto", "torch", "triton")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class TokenLogprobs(NamedTuple):
    """Per scored token, float32 [N] (float64 if the hidden states are), None where not asked for.

    Only `logp` is differentiable.
    """

    logp: Tensor
    entropy: Tensor | None = None  # −Σ p·log p
    mean_logit: Tensor | None = None  # mean of z over the vocabulary
    log_sum_sq_probs: Tensor | None = None  # log Σ p²
    is_top1: Tensor | None = None  # bool: the target is the argmax (the first of equal maxima)


def linear_logprob(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    targets: Tensor,  # [N] int64 in [0, V)
    bias: Tensor | None = None,  # [V]
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    outputs: tuple[str, ...] = (),
    workspace_mb: float = 128,
    backend: str = "auto",
) -> TokenLogprobs:
    """Log-probabilities of `targets` under `softmax(softcap(logit_scale·(hidden·weightᵀ + bias))/temperature)`.

    The [N, V] logits never exist: the vocabulary is walked in tiles, and beside a few tensors of the size of `hidden`
    no more than `workspace_mb` MiB are held, whatever V is. With a frozen head the gradient of
    every row is found in the same walk (two products of N×H×V in all); a trainable head's tiles are made again in
    the backward pass (four); without gradients there is one.

    Args:
        hidden: [N, H] float32, bfloat16, float16 or float64. Logits, sums and results are float32, for float64
            inputs float64.
        weight: [V, H], of hidden's dtype (any of them under autocast; the computation is float32 all the same).
        targets: [N] int64.
        bias: [V] or None.
        softcap: c of c·tanh(x/c), as in Gemma 2; None for none.
        logit_scale: multiplies the raw logits, as in Cohere.
        temperature: divides the capped logits.
        outputs: which of "entropy", "mean_logit", "log_sum_sq_probs", "is_top1" to compute beside `logp`. They are
            not differentiable.
        workspace_mb: budget in MiB for scratch tiles.
        backend: "triton" (CUDA and ROCm), "torch" (anywhere), or "auto" for the best there is on the tensors' device.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device, target or setting. Both name the argument and what was found.
    """
    _check_tensors(hidden, weight, targets, bias)
    outputs = _check_settings(softcap, logit_scale, temperature, outputs, workspace_mb, backend)
    kernels = _kernels(backend, hidden)
    head = _Head(LogitTransform(softcap, logit_scale, temperature), outputs, int(workspace_mb * 2**20), kernels)
    with torch.autocast(hidden.device.type, enabled=False):
        if hidden.shape[0] == 0:
            return _empty(hidden, weight, bias, outputs)
        if not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in (hidden, weight, bias)):
            walk = head.walk(hidden, weight, targets, bias, with_grad=False)
            return TokenLogprobs(walk.logp, walk.entropy, walk.mean_logit, walk.log_sum_sq_probs, walk.is_top1)
        trainable = weight.requires_grad or (bias is not None and bias.requires_grad)
        function = _TrainableHead if trainable else _FrozenHead
        return TokenLogprobs(*function.apply(hidden, weight, bias, targets, head))


@dataclass(frozen=True)
class _Head:
    transform: LogitTransform
    outputs: tuple[str, ...]
    budget: int  # bytes
    kernels: ModuleType  # the backend

    def walk(self, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, *, with_grad: bool) -> Walk:
        return self.kernels.walk_vocabulary(
            hidden, weight, targets, bias, self.transform,
            outputs=self.outputs, budget=self.budget, with_grad=with_grad,
        )  # fmt: skip


def _kernels(backend: str, hidden: Tensor) -> ModuleType:
    """The module that walks the vocabulary for these tensors."""
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


class _FrozenHead(torch.autograd.Function):
    """Only the hidden states need a gradient: it is made in the forward walk and kept, [N, H]."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, head: _Head):
        walk = head.walk(hidden, weight, targets, bias, with_grad=True)
        ctx.save_for_backward(walk.grad)
        ctx.dtype = hidden.dtype
        extras = (walk.entropy, walk.mean_logit, walk.log_sum_sq_probs, walk.is_top1)
        ctx.mark_non_differentiable(*(t for t in extras if t is not None))
        return walk.logp, *extras

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor):
        (grad,) = ctx.saved_tensors
        return (grad * grads[0][:, None]).to(ctx.dtype), None, None, None, None


class _TrainableHead(torch.autograd.Function):
    """The weight or the bias needs a gradient too: the backward pass walks the vocabulary again."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, head: _Head):
        walk = head.walk(hidden, weight, targets, bias, with_grad=False)
        ctx.save_for_backward(hidden, weight, targets, bias, walk.z_target, walk.maximum, walk.sum_others)
        ctx.head = head
        extras = (walk.entropy, walk.mean_logit, walk.log_sum_sq_probs, walk.is_top1)
        ctx.mark_non_differentiable(*(t for t in extras if t is not None))
        return walk.logp, *extras

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor):
        hidden, weight, targets, bias, *walk = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        made = ctx.head.kernels.recompute_gradients(
            grads[0],
            hidden,
            weight,
            targets,
            bias,
            ctx.head.transform,
            tuple(walk),
            budget=ctx.head.budget,
            wanted=wanted,
        )
        return made.hidden, made.weight, made.bias, None, None


def _empty(hidden: Tensor, weight: Tensor, bias: Tensor | None, outputs: tuple[str, ...]) -> TokenLogprobs:
    """N = 0: empty results that still hang in the graph, so that a backward pass finds gradients of zero."""
    dtype = compute_dtype(hidden)
    zero = hidden.sum() + weight[:0].sum() + (0 if bias is None else bias[:0].sum())
    nothing = hidden.new_zeros(0, dtype=dtype)
    extras = {name: nothing.bool() if name == "is_top1" else nothing for name in outputs}
    return TokenLogprobs((nothing + zero.to(dtype)), **extras)


def _check_tensors(hidden: Any, weight: Any, targets: Any, bias: Any) -> None:
    given = {"hidden": hidden, "weight": weight, "targets": targets} | ({} if bias is None else {"bias": bias})
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"linear_logprob: {name} must be a torch.Tensor, got {type(value).__name__}")
        if value.device != hidden.device:
            raise ValueError(f"linear_logprob: {name} is on {value.device}, hidden is on {hidden.device}")
        dimensions = 2 if name in ("hidden", "weight") else 1
        if value.dim() != dimensions:
            raise ValueError(
                f"linear_logprob: {name} must have {dimensions} dimensions, got shape {tuple(value.shape)}"
            )
    if targets.dtype != torch.int64:
        raise TypeError(f"linear_logprob: targets must be torch.int64, got {targets.dtype}")
    autocast = torch.is_autocast_enabled(hidden.device.type)
    for name, value in given.items():
        if name == "targets":
            continue
        if value.dtype not in _DTYPES:
            raise TypeError(f"linear_logprob: {name} must be float32, bfloat16, float16 or float64, got {value.dtype}")
        if value.dtype != hidden.dtype and not autocast:
            raise TypeError(f"linear_logprob: {name} is {value.dtype}, hidden is {hidden.dtype}; they must agree")
    (n, width), vocabulary = hidden.shape, weight.shape[0]
    if weight.shape[1] != width:
        raise ValueError(f"linear_logprob: weight has rows of {weight.shape[1]}, hidden has rows of {width}")
    if vocabulary == 0:
        raise ValueError(f"linear_logprob: weight must have at least one row, got shape {tuple(weight.shape)}")
    if targets.shape[0] != n:
        raise ValueError(f"linear_logprob: targets has {targets.shape[0]} entries, hidden has {n} rows")
    if bias is not None and bias.shape[0] != vocabulary:
        raise ValueError(f"linear_logprob: bias has {bias.shape[0]} entries, weight has {vocabulary} rows")
    if n:
        low, high = (int(x) for x in torch.aminmax(targets))
        if low < 0 or high >= vocabulary:
            wrong = low if low < 0 else high
            raise ValueError(f"linear_logprob: targets holds {wrong}, weight has rows 0 to {vocabulary - 1}")


def _check_settings(
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    outputs: Any,
    workspace_mb: float,
    backend: str,
) -> tuple[str, ...]:
    numbers = {"logit_scale": logit_scale, "temperature": temperature, "workspace_mb": workspace_mb}
    for name, value in (numbers if softcap is None else numbers | {"softcap": softcap}).items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"linear_logprob: {name} must be a number, got {value!r}")
        if not math.isfinite(value) or (value <= 0 and name != "logit_scale"):
            raise ValueError(
                f"linear_logprob: {name} must be {'finite' if name == 'logit_scale' else 'above 0'}, got {value}"
            )
    if not isinstance(outputs, tuple | list):
        raise TypeError(f"linear_logprob: outputs must be a tuple of names, got {outputs!r}")
    for name in outputs:
        if name not in OUTPUTS:
            raise ValueError(f"linear_logprob: outputs holds {name!r}, known are {', '.join(OUTPUTS)}")
    if backend not in BACKENDS:
        raise ValueError(f"linear_logprob: backend is {backend!r}, known are {', '.join(BACKENDS)}")
    return tuple(outputs)
