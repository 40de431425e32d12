"""The preference loss as a function of token log-probabilities.

Two backends compute the same. "torch" sums over completions and calls the formulas of `pairs.py`, `rows.py` or
`lists.py`, which autograd differentiates. "triton" is one launch (`kernels/preference_loss_triton.py`), whose backward
pass is a product of [N] elements. DPO's aot and aot_unpaired sort all pairs of a step, and PL and LiPO compare all
completions of a row, which one program per pair cannot do, so they always use torch. So does SFT, which is one sum.
"""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastpref.arguments import Arguments, is_number
from fastpref.config.losses import CPO, DPO, KTO, ORPO, LossOptions, SimPO
from fastpref.losses.fused import fused_loss, kernel_spec, takes_triton
from fastpref.losses.lists import ListLogps, list_loss
from fastpref.losses.pairs import PairLogps, WholeStep, length_weights, pair_loss, wpo_weights
from fastpref.losses.result import PreferenceLoss, Totals
from fastpref.losses.rows import RowLogps, kto_loss
from fastpref.losses.supervised import sft_loss

_ARGUMENTS = Arguments("preference_loss", like="logp")


def preference_loss(
    logp: Tensor,  # [N]
    segments: Tensor,  # [N] int64
    lengths: Tensor,  # [S] int64
    loss: LossOptions,
    *,
    reference: Tensor | None = None,  # [N]
    labels: Tensor | None = None,  # [R] bool
    kl: Tensor | float = 0.0,
    log_sum_sq_probs: Tensor | None = None,  # [N]
    scores: Tensor | None = None,  # [R, K]
    weights: Tensor | None = None,  # [P] or [R]
    margins: Tensor | None = None,  # [P]
    totals: Totals | None = None,
    step: WholeStep | None = None,
    backend: str = "auto",
) -> PreferenceLoss:
    """Compute the loss of P pairs, or of R rows of KTO, PL, LiPO and SFT, from the logps of N scored tokens.

    The tokens of a sequence are contiguous and in order; sequences may be in any order. Sequences 0 to P − 1 are the
    chosen completions, P to 2P − 1 the rejected ones; for ORPO with `nll_on = "all"`, 2P to 3P − 1 are the prompts. For
    KTO the first R are the rows; R mismatched ones may follow, which do not contribute to the loss. For PL and LiPO,
    sequence k·R + r is completion k of row r; rows with fewer than K completions have empty sequences in their place.
    For SFT each sequence is a row.

    Args:
        logp: [N] float32 or float64 token log-probabilities; the only differentiable argument.
        segments: [N] int64, the sequence of each token.
        lengths: [S] int64, the number of tokens of each sequence. Only prompts, mismatched rows and completions without
            a score may have none.
        loss: the options of `fastpref.losses`.
        reference: [N] the reference's logp; for DPO, IPO, KTO, PL and LiPO, and for no other loss.
        labels: [R] bool, whether each row is desirable; for KTO, and for no other loss.
        kl: scalar of `losses.kto_kl`: the baseline of KTO's rewards. The caller computes it from the whole step.
        log_sum_sq_probs: [N] log Σp² of `linear_logprob`; for DPO with `weighting`.
        scores: [R, K] how good each completion is, higher is better, NaN where there is none; for PL and LiPO.
        weights: [P] or [R], the factor of each example's loss, supervised terms included. They do not change the
            divisors, so a weight of 2 counts as the example twice. DPO's aot and aot_unpaired take none.
        margins: [P] ODPO's offset of each pair in units of the reward, or SimPO's γ, in place of its own; for SimPO,
            for CPO except "ipo", and for DPO's sigmoid, hinge, exo_pair and robust.
        totals: the divisors of the whole step, if these examples are a part of it.
        step: all pairs of the step, if these are a part of it; for DPO's aot and aot_unpaired.
        backend: "triton" (CUDA and ROCm, float32), "torch" (anywhere), or "auto" for "triton" if it runs here.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device or setting, or a missing or unsupported argument of the loss. Only on a CPU is
            it checked that `segments` and `lengths` agree, because a check would make the host wait for a GPU. If they
            do not agree, the result is meaningless.
    """
    _check_tensors(logp, segments, lengths, reference=reference, log_sum_sq_probs=log_sum_sq_probs)
    _check_loss(loss, lengths, reference, labels, log_sum_sq_probs, scores)
    _check_of_examples(loss, _examples(loss, lengths, labels, scores), logp, weights=weights, margins=margins)
    _check_settings(labels, kl, totals, step, backend)
    _check_segments(segments, lengths, completions=_completions(loss, lengths, labels), scores=scores)
    weights, margins = (None if given is None else given.detach().to(logp.dtype) for given in (weights, margins))
    if takes_triton(backend, logp, loss):
        return _fused(logp, segments, lengths, loss, reference, labels, kl, log_sum_sq_probs, weights, margins, totals)
    if loss.supervised:
        return sft_loss(logp, segments, lengths, weights, totals)
    if loss.listwise:
        assert reference is not None
        assert scores is not None
        sums, reference_sums = (
            sequence_sums(values, segments, len(lengths)).view(scores.shape[1], -1).T
            for values in (logp, reference.detach().to(logp.dtype))
        )
        return list_loss(ListLogps(sums, reference_sums, scores.detach().to(logp.dtype), weights), loss, totals)
    if isinstance(loss, KTO):
        assert reference is not None
        assert labels is not None
        sums, reference_sums = (
            sequence_sums(values, segments, len(lengths))[: len(labels)]
            for values in (logp, reference.detach().to(logp.dtype))
        )
        return kto_loss(RowLogps(sums, reference_sums, labels, weights), loss, kl, totals)
    pairs = pair_logps(logp, segments, lengths, loss, reference=reference, log_sum_sq_probs=log_sum_sq_probs)
    return pair_loss(replace(pairs, pair_weights=weights, margins=margins), loss, totals, step)


