"""Rules that find unusual values in the curves of the training: losses, rewards and gradients."""

import math
from collections.abc import Sequence

import numpy as np

from fastpref.config.losses import KTO, ORPO
from fastpref.health.bands import EXPLODING, first_loss, gradient_band, loss_band, supervised
from fastpref.health.rule import (
    UNASKED,
    Known,
    Unasked,
    Verdict,
    change_of,
    count,
    nats_moved,
    percent,
    preferences,
    rule,
)  # fmt: skip
from fastpref.run.history import HELDOUT, History, Series

# --- the loss -------------------------------------------------------------------------------------------------------


def _has_first(known: Known) -> bool:
    return _expected(known) is not None


def _expected(known: Known) -> float | None:
    """Return the first loss, also where the config names the reference, which should be the model of the start."""
    return first_loss(known.loss) if known.reference is not None and not known.extras else known.first_loss


@rule("first_loss", explains=("loss_rises",), of=_has_first)  # the rise would start from a wrong value
def _first_loss(h: History, known: Known) -> Verdict | Unasked | None:
    expected = _expected(known)
    series = h[HELDOUT + "loss"][:1]
    if not len(series) or series.steps[0] != 0:
        series = h["loss"][:1]
    if expected is None or not len(series) or series.steps[0] > 1:
        return UNASKED
    off = _nats_off(h, known)
    if abs(series.mean - expected) >= 0.05 * abs(expected):
        observed = f"the first loss is {series.mean:.4g}, but that of {known.loss.title} is {expected:.4g} if "
        observed += "policy and reference are the same model"
    elif off >= 0.05:
        observed = (
            f"before training, policy and reference differ by {percent(off)} of the log-probability of the chosen "
        )
        observed += "completions"
    else:
        return None
    return Verdict(
        f"{observed}. The reference is not the model that training starts from.",
        "Check reference.mode and model.name."
        if known.reference is None
        else f"Check reference.name ({known.reference}): the loss first pulls the model towards it.",
        series.span,
        {"first loss": series.mean, "expected": expected, "difference of log-probabilities": off},
    )


def _nats_off(h: History, known: Known) -> float:
    """Return how much policy and reference differ on held-out chosen completions before any training, as a share."""
    reward, cost = h[HELDOUT + "rewards/chosen"][:1], h[HELDOUT + "logps/chosen"][:1]
    if not len(reward) or not len(cost) or reward.steps[0] != 0 or cost.steps[0] != 0 or not cost.mean:
        return 0.0
    return abs(known.nats(reward.mean) / cost.mean)


@rule("loss_rises", after=0.3)
def _loss_rises(h: History, known: Known) -> Verdict | Unasked | None:
    loss = change_of(h, known, "loss", heldout=False)
    if loss is None:
        return UNASKED
    if not loss.rises(0.02 * abs(loss.start)):
        return None
    return Verdict(
        f"the training loss rises from {loss.start:.4g} to {loss.end:.4g}. The steps are too large.",
        f"Use {known.smaller_rate(3)}.",
        loss.steps,
        {"loss at first": loss.start, "loss at the end": loss.end},
        "alarm",
    )


@rule("loss_below_band", after=0.3, of=lambda known: bool(loss_band(known.loss, extras=known.extras).low))
def _loss_below_band(h: History, known: Known) -> Verdict | Unasked | None:
    low, loss = loss_band(known.loss, extras=known.extras).low, change_of(h, known, "loss", heldout=False)
    heldout = h[HELDOUT + "loss"]
    if not low or loss is None or (known.heldout and len(heldout) < 2 and known.steps != h.step):
        return UNASKED  # held-out rows will say whether the model generalises
    if loss.end > low - 3 * loss.error:
        return None
    if len(heldout) > 1 and heldout.values[-1] < low:  # the model generalises
        return None
    beside = "no rows are held out" if not known.heldout else "the held-out rows were not evaluated beside it"
    if len(heldout) > 1:
        beside = f"the held-out loss is {heldout.values[-1]:.3g}"
    return Verdict(
        f"the training loss is {loss.end:.3g}, below {low:.2g}, the least of a healthy run, and {beside}. The model "
        "may have memorised the rows.",
        "Train for fewer epochs."
        if known.heldout
        else "Train for fewer epochs, or hold out rows (eval.fraction=0.05) to see whether the model generalises.",
        loss.steps,
        {"loss at the end": loss.end, "low end": low},
    )


