"""What the preference-loss kernels need to know of a loss: its structure, which is compiled in, and its numbers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

# The losses of one pair that a kernel knows, each with a bit of `VARIANTS` and a weight behind the `NUMBERS`.
VARIANTS = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "apo_zero", "apo_down",
    "discopop", "sigmoid_norm", "odds_ratio",
)  # fmt: skip
SCORES = ("value", "power", "js")
NUMBERS = (
    "beta", "half_inverse_beta", "smoothing", "log_smoothing", "log_unsmoothed", "unflipped", "margin", "power",
    "discopop_tau", "length_alpha", "supervised", "desirable", "undesirable",
)  # fmt: skip
FLAGS = (
    "VARIANTS", "SCORE", "HAS_REFERENCE", "AVERAGED", "HAS_LENGTH_WEIGHTS", "HAS_PAIR_WEIGHTS", "HAS_PROMPTS",
)  # fmt: skip


@dataclass(frozen=True)
class LossSpec:
    """A loss as the kernels see it: Σ weight · variant of a pair's two values, plus a supervised term; or KTO.

    The value of a response is the sum of its tokens' log-probabilities, less the reference's, or their mean.
    """

    variants: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()  # one a variant
    beta: float = 1.0
    label_smoothing: float = 0.0
    margin: float = 0.0  # subtracted from β·difference
    score: str = "value"  # what differences are made of: the value v, (e^{power·v} − 1)/power, or log 2σ(v)
    power: float = 1.0
    reference: bool = False
    averaged: bool = False  # the value is the mean over tokens
    length_alpha: float = 1.0
    pair_weights: bool = False  # of WPO
    supervised: float = 0.0  # weight of the chosen responses' mean negative log-likelihood
    prompts: bool = False  # which is over the prompts too
    discopop_tau: float = 1.0
    desirable_weight: float = 1.0  # of KTO, which has no variants
    undesirable_weight: float = 1.0

    def flags(self) -> tuple[int, ...]:
        """The values of `FLAGS`."""
        mask = sum(1 << VARIANTS.index(name) for name in self.variants)
        has_length_weights = self.length_alpha != 1
        return (
            mask, SCORES.index(self.score), int(self.reference), int(self.averaged), int(has_length_weights),
            int(self.pair_weights), int(self.prompts),
        )  # fmt: skip

    def numbers(self) -> tuple[float, ...]:
        """The values of `NUMBERS`, then the weight of every one of `VARIANTS`; made in float64."""
        eps = self.label_smoothing
        weights = dict(zip(self.variants, self.weights, strict=True))
        return (
            self.beta, 0.5 / self.beta if self.beta else 0.0, eps, math.log(eps) if eps else 0.0, math.log1p(-eps),
            1 - 2 * eps, self.margin, self.power, self.discopop_tau, self.length_alpha, self.supervised,
            self.desirable_weight, self.undesirable_weight, *(weights.get(name, 0.0) for name in VARIANTS),
        )  # fmt: skip

    @staticmethod
    def has_prompts(flags: Sequence[int]) -> bool:
        return bool(flags[FLAGS.index("HAS_PROMPTS")])