def scores_prompts(loss: LossOptions) -> bool:
    """Return whether the loss also scores the tokens of prompts."""
    return isinstance(loss, ORPO) and loss.nll_on == "all"


# --- sums over sequences ----------------------------------------------------------------------------------------------


def sequence_sums(
    values: Tensor,  # [N] one per scored token
    segments: Tensor,  # [N] int64
    count: int,
) -> Tensor:
    """Return the sums over the scored tokens of each sequence, [count]."""
    return values.new_zeros(count).index_add(0, segments, values)


def pair_logps(
    logp: Tensor,  # [N]
    segments: Tensor,  # [N] int64
    lengths: Tensor,  # [S] int64
    loss: LossOptions,
    *,
    reference: Tensor | None = None,  # [N]
    log_sum_sq_probs: Tensor | None = None,  # [N]
) -> PairLogps:
    """Return the argument of `pair_loss`: sums by completion, and the further values that the options need."""
    sequences = len(lengths)
    count = _completions(loss, lengths, None) // 2
    weights = None
    if isinstance(loss, DPO) and loss.length_alpha != 1:
        shorter = torch.minimum(lengths[:count], lengths[count:])
        weights = length_weights(_offsets(segments, sequences), shorter[segments % count], loss.length_alpha)

    def weighted_sums(values: Tensor) -> Tensor:
        return sequence_sums(values if weights is None else values * weights, segments, sequences)

    sums, sizes = weighted_sums(logp), lengths.to(logp.dtype)
    pairs = PairLogps(sums[:count], sums[count : 2 * count], sizes[:count], sizes[count : 2 * count])
    if reference is not None:
        reference_sums = weighted_sums(reference.detach().to(logp.dtype))
        pairs = replace(pairs, ref_chosen=reference_sums[:count], ref_rejected=reference_sums[count : 2 * count])
    if weights is not None:  # the supervised term is not weighted
        pairs = replace(pairs, nll=sequence_sums(logp, segments, sequences)[:count], nll_lengths=sizes[:count])
    if scores_prompts(loss):
        nll, nll_lengths = sums[:count] + sums[2 * count :], sizes[:count] + sizes[2 * count :]
        pairs = replace(pairs, nll=nll, nll_lengths=nll_lengths)
    if isinstance(loss, DPO) and loss.weighting and log_sum_sq_probs is not None:
        aligned = sequence_sums((logp - log_sum_sq_probs).detach(), segments, sequences) / sizes
        pairs = replace(pairs, weights=wpo_weights(aligned[:count], aligned[count:]))
    return pairs


def _completions(loss: LossOptions, lengths: Tensor, labels: Tensor | None) -> int:
    """Return the number of sequences that are completions: 2P, or R."""
    if labels is not None:
        return len(labels)
    return len(lengths) // 3 * 2 if scores_prompts(loss) else len(lengths)


def _examples(loss: LossOptions, lengths: Tensor, labels: Tensor | None, scores: Tensor | None) -> int:
    """Return the number of pairs or rows."""
    if scores is not None:
        return len(scores)
    if loss.supervised:
        return len(lengths)
    return len(labels) if labels is not None else _completions(loss, lengths, None) // 2


def _starts(segments: Tensor, count: int) -> Tensor:
    places = torch.arange(len(segments), device=segments.device)
    return places.new_full((count,), len(segments)).scatter_reduce(0, segments, places, "amin")


