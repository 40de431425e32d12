"""The losses of pairs, as pure functions of the log-probabilities of whole completions.

For a completion s with `logp_s`, the sum over its n_s tokens: avg_s = logp_s/n_s, ratio_s = logp_s − ref_s, and the
implicit reward r_s = β·ratio_s. For a pair, c is the chosen and r the rejected completion, Δ = ratio_c − ratio_r;
σ is the logistic function, ε the label smoothing.

The loss of a step is the mean over its pairs; supervised terms are the mean over the step's chosen tokens. The weight
w of a pair multiplies its loss and its supervised terms, but not its share of the two divisors, so that a weight of 2
counts as the pair twice. A function that gets only a part of a step also gets the step's `Totals`, so that the losses
of the parts add up to the step's. All tensors are float32 (or float64) [P], one entry per pair, unless noted otherwise.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpref.config.losses import CPO, DPO, IPO, ORPO, LossOptions, SimPO
from fastpref.losses.result import PreferenceLoss, Totals


@dataclass(frozen=True)
class PairLogps:
    """The log-probabilities of P pairs: sums over each completion's tokens."""

    chosen: Tensor  # [P]
    rejected: Tensor  # [P]
    chosen_lengths: Tensor  # [P] tokens
    rejected_lengths: Tensor  # [P]
    ref_chosen: Tensor | None = None  # [P] by the reference
    ref_rejected: Tensor | None = None  # [P]
    nll: Tensor | None = None  # [P] sums of the supervised terms, if not `chosen`
    nll_lengths: Tensor | None = None  # [P]
    weights: Tensor | None = None  # [P] of `wpo_weights`, without effect on supervised terms
    pair_weights: Tensor | None = None  # [P] the factors of all terms; 1 if None
    margins: Tensor | None = None  # [P] subtracted from a difference of rewards; the loss's own if None

    def detach(self) -> "PairLogps":
        return replace(self, **{name: t.detach() for name, t in vars(self).items() if t is not None})

    @property
    def ratios(self) -> tuple[Tensor, Tensor]:
        """The log-ratios of the chosen and of the rejected completions to the reference."""
        assert self.ref_chosen is not None
        assert self.ref_rejected is not None
        return self.chosen - self.ref_chosen, self.rejected - self.ref_rejected

    @property
    def supervised(self) -> tuple[Tensor, Tensor]:
        """The log-probabilities and lengths of the supervised terms."""
        logps = self.chosen if self.nll is None else self.nll
        return logps, self.chosen_lengths if self.nll_lengths is None else self.nll_lengths


@dataclass(frozen=True)
class WholeStep:
    """All pairs of the step, without gradient, and the indices of this part's pairs, for losses that sort the step."""

    pairs: PairLogps
    index: Tensor  # [P] int64


def pair_loss(
    pairs: PairLogps, options: LossOptions, totals: Totals | None = None, step: WholeStep | None = None
) -> PreferenceLoss:
    """Compute the loss of pairs that `options` selects, by the function of that loss."""
    if isinstance(options, DPO):
        return dpo_loss(pairs, options, totals, step)
    if isinstance(options, IPO):
        return dpo_loss(pairs, options.as_dpo(), totals, step)
    if isinstance(options, ORPO):
        return orpo_loss(pairs, options, totals)
    if isinstance(options, SimPO):
        return simpo_loss(pairs, options, totals)
    if isinstance(options, CPO):
        return cpo_loss(pairs, options, totals)
    raise TypeError(f"pair_loss: {type(options).__name__} is not a loss of pairs")