@rule("nll_rises", after=0.3, of=lambda known: supervised(known.loss))
def _nll_rises(h: History, known: Known) -> Verdict | Unasked | None:
    nll = change_of(h, known, "nll_loss")
    if nll is None:
        return UNASKED
    if not nll.rises(0.05 * nll.start):
        return None
    return Verdict(
        f"nll_loss rises from {nll.start:.3g} to {nll.end:.3g}: the chosen completions become less likely. The "
        "preference term alone drives the training.",
        f"Lower loss.beta or the learning rate{'' if isinstance(known.loss, ORPO) else ', or raise loss.sft_weight'}.",
        nll.steps,
        {"nll_loss at first": nll.start, "nll_loss at the end": nll.end},
    )


# --- rewards --------------------------------------------------------------------------------------------------------


@rule("margins_flat", after=0.5, of=preferences)
def _margins_flat(h: History, known: Known) -> Verdict | Unasked | None:
    what, name = "reward margin", "rewards/margins"
    meaning = "The model does not learn the preference."
    advice = "Check the pairs with `fastpref preview`, and the learning rate."
    if isinstance(known.loss, ORPO):
        what, name = "log odds of the chosen completions", "log_odds_chosen"
        meaning = "The loss falls only by its supervised term."
        advice = "Raise loss.beta, which weighs the odds ratio, or the learning rate."
    training, heldout = change_of(h, known, name, heldout=False), h.heldout_change(name, known.start(name))
    if training is None:
        return UNASKED
    if training.by > training.error:
        return None
    if heldout is not None and heldout.by > 0:
        return None
    falls = training.by < -3 * training.error and training.end < 0
    return Verdict(
        f"the {what} {'falls' if falls else 'does not rise'}: {training.start:.3g} at first, {training.end:.3g} at the "
        f"end ({name}). {meaning}",
        advice,
        training.steps,
        {"at first": training.start, "at the end": training.end},
        "alarm" if falls else "warning",
    )


@rule("accuracy_at_chance", after=0.5, of=preferences)
def _accuracy_at_chance(h: History, known: Known) -> Verdict | Unasked | None:
    training, heldout = change_of(h, known, "rewards/accuracies", heldout=False), h[HELDOUT + "rewards/accuracies"]
    if training is None:
        return UNASKED
    if training.rises():
        return None
    if training.end > 0.53 or (len(heldout) and heldout.values[-1] > 0.55):
        return None
    if not known.tells_chance(training.end, len(h["rewards/accuracies"].last)):
        return UNASKED
    return Verdict(
        f"training accuracy is {percent(training.end)}, no better than chance; 60 to 80% is usual. The model does not "
        "learn the preference.",
        f"Check the pairs with `fastpref preview`, raise {known.rate}, or train longer.",
        training.steps,
        {"training accuracy": training.end},
    )


# A supervised term also raises text like the chosen completions.
@rule("rejected_rises", after=0.3, of=lambda known: preferences(known) and not supervised(known.loss))
def _rejected_rises(h: History, known: Known) -> Verdict | Unasked | None:
    chosen, rejected = change_of(h, known, "rewards/chosen"), change_of(h, known, "rewards/rejected")
    if chosen is None or rejected is None:
        return UNASKED
    if not rejected.rises(max(0.5 * chosen.by, known.loss.beta * known.enough)):
        return None
    return Verdict(
        f"rejected completions become likelier (rewards/rejected {rejected.by:+.3g}, rewards/chosen {chosen.by:+.3g}). "
        "The model learns what both sides have in common, such as their form or length.",
        "Lower the learning rate or raise loss.beta, and compare chosen with rejected in `fastpref preview`.",
        rejected.steps,
        {"rewards/chosen by": chosen.by, "rewards/rejected by": rejected.by},
    )