def _offsets(segments: Tensor, count: int) -> Tensor:
    """Return each token's index in its sequence, [N]."""
    return torch.arange(len(segments), device=segments.device) - _starts(segments, count)[segments]


# --- Triton -----------------------------------------------------------------------------------------------------------


def _fused(
    logp: Tensor,
    segments: Tensor,
    lengths: Tensor,
    loss: LossOptions,
    reference: Tensor | None,
    labels: Tensor | None,
    kl: Tensor | float,
    log_sum_sq_probs: Tensor | None,
    weights: Tensor | None,
    margins: Tensor | None,
    totals: Totals | None,
) -> PreferenceLoss:
    spec = kernel_spec(loss)
    baseline = None
    if isinstance(loss, KTO):
        kl = kl if loss.kl == "batch" else 0.0
        baseline = kl.detach().to(logp) if isinstance(kl, Tensor) else logp.new_full((), kl)
    value, _, sequences, pairs = fused_loss(
        logp,
        _starts(segments, len(lengths)),
        lengths,
        None if reference is None else reference.detach().float(),
        labels,
        baseline,
        None if log_sum_sq_probs is None else log_sum_sq_probs.detach().float(),
        weights,
        margins,
        ",".join(spec.variants),
        spec.weights,
        spec.flags(),
        spec.numbers(),
        None if totals is None else float(totals.examples),
        None if totals is None else float(totals.nll_tokens),
    )
    sequences, pairs = sequences.detach(), pairs.detach()
    extra = {}
    if isinstance(loss, ORPO) or (isinstance(loss, SimPO | CPO) and loss.sft_weight):
        count = pairs.shape[1]
        scored = (lengths[:count].sum() + lengths[2 * count :].sum()).float()
        extra["nll_loss"] = (-pairs[0].sum(), scored)
        if isinstance(loss, ORPO):
            extra["log_odds_ratio"] = (pairs[2].sum(), pairs.new_full((), count))
            extra["log_odds_chosen"] = (pairs[1].sum(), pairs.new_full((), count))
    reference_sums = sequences[1] if spec.reference else None
    return PreferenceLoss(value, sequences[0], reference_sums, sequences[2], labels, extra)


# --- arguments --------------------------------------------------------------------------------------------------------


def _check_tensors(logp: Any, segments: Any, lengths: Any, **optional: Any) -> None:
    """Check the types, dtypes, devices and sizes of `lengths` and of the tensors with one entry for each token."""
    given = {"logp": logp, "segments": segments, "lengths": lengths}
    given |= {name: value for name, value in optional.items() if value is not None}
    for name, value in given.items():
        _ARGUMENTS.check_tensor(name, value, 1, logp)
        if name in ("segments", "lengths"):
            _ARGUMENTS.check_dtype(name, value.dtype, torch.int64)
        if name != "lengths" and len(value) != len(logp):
            raise ValueError(f"preference_loss: {name} has {len(value)} entries, logp has {len(logp)}")
    _ARGUMENTS.check_dtype("logp", logp.dtype, torch.float32, torch.float64)
    for name in optional:
        if name in given and not given[name].is_floating_point():
            raise TypeError(f"preference_loss: {name} must be of floating point, got {given[name].dtype}")


def _check_loss(
    loss: Any, lengths: Tensor, reference: Tensor | None, labels: Any, log_sum_sq_probs: Tensor | None, scores: Any
) -> None:
    """Check that a loss has the arguments that it needs, and no others."""
    if not isinstance(loss, LossOptions):
        raise TypeError(f"preference_loss: loss must be options such as DPO(), got {type(loss).__name__}")
    weighting = isinstance(loss, DPO) and loss.weighting
    wanted = {
        "reference": (reference, loss.uses_reference),
        "labels": (labels, isinstance(loss, KTO)),
        "log_sum_sq_probs": (log_sum_sq_probs, weighting),
        "scores": (scores, loss.listwise),
    }
    for name, (value, needed) in wanted.items():
        if (value is not None) != needed:
            raise ValueError(f"preference_loss: {loss.type} {'needs' if needed else 'takes no'} {name}")
    count = len(lengths)
    if labels is not None:
        if not isinstance(labels, Tensor) or labels.dtype != torch.bool:
            given = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
            raise TypeError(f"preference_loss: labels must be a torch.bool tensor, got {given}")
        _ARGUMENTS.check_device("labels", labels.device, lengths)
        if labels.dim() != 1 or len(labels) == 0 or count not in (len(labels), 2 * len(labels)):
            raise ValueError(
                f"preference_loss: lengths has {count} entries, labels has shape {tuple(labels.shape)}; there must be "
                "one row a label, or two"
            )
        return
    if scores is not None:
        _ARGUMENTS.check_tensor("scores", scores, 2, lengths)
        if not scores.is_floating_point():
            raise TypeError(f"preference_loss: scores must be of floating point, got {scores.dtype}")
        if scores.numel() != count or count == 0:
            raise ValueError(
                f"preference_loss: lengths has {count} entries, scores has shape {tuple(scores.shape)}; there must be "
                "one sequence a score"
            )
        return
    groups = 1 if loss.supervised else 3 if scores_prompts(loss) else 2
    if count == 0 or count % groups:
        if groups == 1:
            raise ValueError("preference_loss: lengths has no entries; there must be at least one completion")
        what = "chosen, rejected and prompt" if groups == 3 else "chosen and rejected"
        raise ValueError(f"preference_loss: lengths has {count} entries; there must be as many {what} sequences")


