"""Rules on the held-out rows: whether they say anything, and whether they share what the training learns."""

import math

import numpy as np

from fastpref.health.bands import FEW
from fastpref.health.rule import UNASKED, Known, Unasked, Verdict, percent, rule
from fastpref.run.history import HELDOUT, History


@rule("heldout_leaks")
def _heldout_leaks(h: History, known: Known) -> Verdict | Unasked | None:
    """Find held-out rows that are training rows, whose numbers then say what was memorised."""
    if not known.heldout:
        return UNASKED
    share = known.leaked / known.heldout
    if share < 0.01:
        return None
    return Verdict(
        f"{known.leaked:,} of {known.heldout:,} held-out rows are training rows too, so the held-out numbers do not "
        "show whether the model generalises.",
        "Hold out other rows: remove them from one of the two files, or use eval.fraction=0.05 without [[eval.data]].",
        (0, h.step),
        {"rows that are both": known.leaked, "held-out rows": known.heldout},
        "alarm" if share > 0.5 else "warning",
    )


@rule("heldout_few")
def _heldout_few(h: History, known: Known) -> Verdict | Unasked | None:
    if not known.heldout:
        return UNASKED
    if known.heldout >= FEW:
        return None
    return Verdict(
        f"with {known.heldout} held-out row{'s' * (known.heldout > 1)} the accuracy is known to "
        f"±{100 * known.heldout_error:.0f} points only.",
        "Hold out at least 50 rows (eval.fraction, [[eval.data]]).",
        (0, h.step),
        {"held-out rows": known.heldout},
    )


@rule("heldout_gap", explains=("entropy_collapses",), after=0.3)
def _heldout_gap(h: History, known: Known) -> Verdict | Unasked | None:
    if len(h[HELDOUT + "loss"]) < 2:
        return UNASKED
    return _overfit(h, known) or _accuracy_gap(h, known)


def _overfit(h: History, known: Known) -> Verdict | None:
    """Find a held-out loss that has turned upward, by more than the choice of the rows explains, while the training
    loss has not.
    """
    heldout, training = h[HELDOUT + "loss"], h["loss"]
    best = int(np.argmin(heldout.values))
    lowest, end, step = float(heldout.values[best]), float(heldout.values[-1]), int(heldout.steps[best])
    after = training.beyond(step)
    before = training[: len(training) - len(after)].last if len(after) < len(training) else training.first
    rise = max(0.05 * abs(lowest), 0.01, 2 * known.heldout_loss_error)
    if end < lowest + rise or len(after) < 5 or after.last.mean > before.mean:
        return None
    return Verdict(
        f"the held-out loss rises from {lowest:.4g} at step {step} to {end:.4g}, but the training loss falls to "
        f"{after.last.mean:.4g}. The model memorises rows, and was best "
        f"{f'after step {step}' if step else 'before training'}.",
        f"Use train.steps={step}, or the checkpoint of the best evaluation, which checkpoints/best.json names."
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
