"""The preference losses as one torch operator, computed by a Triton kernel. `token_loss.py` decides when it is used.

The forward pass computes the loss together with its coefficient for every token, c_n = ∂loss/∂logp_n. The backward pass
is grad·c. torch.compile and fake tensors see the single operator `torch.ops.fastpref.preference_loss`.
"""

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastpref.config.losses import CPO, DPO, IPO, KTO, ORPO, PL, SFT, LiPO, LossOptions, SimPO
from fastpref.kernels.operators import operator
from fastpref.kernels.preference_loss_spec import Flags, LossSpec


def takes_triton(backend: str, logp: Tensor, loss: LossOptions) -> bool:
    """Return whether the kernels compute this loss. Raises ValueError if `backend` is "triton" and they cannot."""
    if backend == "torch" or (backend == "auto" and logp.device.type != "cuda"):
        return False
    reason = _no_triton(logp, loss)
    if reason and backend == "triton":
        raise ValueError(f"preference_loss: backend is 'triton', but {reason}")
    return not reason


def _no_triton(logp: Tensor, loss: LossOptions) -> str:
    """Return the reason why the kernels cannot run, or an empty string."""
    if isinstance(loss, DPO) and loss.sorts_step:
        return f"{' and '.join(loss.variants)} sort the whole step, which only the torch backend does"
    if loss.listwise:
        return f"{loss.type} compares all completions of a row, which only the torch backend does"
    if loss.supervised:
        return f"{loss.type} is a sum over tokens, for which there is no kernel"
    if logp.dtype != torch.float32:
        return f"logp is {logp.dtype}; the kernels take torch.float32"
    return _no_kernels(logp.device.type)


@torch.compiler.assume_constant_result
def _no_kernels(device: str) -> str:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    from fastpref.kernels.tiles import interpreted

    return "" if device == "cuda" or interpreted() else f"logp is on {device}; the kernels run on CUDA and ROCm"


def kernel_spec(loss: LossOptions) -> LossSpec:
    """Return the description of a loss for the kernels."""
    match loss:
        case PL() | LiPO() | SFT():
            raise TypeError(f"kernel_spec: the kernels do not compute {loss.type}")
        case KTO():
            return LossSpec(
                beta=loss.beta,
                reference=True,
                desirable_weight=loss.desirable_weight,
                undesirable_weight=loss.undesirable_weight,
            )
        case IPO():
            return kernel_spec(loss.as_dpo())
        case DPO():
            return _dpo_spec(loss)
        case ORPO():
            prompts = loss.nll_on == "all"
            return LossSpec(
                ("odds_ratio",), (loss.beta,), beta=loss.beta, averaged=True, supervised=1.0, prompts=prompts
            )
        case SimPO():
            variant, averaged, margin = "sigmoid", True, loss.margin
        case CPO():
            variant, averaged, margin = loss.variant, loss.variant == "ipo", 0.0
    return LossSpec(
        (variant,),
        (1.0,),
        beta=loss.beta,
        label_smoothing=loss.label_smoothing,
        margin=margin,
        averaged=averaged,
        score="power" if loss.alpha else "value",
        power=-loss.alpha,
        supervised=loss.sft_weight,
    )


def _dpo_spec(loss: DPO) -> LossSpec:
    weights = dict(zip(loss.variants, loss.weights or (1.0,) * len(loss.variants), strict=True))
    supervised = weights.pop("sft", 0.0)
    score, power = {"reverse_kl": "value", "js": "js"}.get(loss.f_divergence, "power"), -1.0  # forward_kl
    if loss.f_divergence == "alpha":
        power = loss.f_alpha - 1
        score = "power" if abs(power) >= 1e-6 else "value"  # as in `pairs.py`
    return LossSpec(
        tuple(weights),
        tuple(weights.values()),
        beta=loss.beta,
        label_smoothing=loss.label_smoothing,
        score=score,
        power=power,
        reference=True,
        length_alpha=loss.length_alpha,
        pair_weights=loss.weighting,
        supervised=supervised,
        discopop_tau=loss.discopop_tau,
    )


@operator("fastpref::preference_loss")
def fused_loss(
    logp: Tensor,  # [N] float32
    starts: Tensor,  # [S] int64 each sequence's first token
    lengths: Tensor,  # [S] int64
    reference: Tensor | None,  # [N] float32
    labels: Tensor | None,  # [R] bool
    kl: Tensor | None,  # scalar float32
    log_sum_sq_probs: Tensor | None,  # [N] float32
    example_weights: Tensor | None,  # [P] or [R] float32, the factor of each pair's or row's loss
    margins: Tensor | None,  # [P] float32, in place of the loss's own
    variants: str,  # `LossSpec.variants`, joined by commas
    weights: Sequence[float],  # `LossSpec.weights`
    flags: Sequence[int],  # `LossSpec.flags()`
    numbers: Sequence[float],  # `LossSpec.numbers()`
    examples: float | None,
    nll_tokens: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the loss, its coefficients [N], values of completions [3, 2P or R] and of pairs [3, P], in one launch.

    `kernels/preference_loss_launch.py` describes them. `torch.compile` and fake tensors treat this as one operation.
    """
    from fastpref.kernels import preference_loss_launch as launch

    logp, lengths = logp.contiguous(), lengths.contiguous()
    reference, example_weights, margins = (
        None if given is None else given.contiguous() for given in (reference, example_weights, margins)
    )
    if labels is not None:
        assert reference is not None
        assert kl is not None
        return launch.row_loss(
            logp, starts, lengths, reference, labels, kl, example_weights, tuple(numbers), examples=examples
        )
    log_sum_sq_probs = None if log_sum_sq_probs is None else log_sum_sq_probs.contiguous()
    of_variants = dict(zip(variants.split(","), weights, strict=False))  # "".split gives one empty name
    return launch.pair_loss(
        logp,
        starts,
        lengths,
        reference,
        log_sum_sq_probs,
        example_weights,
        margins,
        of_variants,
        Flags(*flags),
        tuple(numbers),
        examples=examples,
        nll_tokens=nll_tokens,
    )


@fused_loss.register_fake
def _(
    logp, starts, lengths, reference, labels, kl, log_sum_sq_probs, example_weights, margins,
    variants, weights, flags, numbers, examples, nll,
):  # fmt: skip
    sequences = lengths.shape[0]
    groups = 3 if Flags(*flags).HAS_PROMPTS else 2
    completions = sequences // groups * 2 if labels is None else labels.shape[0]
    pairs = sequences // groups if labels is None else 0
    shapes = ((), logp.shape, (3, completions), (3, pairs))
    return tuple(logp.new_empty(shape) for shape in shapes)


def _keep_coefficients(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # otherwise autograd would make zeros for the outputs without gradient


@once_differentiable
def _backward(ctx: Any, grad: Tensor, *_: Tensor):
    (coefficients,) = ctx.saved_tensors
    return grad * coefficients, *[None] * 14


fused_loss.register_autograd(_backward, setup_context=_keep_coefficients)