def dpo_loss(
    pairs: PairLogps, options: DPO | None = None, totals: Totals | None = None, step: WholeStep | None = None
) -> PreferenceLoss:
    """Compute DPO (Rafailov et al., arXiv 2305.18290) or variants of it: Σ weight · mean(variant).

    `_VARIANTS` lists the formulas. `options.f_divergence` (arXiv 2309.16240) replaces the ratio in the losses of Δ.
    `pairs.weights` (WPO, arXiv 2406.11827) multiply every variant except `sft`. `pairs.margins` (ODPO, arXiv
    2402.10571) are subtracted from βΔ in sigmoid, hinge, exo_pair and robust. Rewards are β·ratio. Raises ValueError
    without reference log-probabilities, and for margins or pair weights that a variant does not take.
    """
    options = options or DPO()
    _check_extras("dpo_loss", pairs, options)
    if pairs.ref_chosen is None or pairs.ref_rejected is None:
        raise ValueError("dpo_loss: pairs.ref_chosen and pairs.ref_rejected are needed")
    if options.weighting and pairs.weights is None:
        raise ValueError("dpo_loss: options.weighting needs pairs.weights, see wpo_weights")
    totals = totals or _own_totals(pairs)
    if options.sorts_step and step is None and totals.examples != len(pairs.chosen):
        raise ValueError(f"dpo_loss: {', '.join(options.variants)} sort the whole step; a part of it needs `step`")
    view = _PairView(pairs, options, step or WholeStep(pairs.detach(), torch.arange(len(pairs.chosen))))
    loss = pairs.chosen.new_zeros(())
    for name, weight in zip(options.variants, options.weights or (1.0,) * len(options.variants), strict=True):
        if name == "sft":
            loss = loss + weight * _nll(pairs, totals)
            continue
        per_pair = _VARIANTS[name](view)
        if pairs.weights is not None:
            per_pair = per_pair * pairs.weights
        loss = loss + weight * _mean(per_pair, pairs, totals)
    return _result(loss, pairs, options.beta * view.ratio_chosen, options.beta * view.ratio_rejected)


class _PairView:
    """The terms from which the variants are computed."""

    def __init__(self, pairs: PairLogps, options: DPO, step: WholeStep):
        self.options, self.pairs, self.step = options, pairs, step
        self.beta, self.eps = options.beta, options.label_smoothing
        self.ratio_chosen, self.ratio_rejected = pairs.ratios
        self.score_chosen = _divergence_score(self.ratio_chosen, options)
        self.score_rejected = _divergence_score(self.ratio_rejected, options)
        self.x = self.beta * (self.score_chosen - self.score_rejected)  # βΔ
        if pairs.margins is not None:
            self.x = self.x - pairs.margins
        self.r_chosen, self.r_rejected = self.beta * self.ratio_chosen, self.beta * self.ratio_rejected

    @property
    def mean_difference(self) -> Tensor:
        """The difference Δ of the scores per token."""
        return self.score_chosen / self.pairs.chosen_lengths - self.score_rejected / self.pairs.rejected_lengths


def _divergence_score(ratio: Tensor, options: DPO) -> Tensor:
    """Return f′(e^ratio) of the divergence, up to a constant."""
    if options.f_divergence == "forward_kl":
        return -_bounded_expm1(-ratio)
    if options.f_divergence == "js":
        return math.log(2) + F.logsigmoid(ratio)
    if options.f_divergence == "alpha" and abs(options.f_alpha - 1) >= 1e-6:
        power = options.f_alpha - 1
        return _bounded_expm1(power * ratio) / power
    return ratio


def _bounded_expm1(x: Tensor) -> Tensor:
    """Return eˣ − 1, constant for x > 80, where float32 is still finite."""
    return torch.expm1(x.clamp(max=80.0))


def _bounded_square(x: Tensor) -> Tensor:
    """Return x², constant for |x| > 1e18, where float32 is still finite."""
    return x.clamp(-1e18, 1e18).square()


def _smoothed(x: Tensor, eps: float) -> Tensor:
    """Return −(1−ε)·logσ(x) − ε·logσ(−x)."""
    loss = -F.logsigmoid(x)
    return loss if not eps else (1 - eps) * loss - eps * F.logsigmoid(-x)


def _exo_pair(v: _PairView) -> Tensor:
    log_q, log_not_q = F.logsigmoid(v.x), F.logsigmoid(-v.x)
    return log_q.exp() * (log_q - math.log1p(-v.eps)) + log_not_q.exp() * (log_not_q - math.log(v.eps))


def _robust(v: _PairView) -> Tensor:
    return (-(1 - v.eps) * F.logsigmoid(v.x) + v.eps * F.logsigmoid(-v.x)) / (1 - 2 * v.eps)


