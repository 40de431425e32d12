"""Every loss, with the options that change its formula, by name."""

from collections.abc import Sequence
from typing import Any, get_args

from fastpref.config.losses import CPO, DPO, IPO, KTO, ORPO, SORTING_VARIANTS, LossOptions, SimPO, Variant

SMOOTHED = ("sigmoid", "exo_pair", "robust", "aot", "aot_unpaired")
OF_A_DIFFERENCE = ("sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sigmoid_norm")
DIVERGENCES: dict[str, dict[str, Any]] = {
    "forward_kl": {"f_divergence": "forward_kl"},
    "js": {"f_divergence": "js"},
    "alpha 0.5": {"f_divergence": "alpha", "f_alpha": 0.5},
    "alpha 1": {"f_divergence": "alpha", "f_alpha": 1.0},
    "alpha 1.001": {"f_divergence": "alpha", "f_alpha": 1.001},
    "alpha 2": {"f_divergence": "alpha", "f_alpha": 2.0},
}
CLOSED = tuple(variant for variant in get_args(Variant) if variant not in SORTING_VARIANTS)
UNSMOOTHED = tuple(variant for variant in CLOSED if variant != "exo_pair")


def smoothing(variants: Sequence[str]) -> float:
    """Return the label smoothing of these variants together: 0 if it is invalid for one of them or if none uses it."""
    return 0.1 if set(variants) & set(SMOOTHED) and "ipo" not in variants else 0.0


def dpo(*variants: Any, **options: Any) -> DPO:
    return DPO(variants=variants, label_smoothing=smoothing(variants), **options)


LOSSES: dict[str, LossOptions] = {
    **{f"dpo {v}": dpo(v) for v in get_args(Variant)},
    **{f"dpo {v} {d}": dpo(v, **DIVERGENCES[d]) for v in OF_A_DIFFERENCE for d in DIVERGENCES},
    "dpo sigmoid, unsmoothed": DPO(),
    "dpo robust, unsmoothed": DPO(variants=("robust",)),
    "dpo discopop, hot": DPO(variants=("discopop",), discopop_tau=2.0),
    "dpo rpo": dpo("sigmoid", "sft", weights=(1.0, 0.3)),
    "dpo most variants": DPO(beta=0.3, variants=UNSMOOTHED, weights=tuple(0.3 * i - 1 for i in range(len(UNSMOOTHED)))),
    "dpo other order": DPO(variants=("sft", "bco_pair", "sigmoid"), weights=(0.2, 0.7, -0.4), label_smoothing=0.2),
    "dpo sum": dpo("sigmoid", "sft", "aot_unpaired", "apo_down", weights=(1.0, 0.3, 0.5, -0.2)),
    "dpo length": DPO(length_alpha=0.3),
    "dpo length 0, sft": DPO(variants=("sigmoid_norm", "sft"), length_alpha=0.0),
    "dpo wpo": DPO(weighting=True),
    "dpo all at once": dpo(
        "exo_pair", "sigmoid", "robust", "hinge", "apo_down", "sft", "discopop",
        weights=(1.0, 0.5, 0.25, 2.0, -0.3, 0.2, 0.1), f_divergence="js", length_alpha=0.5, weighting=True,
    ),
    "ipo": IPO(beta=0.2),
    "orpo": ORPO(beta=0.3),
    "orpo, nll only": ORPO(beta=0.0),
    "orpo, prompts": ORPO(nll_on="all"),
    "simpo": SimPO(),
    "simpo, all options": SimPO(beta=1.5, gamma=0.4, label_smoothing=0.1, sft_weight=0.7, alpha=0.25),
    "simpo, alpha < 0": SimPO(alpha=-0.5),
    "cpo": CPO(),
    "cpo, smoothed": CPO(label_smoothing=0.2, sft_weight=0.0),
    "cpo, alpha": CPO(alpha=0.05),
    "cpo hinge": CPO(variant="hinge"),
    "cpo hinge, alpha": CPO(variant="hinge", alpha=-0.1, sft_weight=0.0),
    "cpo ipo": CPO(variant="ipo"),
    "cpo ipo, alpha": CPO(variant="ipo", alpha=0.5),
    "kto": KTO(),
    "kto, weighted": KTO(beta=0.5, desirable_weight=0.0, undesirable_weight=2.5),
    "kto, no kl": KTO(kl="none", desirable_weight=1.5),
}  # fmt: skip


def sorts(loss: LossOptions) -> bool:
    """Return whether the loss compares pairs in sorted order, so that parts of a step have no closed form."""
    return isinstance(loss, DPO) and loss.sorts_step


CLOSED_LOSSES = {name: loss for name, loss in LOSSES.items() if not sorts(loss)}
PAIR_LOSSES = {  # need only log-probabilities; WPO needs its weights too
    name: loss
    for name, loss in LOSSES.items()
    if not isinstance(loss, KTO) and not (isinstance(loss, DPO) and loss.weighting)
}
