"""The public kernel interface: token log-probabilities of a linear head that never hold the logits."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref.arguments import Arguments, is_number
from fastpref.kernels import linear_logprob_op as op
from fastpref.kernels.head_weight import DenseWeight, FourBitWeight, HeadWeight, OffloadedWeight, WidenedWeight

__all__ = [
    "OUTPUTS",
    "DenseWeight",
    "FourBitWeight",
    "HeadWeight",
    "LoraWeight",
    "OffloadedWeight",
    "TokenLogprobs",
    "linear_logprob",
]
OUTPUTS = ("entropy", "mean_logit", "log_sum_sq_probs", "is_top1")
_ARGUMENTS = Arguments("linear_logprob", like="hidden")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class TokenLogprobs(NamedTuple):
    """Per scored token, float32 [N] (float64 if the hidden states are), None where not requested.

    Only `logp` is differentiable.
    """

    logp: Tensor
    entropy: Tensor | None = None  # −Σ p·log p
    mean_logit: Tensor | None = None  # mean of z over the vocabulary
    log_sum_sq_probs: Tensor | None = None  # log Σ p²
    is_top1: Tensor | None = None  # bool: the target is the argmax (the first of equal maxima)

    def take(self, rows: Tensor) -> "TokenLogprobs":
        """Return the values of these rows, [M] int64, which may repeat."""
        others = (None if values is None else values[rows] for values in self[1:])
        return TokenLogprobs(self.logp[rows], *others)


@dataclass(frozen=True, eq=False)
class LoraWeight:
    """A head's weight with LoRA (arXiv 2106.09685): hidden·Wᵀ + scaling·(dropout(hidden)·Aᵀ)·Bᵀ.

    A and B get gradients, W does not. They may be float32 with a weight of half precision, as PEFT keeps them.
    """

    base: Tensor | HeadWeight  # [V, H]
    lora_A: Tensor  # [r, H]
    lora_B: Tensor  # [V, r]
    scaling: float = 1.0
    dropout: Callable[[Tensor], Tensor] | None = None

    def widen(self, hidden: Tensor) -> tuple[Tensor, WidenedWeight]:
        """The same product, wider by r and by zeros: hidden states [M, H + z + r] and weight [V, H + z + r].

        The zeros make the width a multiple of the kernels' step, so that they can copy rows in whole vectors.
        """
        inner = hidden if self.dropout is None else self.dropout(hidden)
        inner = torch.nn.functional.linear(inner.to(self.lora_A.dtype), self.lora_A) * self.scaling
        weight = WidenedWeight(as_weight(self.base), self.lora_B)
        zeros = hidden.new_zeros(hidden.shape[0], weight.zeros)
        return torch.cat([hidden, zeros, inner.to(hidden.dtype)], dim=1), weight


def as_weight(weight: Tensor | HeadWeight) -> HeadWeight:
    return DenseWeight(weight) if isinstance(weight, Tensor) else weight


def read_as(weight: Tensor | HeadWeight | LoraWeight, dtype: torch.dtype) -> Tensor | HeadWeight | LoraWeight:
    """Return a weight, or the frozen part of one with LoRA, with slices of a dtype."""
    if isinstance(weight, LoraWeight):
        return replace(weight, base=as_weight(weight.base).read_as(dtype))
    return weight if weight.dtype == dtype else as_weight(weight).read_as(dtype)


def computing_dtype(hidden: Tensor) -> torch.dtype:
    """Return the dtype in which a product of hidden states is computed: theirs, or that of autocast, as in torch."""
    kind = hidden.device.type
    if hidden.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return hidden.dtype
    return torch.get_autocast_dtype(kind)


def linear_logprob(
    hidden: Tensor,  # [M, H]
    weight: Tensor | HeadWeight | LoraWeight,  # [V, H]
    targets: Tensor,  # [N] int64 in [0, V)
    bias: Tensor | None = None,  # [V]
    *,
    positions: Tensor | None = None,  # [N] int64 in [0, M)
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    outputs: tuple[str, ...] = (),
    workspace_mb: float = 128,
    backend: str = "auto",
) -> TokenLogprobs:
    """Log-probabilities of `targets` under `softmax(softcap(logit_scale·(hidden·weightᵀ + bias))/temperature)`.

    The [N, V] logits never exist: the vocabulary is walked in tiles, which take at most `workspace_mb` MiB in addition
    to a few tensors of the size of `hidden`, whatever V is. With a frozen head the same walk computes the gradient of
    every row (two products of N×H×V in all); a trainable head's tiles are computed again in the backward pass (four
    products); without gradients there is one product.

    `torch.compile(fullgraph=True)` and FakeTensor trace it: it is a `torch.library` operator.

    Args:
        hidden: [M, H] float32, bfloat16, float16 or float64. Logits, sums and results are float32, for float64
            inputs float64.
        weight: [V, H], of hidden's dtype: a tensor, or a `LoraWeight`, a `FourBitWeight` of bitsandbytes, an
            `OffloadedWeight` in host memory. Under autocast dtypes may differ, and hidden and weight are cast to its
            dtype, the weight tile by tile; logits, sums and the weight's gradient keep their dtypes.
        targets: [N] int64.
        bias: [V] or None.
        positions: the row of `hidden` that predicts each target, repeats allowed; None: row n predicts target n.
            The gradient comes back at those rows, without atomics.
        softcap: c of c·tanh(x/c), as in Gemma 2; None for none.
        logit_scale: multiplies the raw logits, as in Cohere.
        temperature: divides the capped logits.
        outputs: which of "entropy", "mean_logit", "log_sum_sq_probs", "is_top1" to compute in addition to `logp`. They
            are not differentiable.
        workspace_mb: budget in MiB for scratch tiles.
        backend: "triton" (CUDA and ROCm), "torch" (anywhere), or "auto" for "triton" where it runs.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device, target or setting. Both errors name the argument and its value. On a GPU
            targets and positions out of range fail a device-side assertion, as in torch's own indexing.
    """
    if isinstance(weight, LoraWeight):
        _check_lora(hidden, weight)
        _check_tensors(hidden, as_weight(weight.base), targets, bias, positions)
        hidden, head = weight.widen(hidden.to(computing_dtype(hidden)))
    else:
        if isinstance(weight, Tensor):
            _ARGUMENTS.check_tensor("weight", weight, 2, hidden)
        head = as_weight(weight)
        _check_tensors(hidden, head, targets, bias, positions)
        hidden = hidden.to(computing_dtype(hidden))
    head = head.read_as(hidden.dtype)
    outputs = _check_settings(softcap, logit_scale, temperature, outputs, workspace_mb, backend)
    trained = head.trained
    recompute = (trained is not None and trained.requires_grad) or (bias is not None and bias.requires_grad)
    with_grad = torch.is_grad_enabled() and hidden.requires_grad and not recompute
    of_logits = (None if softcap is None else float(softcap), float(logit_scale), float(temperature))
    settings = (",".join(outputs), int(workspace_mb * 2**20), backend, with_grad)
    results = op.OperatorOutput._make(
        op.linear_logprob(hidden, head.tensors, targets, bias, positions, head.kind, *of_logits, *settings)
    )
    return TokenLogprobs(results.logp, **{name: getattr(results, name) for name in outputs})


def _check_lora(hidden: Any, weight: LoraWeight) -> None:
    base = weight.base
    _ARGUMENTS.check_tensor("lora_A", weight.lora_A, 2, hidden)
    _ARGUMENTS.check_tensor("lora_B", weight.lora_B, 2, hidden)
    if isinstance(base, Tensor):
        _ARGUMENTS.check_tensor("weight", base, 2, hidden)
    (vocabulary, width), rank = as_weight(base).shape, weight.lora_A.shape[0]
    if weight.lora_A.shape[1] != width or tuple(weight.lora_B.shape) != (vocabulary, rank):
        raise ValueError(
            f"linear_logprob: lora_A {tuple(weight.lora_A.shape)} and lora_B {tuple(weight.lora_B.shape)} do not fit "
            f"a weight {(vocabulary, width)}; they are [r, H] and [V, r]"
        )
    if isinstance(hidden, Tensor) and hidden.shape[-1] != width:
        raise ValueError(f"linear_logprob: weight has rows of {width}, hidden has shape {tuple(hidden.shape)}")


def _check_tensors(hidden: Any, weight: Any, targets: Any, bias: Any, positions: Any) -> None:
    _ARGUMENTS.check_tensor("hidden", hidden, 2, hidden)
    if not isinstance(weight, HeadWeight):
        raise TypeError(f"linear_logprob: weight must be a torch.Tensor, got {type(weight).__name__}")
    _ARGUMENTS.check_device("weight", weight.device, hidden)
    index = {"targets": targets} | ({} if positions is None else {"positions": positions})
    for name, value in index.items():
        _ARGUMENTS.check_tensor(name, value, 1, hidden)
        _ARGUMENTS.check_dtype(name, value.dtype, torch.int64)
    if bias is not None:
        _ARGUMENTS.check_tensor("bias", bias, 1, hidden)
    autocast = torch.is_autocast_enabled(hidden.device.type)
    dtypes = {"hidden": hidden.dtype, "weight": weight.dtype} | ({} if bias is None else {"bias": bias.dtype})
    for name, dtype in dtypes.items():
        _ARGUMENTS.check_dtype(name, dtype, *_DTYPES)
        if dtype != hidden.dtype and not autocast:
            raise TypeError(f"linear_logprob: {name} is {dtype}, hidden is {hidden.dtype}; they must agree")
    (rows, width), vocabulary = hidden.shape, weight.shape[0]
    if weight.shape[1] != width:
        raise ValueError(f"linear_logprob: weight has rows of {weight.shape[1]}, hidden has rows of {width}")
    if vocabulary == 0:
        raise ValueError(f"linear_logprob: weight must have at least one row, got shape {weight.shape}")
    if positions is None and targets.shape[0] != rows:
        raise ValueError(f"linear_logprob: targets has {targets.shape[0]} entries, hidden has {rows} rows")
    if positions is not None and positions.shape[0] != targets.shape[0]:
        raise ValueError(f"linear_logprob: positions has {positions.shape[0]} entries, targets has {targets.shape[0]}")
    if bias is not None and bias.shape[0] != vocabulary:
        raise ValueError(f"linear_logprob: bias has {bias.shape[0]} entries, weight has {vocabulary} rows")


def _check_settings(
    softcap: float | None, logit_scale: float, temperature: float, outputs: Any, workspace_mb: float, backend: str
) -> tuple[str, ...]:
    numbers = {"logit_scale": logit_scale, "temperature": temperature, "workspace_mb": workspace_mb}
    for name, value in (numbers if softcap is None else numbers | {"softcap": softcap}).items():
        if not is_number(value):
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
    _ARGUMENTS.check_backend(backend)
    return tuple(outputs)
