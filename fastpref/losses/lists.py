"""The losses of lists: rows with any number of completions, each with a score, as pure functions.

For completion k of a row, r_k = β·(logp_k − ref_k) is the implicit reward and ψ_k its score, higher is better. All
tensors are float32 (or float64) [R, K], one row per list, unless noted otherwise. Rows may have fewer than K
completions: the scores of absent ones are NaN, and their log-probabilities do not matter.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpref.config.losses import PL, LiPO, LossOptions
from fastpref.losses.result import PreferenceLoss, Totals


@dataclass(frozen=True)
class ListLogps:
    """The log-probabilities of R lists of up to K completions, sums over their tokens, with the completions' scores."""

    logps: Tensor  # [R, K]
    ref_logps: Tensor  # [R, K] by the reference
    scores: Tensor  # [R, K], NaN where a completion is absent
    row_weights: Tensor | None = None  # [R] the factors of the rows' losses; 1 if None

    @property
    def present(self) -> Tensor:
        """Whether there is a completion, [R, K] bool."""
        return ~self.scores.isnan()

    def rewards(self, beta: float) -> Tensor:
        """Return the implicit rewards, 0 where a completion is absent."""
        return torch.where(self.present, beta * (self.logps - self.ref_logps), 0.0)


def list_loss(lists: ListLogps, options: LossOptions, totals: Totals | None = None) -> PreferenceLoss:
    """Compute the loss of lists that `options` selects, by the function of that loss."""
    if isinstance(options, PL):
        return pl_loss(lists, options, totals)
    if isinstance(options, LiPO):
        return lipo_loss(lists, options, totals)
    raise TypeError(f"list_loss: {type(options).__name__} is not a loss of lists")


def pl_loss(lists: ListLogps, options: PL | None = None, totals: Totals | None = None) -> PreferenceLoss:
    """Compute Plackett–Luce DPO (arXiv 2305.18290, appendix A.3), the mean over rows of Σ_k log Σ_j e^{r_j − r_k}.

    j runs over the completions that are no better than k, itself included: each completion competes with those that
    rank equal or below (Breslow's rule for ties). Two completions with different scores give DPO's sigmoid loss.
    """
    options = options or PL()
    rewards, scores = lists.rewards(options.beta), lists.scores
    competes = scores[:, None, :] <= scores[:, :, None]  # [R, k, j]; False where one is absent
    competes |= torch.eye(scores.shape[1], dtype=torch.bool, device=scores.device)  # an absent one with itself: 0
    others = rewards[:, None, :].expand(competes.shape).masked_fill(~competes, -math.inf)
    return _result(lists, rewards, (others.logsumexp(2) - rewards).sum(1), totals)


def lipo_loss(lists: ListLogps, options: LiPO | None = None, totals: Totals | None = None) -> PreferenceLoss:
    """Compute LiPO-λ (arXiv 2402.01878), the mean over rows of Σ_{ψ_i > ψ_j} Δ_ij·(−logσ(r_i − r_j)).

    Δ_ij = |2^ψ_i − 2^ψ_j|·|1/log(1 + τ_i) − 1/log(1 + τ_j)|, without gradient. The scores ψ are moved and scaled to
    [0, 1] in each row. τ_k is the rank of completion k by its reward, from 1. Of equal rewards the worse completion
    ranks first, so that the order in which they are given does not matter and a policy that equals its reference has a
    gradient.
    """
    options = options or LiPO()
    rewards = lists.rewards(options.beta)
    gains = torch.exp2(_scaled(lists.scores))
    discounts = 1 / torch.log1p(_reward_ranks(rewards.detach(), lists.scores).to(rewards))
    better = lists.scores[:, :, None] > lists.scores[:, None, :]  # [R, i, j]; False where one is absent
    lambdas = _differences(gains).abs() * _differences(discounts).abs()
    losses = torch.where(better, lambdas, 0.0) * -F.logsigmoid(_differences(rewards))
    return _result(lists, rewards, losses.sum((1, 2)), totals)


def _differences(values: Tensor) -> Tensor:
    """Return values[i] − values[j] within each row, [R, K, K]."""
    return values[:, :, None] - values[:, None, :]


def _scaled(scores: Tensor) -> Tensor:
    """Return the scores of each row moved and scaled to [0, 1]; 0 where all are equal or a completion is absent."""
    low = scores.nan_to_num(nan=math.inf).amin(1, keepdim=True)
    high = scores.nan_to_num(nan=-math.inf).amax(1, keepdim=True)
    spread = torch.where(high > low, high - low, 1.0)
    return ((scores - low) / spread).nan_to_num(nan=0.0)


def _reward_ranks(rewards: Tensor, scores: Tensor) -> Tensor:
    """Return one plus the number of completions that rank above each one: of a higher reward, or worse at the same."""
    mine, theirs = rewards[:, :, None], rewards[:, None, :]
    worse = scores[:, None, :] < scores[:, :, None]
    above = ((theirs > mine) | ((theirs == mine) & worse)) & ~scores[:, None, :].isnan()
    return above.sum(2) + 1


def _result(lists: ListLogps, rewards: Tensor, losses: Tensor, totals: Totals | None) -> PreferenceLoss:
    """Return the mean loss, with the sums and rewards of each row's best-scored and worst-scored completion."""
    rows, count = losses.shape[0], losses.shape[0] if totals is None else totals.examples
    weighted = losses if lists.row_weights is None else losses * lists.row_weights
    best = lists.scores.nan_to_num(nan=-math.inf).argmax(1)
    worst = lists.scores.nan_to_num(nan=math.inf).argmin(1)
    row = torch.arange(rows, device=losses.device)

    def sides(values: Tensor) -> Tensor:
        return torch.cat([values[row, best], values[row, worst]]).detach()

    return PreferenceLoss(
        weighted.sum() / count,
        sides(lists.logps),
        sides(lists.ref_logps),
        sides(rewards),
        extra={"rewards/kendall_tau": _kendall_tau(rewards.detach(), lists.scores)},
        sequences=torch.cat([best * rows + row, worst * rows + row]),
    )


def _kendall_tau(rewards: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return Kendall's τ of rewards and scores, summed over the rows, and the number of rows that have one.

    τ is the mean over the pairs with different scores: 1 where the rewards have their order, −1 where they have the
    opposite one, 0 where they are equal.
    """
    better = scores[:, :, None] > scores[:, None, :]
    agreement = torch.where(better, torch.sign(_differences(rewards)), 0.0).sum((1, 2))
    pairs = better.sum((1, 2))
    return (agreement / pairs.clamp(min=1)).sum(), (pairs > 0).sum()