@rule("both_fall", after=0.3, of=preferences)
def _both_fall(h: History, known: Known) -> Verdict | Unasked | None:
    """Find likelihood displacement: chosen completions become less likely too, and other text becomes likelier."""
    chosen, rejected = change_of(h, known, "rewards/chosen"), change_of(h, known, "rewards/rejected")
    if chosen is None or rejected is None:
        return UNASKED
    margin = chosen.by - rejected.by
    if not chosen.falls(max(0.5 * margin, known.loss.beta * known.enough)) or not rejected.falls():
        return None
    sft = {
        "dpo": 'set loss.variants=["sigmoid", "sft"]', "simpo": "set loss.sft_weight=0.1",
        "cpo": "raise loss.sft_weight",
    }.get(known.loss.type, "raise loss.beta")  # fmt: skip
    return Verdict(
        f"both sides become less likely: the chosen completions lose {-known.nats(chosen.by):.3g} nats, the rejected "
        f"ones {-known.nats(rejected.by):.3g}. Text that is in neither becomes likelier.",
        f"Use {known.smaller_rate(3)}, or {sft}.",
        chosen.steps,
        {"rewards/chosen by": chosen.by, "rewards/rejected by": rejected.by},
    )


@rule("accuracy_pinned", after=0.3, of=lambda known: preferences(known) and known.first_loss is not None)
def _accuracy_pinned(h: History, known: Known) -> Verdict | Unasked | None:
    """Find an accuracy of 100% after a few steps, which shows that the pairs differ by something trivial."""
    series, loss, start = h["rewards/accuracies"], h["loss"], known.first_loss
    if start is None or not len(series):
        return UNASKED
    total = known.steps or h.step
    early = loss[: int(np.searchsorted(loss.steps, 0.3 * total, side="right"))][-3:]
    if not len(early) or early.mean > 0.5 * start:  # right by a small margin only
        return None
    length = max(5, math.ceil(0.05 * len(series)), math.ceil(64 / (known.batch or 64)))
    first = _run_start(series, series.steps[series.values < 0.995], length)
    if first is None or first > 0.1 * total:
        return None
    return Verdict(
        f"accuracy is 100% from step {first} on, in the first tenth of the run, and the loss falls to {early.mean:.2g} "
        "before a third of it. Chosen and rejected differ by something trivial.",
        "Compare them in `fastpref preview`: look for the same ending, an empty or a cut completion, or a template on "
        "one side. If there is none, the data are too easy; train for fewer steps.",
        (first, series.span[1]),
        {"step": first, "steps in all": total, "loss": early.mean},
    )


def _run_start(series: Series, breaks: np.ndarray, length: int) -> int | None:
    """Return the first step of the first `length` consecutive rows without a break, or None."""
    edges = np.concatenate([[-1], np.searchsorted(series.steps, breaks), [len(series)]])
    gaps = np.flatnonzero(np.diff(edges) > length)
    return int(series.steps[edges[gaps[0]] + 1]) if len(gaps) else None


@rule("length_bias", after=0.3, of=preferences)
def _length_bias(h: History, known: Known) -> Verdict | Unasked | None:
    change = change_of(h, known, "rewards/length_correlation")
    if change is None:
        return UNASKED
    if change.end < 0.6 or change.by < max(0.3, 3 * change.error):
        return None
    remedy = {
        "dpo": 'set loss.variants=["sigmoid_norm"], or loss.length_alpha below 1, to take length out',
        "kto": "balance the lengths of good and bad rows",
    }.get(known.loss.type, "balance the lengths of chosen and rejected")
    return Verdict(
        f"the correlation of rewards with length rises from {change.start:.2f} to {change.end:.2f}. The model may "
        "learn to write more instead of better.",
        f"Compare the lengths of both sides in `fastpref preview`; {remedy}.",
        change.steps,
        {"correlation at first": change.start, "correlation at the end": change.end},
    )


@rule("kl_stuck", after=0.3, of=lambda known: isinstance(known.loss, KTO) and known.loss.kl == "batch")
def _kl_stuck(h: History, known: Known) -> Verdict | Unasked | None:
    """Find a KL that stays 0. It is no reference point then, as max(0, ·) hides how far mismatched completions fall."""
    kl = h["kl"].beyond(h.step / 5)
    moved = nats_moved(h, known)
    if len(kl) < 10 or moved is None:
        return UNASKED
    good = change_of(h, known, "rewards/chosen")
    if moved < known.enough or (good is not None and good.by > 0):  # the drift that it hides is downward
        return None
    zero = float((kl.values <= 0).mean())
    if zero < 0.95:
        return None
    return Verdict(
        f"KTO's KL is zero in {percent(zero)} of the steps, and the good completions do not gain. Good and bad rows "
        "are compared with 0 instead of the policy's own drift.",
        'Use a larger train.batch or a lower learning rate; loss.kl="none" trains like this, and faster.',
        kl.span,
        {"share of zeros": zero},
    )


