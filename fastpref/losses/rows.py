"""KTO, the loss of single completions, as a pure function of their log-probabilities."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastpref.config.losses import KTO
from fastpref.losses.result import PreferenceLoss, Totals


@dataclass(frozen=True)
class RowLogps:
    """The log-probabilities of R single completions, each labelled desirable or not."""

    logps: Tensor  # [R]
    ref_logps: Tensor  # [R]
    labels: Tensor  # [R] bool
    row_weights: Tensor | None = None  # [R] the factors of the rows' terms; 1 if None


def kto_loss(
    rows: RowLogps,
    options: KTO | None = None,
    kl: Tensor | float = 0.0,  # scalar, of `kto_kl`; ignored when options.kl is "none"
    totals: Totals | None = None,
) -> PreferenceLoss:
    """Compute KTO (Ethayarajh et al., arXiv 2402.01306), the mean of these terms over the rows.

    A desirable row has the term w_d·(1 − σ(β(ratio − KL))), an undesirable one w_u·(1 − σ(β(KL − ratio))), where
    ratio = logp − ref. Rewards are β·ratio. Without KL it is APO-zero for single completions (arXiv 2408.06266).
    `rows.row_weights` multiply the terms, and change neither the divisor nor the KL.
    """
    options = options or KTO()
    ratio = rows.logps - rows.ref_logps
    baseline = torch.as_tensor(kl).detach().to(ratio) if options.kl == "batch" else ratio.new_zeros(())
    sign = torch.where(rows.labels, 1.0, -1.0).to(ratio)
    weight = torch.full_like(ratio, options.desirable_weight).where(rows.labels, options.undesirable_weight)
    if rows.row_weights is not None:
        weight = weight * rows.row_weights
    losses = weight * torch.sigmoid(-sign * options.beta * (ratio - baseline))
    loss = losses.sum() / (len(ratio) if totals is None else totals.examples)
    rewards = options.beta * ratio.detach()
    return PreferenceLoss(loss, rows.logps.detach(), rows.ref_logps.detach(), rewards, rows.labels)


def kto_kl(
    logps: Tensor,  # [R] log-probabilities of the next row's completion after each prompt
    ref_logps: Tensor,  # [R]
) -> Tensor:
    """Return KTO's estimate of the KL divergence, max(0, mean(logp − ref)) over mismatched pairs, without gradient."""
    return (logps - ref_logps).detach().mean().clamp(min=0)
