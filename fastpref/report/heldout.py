"""Held-out accuracy and margin with bootstrap intervals (Efron's percentile method over the rows)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

RESAMPLES = 1000


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class HeldOut:
    step: int
    count: int  # pairs, or single completions
    accuracy: Interval
    margin: Interval
    margins: np.ndarray  # the margin of each pair; empty for single completions


def held_out(facts: Mapping[str, Any]) -> HeldOut | None:
    """Return the scores of the rewards in a run.json.

    None if there are none, only those of one side, or some that are not finite, of which there is no mean.
    """
    try:
        rewards = facts["heldout"]
        chosen, rejected = np.array(rewards["chosen"], float), np.array(rewards["rejected"], float)
        step, paired = int(rewards["step"]), bool(rewards["paired"])
    except (KeyError, TypeError, ValueError):
        return None
    if not len(chosen) or not len(rejected) or (paired and len(chosen) != len(rejected)):
        return None
    if not (np.isfinite(chosen).all() and np.isfinite(rejected).all()):
        return None
    random = np.random.default_rng(0)  # a fixed seed, so that the report is the same every time
    if paired:
        margins = chosen - rejected
        right = np.sign(margins) / 2 + 0.5
        drawn = [random.integers(0, len(margins), len(margins)) for _ in range(RESAMPLES)]
        accuracies, means = [right[at].mean() for at in drawn], [margins[at].mean() for at in drawn]
        accuracy, margin, count = right.mean(), margins.mean(), len(margins)
    else:
        margins = np.zeros(0)
        pairs = [(random.choice(chosen, len(chosen)), random.choice(rejected, len(rejected))) for _ in range(RESAMPLES)]
        accuracies, means = [_accuracy(a, b) for a, b in pairs], [a.mean() - b.mean() for a, b in pairs]
        accuracy, margin = _accuracy(chosen, rejected), chosen.mean() - rejected.mean()
        count = len(chosen) + len(rejected)
    fewest = min(len(chosen), len(rejected))
    right_or_wrong = _certain(accuracy, fewest) if accuracy in (0.0, 1.0) else _interval(accuracy, accuracies)
    return HeldOut(step, count, right_or_wrong, _interval(margin, means), margins)


def _accuracy(chosen: np.ndarray, rejected: np.ndarray) -> float:
    """Return the share of all combinations in which the chosen reward is higher; a tie counts half."""
    ordered = np.sort(rejected)
    below = np.searchsorted(ordered, chosen, side="left") + np.searchsorted(ordered, chosen, side="right")
    return float(below.mean() / (2 * len(ordered)))


def _certain(share: float, count: int) -> Interval:
    """Return the Clopper-Pearson interval, for rows that are all equal, so that resampling changes nothing."""
    bound = 0.025 ** (1 / count)
    return Interval(share, bound, 1.0) if share else Interval(share, 0.0, 1 - bound)


def _interval(mean: float, resampled: list[Any]) -> Interval:
    low, high = np.percentile(np.array(resampled, float), [2.5, 97.5])
    return Interval(float(mean), float(low), float(high))
