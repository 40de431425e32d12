"""The balance of good and bad rows under the weights of KTO. Nothing here imports torch."""

import math
from collections.abc import Callable

from fastpref.config.losses import KTO, LossOptions

LOW, HIGH = 1.0, 4 / 3
"""Range of weight × count of the good rows over that of the bad ones that the KTO paper finds best (section 4.2)."""
_SLACK = 2.0  # warn if the ratio is outside the range by more than this factor


def unbalanced(good: int, bad: int, loss: LossOptions) -> tuple[str, str] | None:
    """Return what is wrong with the counts of good and bad rows under a loss's weights, and what to do; else None."""
    if not isinstance(loss, KTO) or not good + bad:
        return None
    counts = f"{good:,} good and {bad:,} bad completions"
    if not good or not bad:
        kind = "good" if not good else "bad"
        return (
            f"KTO has {counts}: without {kind} ones it only learns to make "
            f"{'every completion less likely' if not good else 'these completions likelier'}",
            f"Add {kind} completions (label = {'true' if not good else 'false'}), and see by `fastpref preview` how "
            "the labels are read.",
        )
    ratio = weighted_ratio(good, bad, loss)
    if LOW / _SLACK <= ratio <= HIGH * _SLACK:
        return None
    return (
        f"KTO has {counts}; by their weights, {loss.desirable_weight:g} and {loss.undesirable_weight:g}, they count as "
        f"{ratio:.3g} : 1, and between 1 : 1 and 4 : 3 is best",
        f"Set {balancing(good, bad, loss)}, which balances them.",
    )


def weighted_ratio(good: int, bad: int, loss: KTO) -> float:
    """Return weight times count of the good rows over that of the bad ones."""
    below = loss.undesirable_weight * bad
    return loss.desirable_weight * good / below if below else math.inf


def balancing(good: int, bad: int, loss: KTO) -> str:
    """Return the override that brings the weighted ratio into its range: a larger weight for the rarer kind."""
    if good <= bad:
        weight = (loss.undesirable_weight or 1.0) * bad / good
        return f"loss.desirable_weight={_rounded(weight, math.ceil):g}"
    weight = (loss.desirable_weight or 1.0) * good / bad
    return f"loss.undesirable_weight={_rounded(weight, math.floor):g}"


def _rounded(value: float, towards: Callable[[float], int]) -> float:
    """Round a number to three digits, in the direction that keeps the ratio within its range."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 2)
    return round(towards(round(value / unit, 6)) * unit, 12)