def _check_of_examples(loss: LossOptions, count: int, like: Tensor, **given: Any) -> None:
    """Check the tensors with one number for each pair or row."""
    for name, reason in (("weights", loss.no_weights), ("margins", loss.no_margins)):
        values = given[name]
        if values is None:
            continue
        if reason:
            raise ValueError(f"preference_loss: {loss.type} takes no {name}: {reason}")
        _ARGUMENTS.check_tensor(name, values, 1, like)
        if not values.is_floating_point():
            raise TypeError(f"preference_loss: {name} must be of floating point, got {values.dtype}")
        if len(values) != count:
            raise ValueError(f"preference_loss: {name} has {len(values)} entries, there are {count} {loss.unit}s")


def _check_settings(labels: Tensor | None, kl: Any, totals: Any, step: Any, backend: Any) -> None:
    if isinstance(kl, Tensor):
        if kl.numel() != 1:
            raise ValueError(f"preference_loss: kl must be a scalar, got shape {tuple(kl.shape)}")
    elif not is_number(kl):
        raise TypeError(f"preference_loss: kl must be a number or a tensor, got {kl!r}")
    elif labels is None and kl != 0:
        raise ValueError(f"preference_loss: only kto takes kl, got {kl}")
    if totals is not None:
        if not isinstance(totals, Totals):
            raise TypeError(f"preference_loss: totals must be losses.Totals, got {type(totals).__name__}")
        for name, value in (("examples", totals.examples), ("nll_tokens", totals.nll_tokens)):
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"preference_loss: totals.{name} must be above 0, got {value}")
    if step is not None and not isinstance(step, WholeStep):
        raise TypeError(f"preference_loss: step must be losses.WholeStep, got {type(step).__name__}")
    _ARGUMENTS.check_backend(backend)


def _check_segments(segments: Tensor, lengths: Tensor, completions: int, scores: Tensor | None) -> None:
    """Check on a CPU, outside of tracing, that segments and lengths agree and that no completion is empty.

    With `scores`, exactly the completions without one are empty.
    """
    if segments.device.type != "cpu" or type(segments) is not Tensor or torch.compiler.is_compiling():
        return
    count = len(lengths)
    if len(segments) and not 0 <= int(segments.min()) <= int(segments.max()) < count:
        wrong = int(segments.min()) if segments.min() < 0 else int(segments.max())
        raise ValueError(f"preference_loss: segments holds {wrong}, lengths has entries 0 to {count - 1}")
    counts = torch.bincount(segments, minlength=count)
    for sequence in (counts != lengths).nonzero().flatten().tolist():
        raise ValueError(
            f"preference_loss: lengths[{sequence}] is {int(lengths[sequence])}, segments holds {sequence} "
            f"{int(counts[sequence])} times"
        )
    if scores is not None:
        absent = scores.isnan().T.flatten()
        for sequence in ((lengths == 0) != absent).nonzero().flatten().tolist():
            what = "has no score" if absent[sequence] else "has a score and no tokens"
            raise ValueError(f"preference_loss: completion {sequence} of {int(lengths[sequence])} tokens {what}")
    elif int((lengths[:completions] == 0).sum()):
        empty = int((lengths[:completions] == 0).nonzero()[0])
        raise ValueError(f"preference_loss: lengths[{empty}] is 0; a completion has at least one token")
    first = torch.ones_like(segments, dtype=torch.bool)
    first[1:] = segments[1:] != segments[:-1]
    if int(first.sum()) != int((lengths > 0).sum()):
        repeated = torch.bincount(segments[first], minlength=count).argmax()
        raise ValueError(f"preference_loss: the tokens of sequence {int(repeated)} do not lie together in segments")