def _discopop(v: _PairView) -> Tensor:
    m = v.x / v.options.discopop_tau
    exponential = (F.logsigmoid(m) - v.x).clamp(max=80.0).exp()  # e^{−x}·m, never e^{−x} alone; grows if τ > 1
    return -F.logsigmoid(v.x) * torch.sigmoid(-m) + exponential


def _aot(v: _PairView) -> Tensor:
    """Compare each pair's policy difference with the reference difference of the same rank in the step."""
    whole = v.step.pairs
    assert whole.ref_chosen is not None
    assert whole.ref_rejected is not None
    reference = (whole.ref_chosen - whole.ref_rejected).sort().values
    rank = _ranks(whole.chosen - whole.rejected)[v.step.index]
    return _smoothed(v.beta * (v.pairs.chosen - v.pairs.rejected - reference[rank]), v.eps)


def _aot_unpaired(v: _PairView) -> Tensor:
    """Compare the k-th largest chosen ratio of the step with the k-th largest rejected ratio.

    A partner may be in another micro-batch. So each side is compared with its partner's value without gradient, and the
    rejected side's term contributes only its gradient.
    """
    chosen, rejected = v.step.pairs.ratios
    for_chosen = rejected.sort().values[_ranks(chosen)[v.step.index]]
    for_rejected = chosen.sort().values[_ranks(rejected)[v.step.index]]
    own = _smoothed(v.beta * (v.ratio_chosen - for_chosen), v.eps)
    partner = _smoothed(v.beta * (for_rejected - v.ratio_rejected), v.eps)
    return own + (partner - partner.detach())


def _ranks(values: Tensor) -> Tensor:
    return values.argsort(stable=True).argsort(stable=True)


_VARIANTS: dict[str, Callable[[_PairView], Tensor]] = {
    # −logσ(βΔ), smoothed as in conservative DPO; arXiv 2305.18290
    "sigmoid": lambda v: _smoothed(v.x, v.eps),
    # max(0, 1 − βΔ); SLiC, arXiv 2305.10425
    "hinge": lambda v: torch.relu(1 - v.x),
    # (Δ per token − 1/(2β))²; arXiv 2310.12036
    "ipo": lambda v: _bounded_square(v.mean_difference - 1 / (2 * v.beta)),
    # KL of σ(βΔ) from (1−ε, ε); arXiv 2402.00856
    "exo_pair": _exo_pair,
    # −logσ(r_c) − ½logσ(−r_c) − ½logσ(−r_r); arXiv 2402.05369
    "nca_pair": lambda v: (
        -F.logsigmoid(v.r_chosen) - 0.5 * F.logsigmoid(-v.r_chosen) - 0.5 * F.logsigmoid(-v.r_rejected)
    ),
    # (−(1−ε)·logσ(βΔ) + ε·logσ(−βΔ))/(1−2ε); arXiv 2403.00409
    "robust": _robust,
    # −logσ(r_c) − logσ(−r_r): δ, the running mean reward, is 0; arXiv 2404.04656
    "bco_pair": lambda v: -F.logsigmoid(v.r_chosen) - F.logsigmoid(-v.r_rejected),
    # (ratio_c − ½/β)² + (ratio_r + ½/β)²; arXiv 2405.00675
    "sppo_hard": lambda v: (v.ratio_chosen - 0.5 / v.beta).square() + (v.ratio_rejected + 0.5 / v.beta).square(),
    # −logσ(β·difference of sorted log-ratios), smoothed; arXiv 2406.05882
    "aot": _aot,
    "aot_unpaired": _aot_unpaired,
    # 1 − σ(r_c) + σ(r_r); arXiv 2408.06266
    "apo_zero": lambda v: torch.sigmoid(-v.r_chosen) + torch.sigmoid(v.r_rejected),
    # σ(r_c) + 1 − σ(r_c − r_r); arXiv 2408.06266
    "apo_down": lambda v: torch.sigmoid(v.r_chosen) + torch.sigmoid(v.r_rejected - v.r_chosen),
    # −logσ(x)(1−m) + e^{−x}m, x = βΔ, m = σ(x/τ); arXiv 2406.08414
    "discopop": _discopop,
    # −logσ(βΔ per token); Tülu 3, arXiv 2411.15124
    "sigmoid_norm": lambda v: -F.logsigmoid(v.beta * v.mean_difference),
}