# --- gradients ------------------------------------------------------------------------------------------------------


@rule("gradient_explodes", explains=("gradient_band", "gradient_spikes"))
def _gradient_explodes(h: History, known: Known) -> Verdict | Unasked | None:
    norms = h["grad_norm"]
    if not len(norms):
        return UNASKED
    high = norms.steps[norms.values > EXPLODING]
    if len(high) < max(3, 0.05 * len(norms)):
        return None
    return Verdict(
        f"the gradient norm is above {EXPLODING:g} in {count(high)}, and {norms.values.max():.3g} at the highest. The "
        "gradients explode.",
        f"Use {known.smaller_rate(3)}, and examine the rows of those steps.",
        (int(high[0]), int(high[-1])),
        {"steps": len(high), "highest": float(norms.values.max())},
        "alarm",
    )


@rule("gradient_band", after=0.3)
def _gradient_band(h: History, known: Known) -> Verdict | Unasked | None:
    norms = h["grad_norm"]
    if len(norms) < 10:
        return UNASKED
    band = gradient_band(known.loss)
    low, high = band.low or 0.0, band.high or math.inf
    middle = float(np.median(norms.last.values))
    if low <= middle <= high:
        return None
    if middle > high:
        message = f"the gradient norm is usually {middle:.3g}, above {high:g}. Every gradient is scaled down to "
        message += f"{known.max_grad_norm:g}, so the learning rate alone sets the length of a step."
        advice = "Lower the learning rate if the loss is unsteady."
    else:
        message = f"the gradient norm is usually {middle:.2g}, below {low:g}. The model learns almost nothing more."
        advice = "If accuracy is near 100%, train for fewer steps; if not, check the pairs and loss.beta."
        if known.loss.supervised:
            advice = "If the held-out loss no longer falls, train for fewer steps; if it does, raise the learning rate."
    return Verdict(message, advice, norms.last.span, {"grad_norm": middle})


@rule("gradient_spikes")
def _gradient_spikes(h: History, known: Known) -> Verdict | Unasked | None:
    norms = h["grad_norm"]
    if len(norms) < 20:
        return UNASKED
    edges = np.arange(0, len(norms), 50)
    medians = np.array([np.median(norms.values[max(0, a - 50) : a + 100]) for a in edges])
    usual = medians[np.arange(len(norms)) // 50]
    spikes = np.flatnonzero((norms.values > 10 * usual) & (norms.values > known.max_grad_norm))
    if not len(spikes):
        return None
    steps, worst = norms.steps[spikes], spikes[np.argmax(norms.values[spikes])]
    return Verdict(
        f"the gradient norm jumps in {count(steps)} of {len(norms)} ({_first_five(steps)}), up to "
        f"{norms.values[worst]:.3g} where {usual[worst]:.2g} is usual. These steps may have broken or very long rows.",
        "Examine their rows; a lower train.max_grad_norm makes such steps smaller.",
        (int(steps[0]), int(steps[-1])),
        {"steps": len(spikes), "highest": float(norms.values[worst]), "usual": float(usual[worst])},
    )


@rule("not_finite")
def _not_finite(h: History, known: Known) -> Verdict | Unasked | None:
    """Find steps and evaluations without a number; an alarm if half of them are so, or the last evaluation is."""
    steps, evaluations = h.not_finite, h.not_finite_heldout
    if not h.rows:
        return UNASKED
    if not (steps or evaluations):
        return None
    observed = []
    if steps:
        observed.append(
            f"the loss or the gradient was not finite in {count(steps)} ({_first_five(steps)}), which changed nothing"
        )
    if evaluations:
        observed.append(f"the held-out loss was not finite at step {_first_five(evaluations)}")
    last = h[HELDOUT + "loss"].span[1] if len(h[HELDOUT + "loss"]) else -1
    ruined = 2 * len(steps) >= h.rows or (bool(evaluations) and evaluations[-1] > last)
    return Verdict(
        f"{', and '.join(observed)}.",
        "Examine the rows that were named then. If the weights are float16, use bfloat16 or float32 (model.dtype).",
        (min(steps + evaluations), max(steps + evaluations)),
        {"steps": len(steps), "evaluations": len(evaluations)},
        "alarm" if ruined else "warning",
    )


def _first_five(steps: Sequence[int] | np.ndarray) -> str:
    return ", ".join(map(str, steps[:5])) + (" …" if len(steps) > 5 else "")
