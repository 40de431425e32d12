"""The first values of the metrics of each loss, and their ranges in a healthy run. Nothing here imports torch."""

import math
from dataclasses import dataclass

from fastpref.config.losses import CPO, DPO, IPO, KTO, ORPO, LossOptions, SimPO

_LN2 = math.log(2)
GRADIENTS = (0.01, 10.0)  # the gradient norm before clipping
EXPLODING = 100.0
FIRST_NLL = (0.1, 5.0)  # nats a token that a model gives to new text of a kind that it can write
FEW = 10  # held-out rows, with which an accuracy is known to 16 points only
USUAL_ACCURACY = 0.6  # the least accuracy on pairs that a healthy run usually reaches
FEWEST_TOKENS = 0.2  # the share of the tokens of new text that a trained model predicts at least
MEMORISED_NLL = 0.1  # nats a token; the loss of SFT falls below only where nearly every token is foreseen


@dataclass(frozen=True)
class Band:
    """The range of a metric in a healthy run; None means no bound."""

    low: float | None
    high: float | None


def first_loss(loss: LossOptions) -> float | None:
    """Return the loss while policy and reference are the same model, or None if that does not determine it."""
    if isinstance(loss, KTO):
        same = loss.desirable_weight == loss.undesirable_weight
        return loss.desirable_weight / 2 if same else None
    if isinstance(loss, IPO):
        return first_loss(loss.as_dpo())
    if not isinstance(loss, DPO) or loss.weighting or "sft" in loss.variants:
        return None
    weights = loss.weights or (1.0,) * len(loss.variants)
    return sum(weight * _at_zero(name, loss) for name, weight in zip(loss.variants, weights))


def _at_zero(variant: str, loss: DPO) -> float:
    """Return the value of a variant where both log-ratios are 0."""
    beta, eps = loss.beta, loss.label_smoothing
    if variant == "exo_pair":
        return -_LN2 - (math.log1p(-eps) + math.log(eps)) / 2
    values = {
        "nca_pair": 2 * _LN2, "bco_pair": 2 * _LN2, "hinge": 1.0, "apo_zero": 1.0, "apo_down": 1.0,
        "discopop": _LN2 / 2 + 0.5, "ipo": 1 / (2 * beta) ** 2, "sppo_hard": 0.5 / beta**2,
    }  # fmt: skip
    return values.get(variant, _LN2)


def loss_band(loss: LossOptions, start: float | None = None, *, extras: bool = False) -> Band:
    """Return 0.3 to ln 2 for DPO, its variants and KTO in proportion, 0 to 1/(2β)² for IPO, from 0.1 on for SFT.

    The upper end of SFT and of the others is `start`. With `extras`, weights or margins of the rows, there is no lower.
    """
    if loss.supervised and not extras:
        return Band(MEMORISED_NLL, start)
    first = None if extras else first_loss(loss)
    if first is None:
        return Band(None, start)
    logistic = isinstance(loss, KTO) or (isinstance(loss, DPO) and set(loss.variants) <= _LOGISTIC)
    return Band(0.3 / _LN2 * first if logistic else 0.0, first)


_LOGISTIC = {"sigmoid", "robust", "aot", "aot_unpaired", "sigmoid_norm"}


def gradient_band(loss: LossOptions) -> Band:
    """Return the range of the gradient norm; IPO's has the slope of its loss at first, 1/β, as a factor."""
    ipo = isinstance(loss, IPO) or (isinstance(loss, DPO) and "ipo" in loss.variants)
    low, high = GRADIENTS
    return Band(low, high * max(1.0, 1 / loss.beta) if ipo else high)


def bands(loss: LossOptions, start: float | None = None, *, extras: bool = False) -> dict[str, Band]:
    """Return the healthy range of each metric by its name. `start` is the first loss of the run."""
    ranges = {"loss": loss_band(loss, start, extras=extras), "grad_norm": gradient_band(loss)}
    if loss.supervised:
        return ranges
    ranges |= {"rewards/accuracies": Band(0.5, None), "rewards/margins": Band(0.0, None)}
    if loss.uses_reference:
        ranges |= {"rewards/chosen": Band(0.0, None), "rewards/rejected": Band(None, 0.0)}
    if isinstance(loss, ORPO):
        ranges["log_odds_chosen"] = Band(0.0, None)
    if loss.listwise:
        ranges["rewards/kendall_tau"] = Band(0.0, None)
    if isinstance(loss, SimPO) and not extras:  # the target margin
        ranges["rewards/margins"] = Band(loss.margin, None)
    return ranges


def supervised(loss: LossOptions) -> bool:
    """Return whether the loss has a supervised term besides that of preferences, which raises the likelihood of the
    chosen completions.
    """
    if isinstance(loss, DPO):
        return "sft" in loss.variants
    return isinstance(loss, ORPO) or (isinstance(loss, CPO | SimPO) and loss.sft_weight > 0)


def per_token(loss: LossOptions) -> bool:
    """Return whether a reward is β times an average over tokens instead of a sum."""
    return isinstance(loss, ORPO | SimPO) or (isinstance(loss, CPO) and loss.variant == "ipo")


def enough(loss: LossOptions) -> float:
    """Return the smallest change of a log-probability that matters, in nats of a completion, or of a token."""
    return 0.05 if per_token(loss) else 1.0