def orpo_loss(pairs: PairLogps, options: ORPO | None = None, totals: Totals | None = None) -> PreferenceLoss:
    """Compute ORPO (Hong et al., arXiv 2403.07691): NLL(chosen) − β · mean logσ(log odds ratio).

    log odds ratio = (avg_c − log(1 − e^{avg_c})) − (avg_r − log(1 − e^{avg_r})). The NLL is the mean over all chosen
    tokens of the step, including prompts if `pairs.nll` does. Rewards are β·avg.
    """
    options = options or ORPO()
    _check_extras("orpo_loss", pairs, options)
    totals = totals or _own_totals(pairs)
    chosen, rejected = pairs.chosen / pairs.chosen_lengths, pairs.rejected / pairs.rejected_lengths
    log_odds = (chosen - _log1mexp(chosen)) - (rejected - _log1mexp(rejected))
    ratio = F.logsigmoid(log_odds)
    loss = _nll(pairs, totals) - options.beta * _mean(ratio, pairs, totals)
    count = ratio.new_tensor(float(len(ratio)))
    extra = {"nll_loss": _nll_metric(pairs), "log_odds_ratio": (ratio.detach().sum(), count)}
    extra["log_odds_chosen"] = (log_odds.detach().sum(), count)
    return _result(loss, pairs, options.beta * chosen, options.beta * rejected, extra)


def simpo_loss(pairs: PairLogps, options: SimPO | None = None, totals: Totals | None = None) -> PreferenceLoss:
    """Compute SimPO (Meng et al., arXiv 2405.14734): −logσ(β(avg_c − avg_r) − γ), smoothed, + sft_weight · NLL(chosen).

    With `alpha` ≠ 0 (AlphaPO, arXiv 2501.03884) avg becomes (1 − e^{−α·avg})/α. `pairs.margins` are γ by pair, in place
    of the option. Rewards are β·avg.
    """
    options = options or SimPO()
    totals = totals or _own_totals(pairs)
    chosen = _alpha_reward(pairs.chosen / pairs.chosen_lengths, options.alpha)
    rejected = _alpha_reward(pairs.rejected / pairs.rejected_lengths, options.alpha)
    gamma = options.margin if pairs.margins is None else pairs.margins
    losses = _smoothed(options.beta * (chosen - rejected) - gamma, options.label_smoothing)
    loss, extra = _with_sft(_mean(losses, pairs, totals), pairs, options.sft_weight, totals)
    return _result(loss, pairs, options.beta * chosen, options.beta * rejected, extra)


def cpo_loss(pairs: PairLogps, options: CPO | None = None, totals: Totals | None = None) -> PreferenceLoss:
    """Compute CPO (Xu et al., arXiv 2401.08417): −logσ(β(logp_c − logp_r)), smoothed, + sft_weight · NLL(chosen).

    `variant` "hinge" is max(0, 1 − β(logp_c − logp_r)); "ipo" is (avg_c − avg_r − 1/(2β))². With `alpha` ≠ 0
    (AlphaPO) the log-probability becomes (1 − e^{−α·logp})/α. `pairs.margins` are subtracted from β(logp_c − logp_r);
    "ipo" takes none, and raises ValueError. Rewards are β·logp (of averages for "ipo").
    """
    options = options or CPO()
    _check_extras("cpo_loss", pairs, options)
    totals = totals or _own_totals(pairs)
    chosen, rejected = pairs.chosen, pairs.rejected
    if options.variant == "ipo":
        chosen, rejected = chosen / pairs.chosen_lengths, rejected / pairs.rejected_lengths
    chosen, rejected = _alpha_reward(chosen, options.alpha), _alpha_reward(rejected, options.alpha)
    difference = chosen - rejected
    x = options.beta * difference - (0 if pairs.margins is None else pairs.margins)
    if options.variant == "sigmoid":
        losses = _smoothed(x, options.label_smoothing)
    elif options.variant == "hinge":
        losses = torch.relu(1 - x)
    else:
        losses = _bounded_square(difference - 1 / (2 * options.beta))
    loss, extra = _with_sft(_mean(losses, pairs, totals), pairs, options.sft_weight, totals)
    return _result(loss, pairs, options.beta * chosen, options.beta * rejected, extra)


