"""The description of a loss for the preference-loss kernels: its structure, which is compiled in, and its numbers."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

SCORES = ("value", "power", "js")


class Flags(NamedTuple):
    """The structure of a loss apart from its variants, compiled into the kernel; 0 or 1 unless noted otherwise."""

    SCORE: int  # index into SCORES
    HAS_REFERENCE: int
    AVERAGED: int
    HAS_LENGTH_WEIGHTS: int
    HAS_PAIR_WEIGHTS: int
    HAS_PROMPTS: int


class Numbers(NamedTuple):
    """The numbers of a loss: floats on the host, float32 scalars in a kernel."""

    beta: Any
    half_inverse_beta: Any  # 1/(2β), or 0 if β is 0
    smoothing: Any  # ε
    log_smoothing: Any  # log ε, or 0 without smoothing
    log_unsmoothed: Any  # log(1 − ε)
    unflipped: Any  # 1 − 2ε
    margin: Any
    power: Any
    discopop_tau: Any
    length_alpha: Any
    supervised: Any
    desirable: Any
    undesirable: Any


@dataclass(frozen=True)
class LossSpec:
    """The description of a loss: Σ weight · variant of a pair's two values, plus a supervised term; or KTO.

    The value of a completion is the sum of its tokens' log-probabilities, minus the reference's, or their mean.
    """

    variants: tuple[str, ...] = ()  # names in the table of `preference_loss_variants.py`
    weights: tuple[float, ...] = ()  # one for each variant
    beta: float = 1.0
    label_smoothing: float = 0.0
    margin: float = 0.0  # subtracted from β·difference
    score: str = "value"  # differences are taken of the value v, of (e^{power·v} − 1)/power, or of log 2σ(v)
    power: float = 1.0
    reference: bool = False
    averaged: bool = False  # whether the value is the mean over tokens
    length_alpha: float = 1.0
    pair_weights: bool = False  # whether WPO's weights multiply the pairs
    supervised: float = 0.0  # weight of the chosen completions' mean negative log-likelihood
    prompts: bool = False  # whether the supervised term includes the prompts
    discopop_tau: float = 1.0
    desirable_weight: float = 1.0  # for KTO, which has no variants
    undesirable_weight: float = 1.0

    def flags(self) -> Flags:
        return Flags(
            SCORE=SCORES.index(self.score),
            HAS_REFERENCE=int(self.reference),
            AVERAGED=int(self.averaged),
            HAS_LENGTH_WEIGHTS=int(self.length_alpha != 1),
            HAS_PAIR_WEIGHTS=int(self.pair_weights),
            HAS_PROMPTS=int(self.prompts),
        )

    def numbers(self) -> Numbers:
        """Return the numbers, computed in float64."""
        eps = self.label_smoothing
        return Numbers(
            beta=self.beta,
            half_inverse_beta=0.5 / self.beta if self.beta else 0.0,
            smoothing=eps,
            log_smoothing=math.log(eps) if eps else 0.0,
            log_unsmoothed=math.log1p(-eps),
            unflipped=1 - 2 * eps,
            margin=self.margin,
            power=self.power,
            discopop_tau=self.discopop_tau,
            length_alpha=self.length_alpha,
            supervised=self.supervised,
            desirable=self.desirable_weight,
            undesirable=self.undesirable_weight,
        )
