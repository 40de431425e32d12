"""Launches of the Triton kernels of the preference losses, and the cases that the compile report compiles."""

from collections.abc import Iterable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import JITFunction

from fastpref.kernels.launch import launch
from fastpref.kernels.preference_loss_spec import Flags, LossSpec
from fastpref.kernels.preference_loss_triton import _pair_kernel, _row_kernel
from fastpref.kernels.preference_loss_variants import VARIANTS, VariantSet

# Tokens that a program reads at a time. Lengths are not compile-time constants, so one block size serves all.
BLOCK = 512
WARPS = 4


class FusedLoss(NamedTuple):
    """The results of one launch, all float32."""

    loss: Tensor  # scalar
    coefficients: Tensor  # [N] ∂loss/∂logp
    sequences: Tensor  # [3, 2P], or [3, R]: sums of logp, sums of the reference, rewards
    pairs: Tensor  # [3, P] Σ supervised logp, log odds, logσ(log odds); [3, 0] for single completions


def pair_loss(
    logp: Tensor,  # [N] float32
    starts: Tensor,  # [S] int64, each sequence's first token
    lengths: Tensor,  # [S] int64
    reference: Tensor | None,  # [N] float32
    log_sum_sq_probs: Tensor | None,  # [N] float32
    pair_weights: Tensor | None,  # [P] float32; 1 if None
    margins: Tensor | None,  # [P] float32; that of `numbers` if None
    weights: dict[str, float],  # by variant
    flags: Flags,
    numbers: tuple[float, ...],  # `LossSpec.numbers`
    *,
    examples: float | None,  # the divisor of the mean over pairs; P if None
    nll_tokens: float | None,  # the divisor of the supervised term; the number of tokens that it scores if None
) -> FusedLoss:
    """Compute the loss of P pairs. The S sequences are P chosen, P rejected and, with HAS_PROMPTS, P prompts."""
    variants = _ordered(weights)
    constants = _constants(variants, flags, weighted=pair_weights is not None, margins=margins is not None)
    n, count = len(logp), len(lengths) // (3 if constants["HAS_PROMPTS"] else 2)
    scored = lengths[:count].sum() + lengths[2 * count :].sum() if nll_tokens is None else nll_tokens
    coefficients, sequences, pairs = logp.new_empty(n), logp.new_empty(3, 2 * count), logp.new_empty(4, count)
    launch(_pair_kernel, (count,),
        logp, logp if reference is None else reference, logp if log_sum_sq_probs is None else log_sum_sq_probs,
        starts, lengths, logp if pair_weights is None else pair_weights, logp if margins is None else margins,
        _on_device(numbers, logp.device), _on_device(tuple(weights[name] for name in variants), logp.device),
        _scalar(scored, logp),
        coefficients, sequences, pairs, n, count, float(count if examples is None else examples),
        **constants, num_warps=WARPS,
    )  # fmt: skip
    return FusedLoss(pairs[0].sum(), coefficients, sequences, pairs[1:].clone())


def row_loss(
    logp: Tensor,  # [N] float32
    starts: Tensor,  # [S] int64
    lengths: Tensor,  # [S] int64
    reference: Tensor,  # [N] float32
    labels: Tensor,  # [R] bool
    kl: Tensor,  # scalar
    row_weights: Tensor | None,  # [R] float32; 1 if None
    numbers: tuple[float, ...],
    *,
    examples: float | None,  # the divisor of the mean over rows; R if None
) -> FusedLoss:
    """Compute KTO's loss of the first R of S sequences. The tokens of the others get coefficients of 0."""
    n, rows = len(logp), len(labels)
    coefficients, sequences, share = logp.new_empty(n), logp.new_empty(3, rows), logp.new_empty(rows)
    launch(_row_kernel, (len(lengths),),
        logp, reference, starts, lengths, labels.to(torch.int8), _scalar(kl, logp),
        logp if row_weights is None else row_weights, _on_device(numbers, logp.device),
        coefficients, sequences, share, n, rows, float(rows if examples is None else examples),
        HAS_WEIGHTS=row_weights is not None, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return FusedLoss(share.sum(), coefficients, sequences, logp.new_empty(3, 0))


def _scalar(value: Tensor | float, like: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().to(like).reshape(1)
    return like.new_full((1,), value)


@lru_cache(maxsize=64)
def _on_device(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    """Return the numbers on the device. A run has one loss, so the cache makes this one copy."""
    return torch.tensor(numbers, dtype=torch.float32, device=device)


def _ordered(variants: Iterable[str]) -> list[str]:
    """Return the variants in the order of the table, in which every kernel adds them up.

    Raises ValueError for a variant that is not in the table.
    """
    return sorted(variants, key=list(VARIANTS).index)


def _constants(variants: list[str], flags: Flags, *, weighted: bool = False, margins: bool = False) -> dict[str, Any]:
    """Return the compile-time constants of `_pair_kernel`."""
    structure = {name: bool(value) for name, value in flags._asdict().items() if name != "SCORE"}
    functions = VariantSet(VARIANTS[name] for name in variants)
    data = {"HAS_WEIGHTS": weighted, "HAS_MARGINS": margins}
    return {"VARIANTS": functions, "SCORE": flags.SCORE, **structure, **data, "BLOCK": BLOCK}


# --- the compile report -----------------------------------------------------------------------------------------------


def compile_cases() -> list[tuple[str, dict[str, Any]]]:
    """List the smallest and the largest kernels that a run may use: name and compile-time constants."""
    pairwise = tuple(name for name in VARIANTS if name != "odds_ratio")  # ORPO's, of mean log-probabilities
    ones = (1.0,) * len(pairwise)
    full = LossSpec(
        pairwise, ones, label_smoothing=0.1, score="js", reference=True, length_alpha=0.5, pair_weights=True
    )
    specs = {
        "dpo": LossSpec(("sigmoid",), (1.0,), reference=True),
        "dpo, all": full,
        "orpo, prompts": LossSpec(("odds_ratio",), (0.1,), averaged=True, supervised=1.0, prompts=True),
        "simpo, alpha": LossSpec(("sigmoid",), (1.0,), averaged=True, score="power", power=-0.5, supervised=1.0),
        "cpo": LossSpec(("sigmoid",), (1.0,), supervised=1.0),
        "cpo ipo, alpha": LossSpec(("ipo",), (1.0,), averaged=True, score="power", power=-0.5, supervised=1.0),
    }
    pairs = {name: _constants(_ordered(spec.variants), spec.flags()) for name, spec in specs.items()}
    pairs["dpo, all, weights, margins"] = pairs["dpo, all"] | {"HAS_WEIGHTS": True, "HAS_MARGINS": True}
    rows = {"kto": {"HAS_WEIGHTS": False, "BLOCK": BLOCK}, "kto, weights": {"HAS_WEIGHTS": True, "BLOCK": BLOCK}}
    return [*(pairs | rows).items()]


def kernel_of(constants: dict[str, Any]) -> JITFunction:
    """Return the kernel of a case of `compile_cases`."""
    return _pair_kernel if "VARIANTS" in constants else _row_kernel


def argument_type(name: str, constants: dict[str, Any]) -> str:
    """Return the type of a kernel's argument for `triton.compiler.ASTSource`."""
    if name in constants:
        return "constexpr"
    if name.startswith("p_"):
        return {"p_starts": "*i64", "p_lengths": "*i64", "p_labels": "*i8"}.get(name, "*fp32")
    return "fp32" if name == "examples" else "i32"