def length_weights(
    offsets: Tensor,  # [N] each token's index in its completion, from 0
    shorter: Tensor,  # [N] length of the shorter completion of its pair
    alpha: float,
) -> Tensor:
    """Return LD-DPO's weights (arXiv 2409.06411), [N] float32: alpha past the shorter completion's length, 1 before."""
    return torch.where(offsets < shorter, 1.0, alpha)


def wpo_weights(
    chosen: Tensor,  # [P] mean over a completion's tokens of logp − log Σp²
    rejected: Tensor,  # [P]
) -> Tensor:
    """Return WPO's weights (Zhou et al., arXiv 2406.11827, eq. 2), without gradient: how on-policy each pair is."""
    return (chosen + rejected).detach().exp()


def _result(
    loss: Tensor,
    pairs: PairLogps,
    chosen_rewards: Tensor,  # [P]
    rejected_rewards: Tensor,  # [P]
    extra: dict[str, tuple[Tensor, Tensor]] | None = None,
) -> PreferenceLoss:
    pairs, reference = pairs.detach(), None
    if pairs.ref_chosen is not None and pairs.ref_rejected is not None:
        reference = torch.cat([pairs.ref_chosen, pairs.ref_rejected])
    rewards = torch.cat([chosen_rewards, rejected_rewards]).detach()
    return PreferenceLoss(loss, torch.cat([pairs.chosen, pairs.rejected]), reference, rewards, extra=extra or {})


def _own_totals(pairs: PairLogps) -> Totals:
    return Totals(len(pairs.chosen), float(pairs.supervised[1].sum()))


def _check_extras(name: str, pairs: PairLogps, options: LossOptions) -> None:
    for what, given, reason in (
        ("margins", pairs.margins, options.no_margins),
        ("pair_weights", pairs.pair_weights, options.no_weights),
    ):
        if given is not None and reason:
            raise ValueError(f"{name}: {options.type} takes no pairs.{what}: {reason}")


def _mean(
    losses: Tensor,  # [P]
    pairs: PairLogps,
    totals: Totals,
) -> Tensor:
    """Return this part's share of the mean of weighted losses over the step's pairs."""
    return (losses if pairs.pair_weights is None else losses * pairs.pair_weights).sum() / totals.examples


def _nll(pairs: PairLogps, totals: Totals) -> Tensor:
    logps = pairs.supervised[0]
    return -(logps if pairs.pair_weights is None else logps * pairs.pair_weights).sum() / totals.nll_tokens


def _nll_metric(pairs: PairLogps) -> tuple[Tensor, Tensor]:
    logps, lengths = pairs.supervised
    return -logps.detach().sum(), lengths.sum()


def _with_sft(loss: Tensor, pairs: PairLogps, weight: float, totals: Totals) -> tuple[Tensor, dict]:
    if not weight:
        return loss, {}
    return loss + weight * _nll(pairs, totals), {"nll_loss": _nll_metric(pairs)}


def _alpha_reward(logps: Tensor, alpha: float) -> Tensor:
    """Return (1 − p^{−α})/α for p = e^logps, or its limit, logps, for α = 0."""
    return -_bounded_expm1(-alpha * logps) / alpha if alpha else logps


def _log1mexp(x: Tensor) -> Tensor:
    """Return log(1 − eˣ) for x ≤ 0, accurate at both ends. x is at most −1e-30, so that the result stays finite."""
    x = x.clamp(max=-1e-30)
    near_zero = x > -math.log(2)
    # Each branch gets only the values for which it is accurate, so gradients stay finite.
    small, large = torch.where(near_zero, x, -1.0), torch.where(near_zero, -1.0, x)
    return torch.where(near_zero, (-torch.expm1(small)).log(), torch.log1p(-large.exp()))
