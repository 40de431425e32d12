"""Rules that find faults of the data: cut rows, unbalanced labels, and training that held-out rows do not share."""

import math

import numpy as np

from fastpref.data.balance import unbalanced
from fastpref.health.rule import Known, Verdict, percent, rule
from fastpref.run.history import HELDOUT, History


@rule("truncation")
def _truncation(h: History, known: Known) -> Verdict | None:
    share = known.cut / known.rows if known.rows else 0.0
    if share <= 0.05:
        return None
    return Verdict(
        f"{percent(share)} of the training rows were cut ({known.cut:,} of {known.rows:,}). The model does not see "
        "them whole.",
        'Raise tokens.max_length or tokens.max_prompt_length, or leave out such rows with tokens.overlong="drop".',
        (0, h.step),
        {"rows cut": known.cut, "rows": known.rows},
    )


@rule("labels_unbalanced")
def _labels_unbalanced(h: History, known: Known) -> Verdict | None:
    """Find good and bad rows of KTO whose weights do not balance."""
    good, bad = known.labels or (0, 0)
    fault = unbalanced(good, bad, known.loss)
    if fault is None:
        return None
    message, advice = fault
    severity = "warning" if good and bad else "alarm"
    return Verdict(f"{message}.", advice, (0, h.step), {"good": good, "bad": bad}, severity)


@rule("heldout_gap", explains=("entropy_collapses",), after=0.3)
def _heldout_gap(h: History, known: Known) -> Verdict | None:
    return _overfit(h) or _accuracy_gap(h, known)


def _overfit(h: History) -> Verdict | None:
    """Find a held-out loss that has turned upward while the training loss has not."""
    heldout, training = h[HELDOUT + "loss"], h["loss"]
    if len(heldout) < 2:
        return None
    best = int(np.argmin(heldout.values))
    lowest, end, step = float(heldout.values[best]), float(heldout.values[-1]), int(heldout.steps[best])
    after = training.beyond(step)
    before = training[: len(training) - len(after)].last if len(after) < len(training) else training.first
    if end < lowest + max(0.05 * abs(lowest), 0.01) or len(after) < 5 or after.last.mean > before.mean:
        return None
    return Verdict(
        f"the held-out loss rises from {lowest:.4g} at step {step} to {end:.4g}, but the training loss falls to "
        f"{after.last.mean:.4g}. The model memorises rows, and was best "
        f"{f'after step {step}' if step else 'before training'}.",
        "Set eval.every and output.save_every, which keep the best checkpoint, or train for fewer steps."
        if step
        else "Use a lower learning rate, and check that training and held-out rows are labelled alike.",
        (step, heldout.span[1]),
        {"lowest held-out loss": lowest, "held-out loss": end, "training loss": after.last.mean},
    )


def _accuracy_gap(h: History, known: Known) -> Verdict | None:
    training, heldout = h["rewards/accuracies"], h[HELDOUT + "rewards/accuracies"]
    if len(training) < 10 or len(heldout) < 2:
        return None
    gap = training.last.mean - float(heldout.values[-1])
    if gap < max(0.15, 3 * math.hypot(training.last.error, known.heldout_error)):
        return None
    return Verdict(
        f"accuracy is {percent(training.last.mean)} on training rows, but {percent(float(heldout.values[-1]))} on "
        "held-out rows. What the model learns does not generalise.",
        "Train for fewer epochs or on more rows, and check that the held-out rows are of the same kind.",
        training.last.span,
        {"training accuracy": training.last.mean, "held-out accuracy": float(heldout.values[-1])},
    )
