"""Rules that find unusual values in single curves: losses, rewards, gradients, and held-out rows against training."""

import math

import numpy as np

from fastpref.config.losses import KTO, ORPO
from fastpref.data.balance import unbalanced
from fastpref.health.bands import EXPLODING, GRADIENTS, first_loss, loss_band, supervised
from fastpref.health.rule import (
    Finding,
    Known,
    change_of,
    count,
    enough,
    heldout_error,
    known_start,
    nats,
    nats_moved,
    now,
    percent,
    rule,
    settled,
    smaller,
)
from fastpref.run.history import HELDOUT, History, Series

# --- the loss -------------------------------------------------------------------------------------------------------


@rule("first_loss", explains=("loss_rises",))  # which would start from a wrong value
def _first_loss(h: History, known: Known) -> Finding | None:
    wanted = first_loss(known.loss)
    series = h[HELDOUT + "loss"][:1]
    if not len(series) or series.steps[0] != 0:
        series = h["loss"][:1]
    if wanted is None or not len(series) or series.steps[0] > 1 or abs(series.mean - wanted) < 0.05 * abs(wanted):
        return None
    return Finding(
        "warning",
        f"the first loss is {series.mean:.4g}, and that of {known.loss.type.upper()} is {wanted:.4g} as long as policy "
        "and reference are the same model.",
        "The reference is another model than the one the training starts from: look at reference.mode and model.name.",
        series.span,
        {"first loss": series.mean, "expected": wanted},
    )


@rule("loss_rises")
def _loss_rises(h: History, known: Known) -> Finding | None:
    loss = change_of(h, known, "loss", heldout=False)
    if loss is None or not settled(h, known) or not loss.rises(0.02 * abs(loss.start)):
        return None
    return Finding(
        "alarm",
        f"the training loss rises, from {loss.start:.4g} to {loss.end:.4g}.",
        f"Lower the learning rate: {smaller(known, 3)}.",
        loss.steps,
        {"loss at first": loss.start, "loss at the end": loss.end},
    )


@rule("loss_below_band")
def _loss_below_band(h: History, known: Known) -> Finding | None:
    low, loss = loss_band(known.loss).low, change_of(h, known, "loss", heldout=False)
    if not low or loss is None or not settled(h, known) or loss.end > low - 3 * loss.error:
        return None
    heldout = h[HELDOUT + "loss"]
    if len(heldout) > 1 and heldout.values[-1] < low:  # it has generalised
        return None
    beside = f", and is {heldout.values[-1]:.3g} held out" if len(heldout) > 1 else "; no rows are held out"
    return Finding(
        "warning",
        f"the training loss has fallen to {loss.end:.3g}, below {low:.2g}, the low end of a healthy run's{beside}: the "
        "rows may be learnt by heart.",
        "Train fewer epochs, or hold rows out (eval.fraction=0.05) to see whether it carries over.",
        loss.steps,
        {"loss at the end": loss.end, "low end": low},
    )


@rule("nll_rises")
def _nll_rises(h: History, known: Known) -> Finding | None:
    nll = change_of(h, known, "nll_loss")
    if nll is None or not supervised(known.loss) or not settled(h, known) or not nll.rises(0.05 * nll.start):
        return None
    return Finding(
        "warning",
        f"the chosen responses become less likely, by their own loss: nll_loss rises from {nll.start:.3g} to "
        f"{nll.end:.3g}. The preference term drives the training alone.",
        "Lower loss.beta or the learning rate, or raise loss.sft_weight."
        if not isinstance(known.loss, ORPO)
        else "Lower loss.beta or the learning rate.",
        nll.steps,
        {"nll_loss at first": nll.start, "nll_loss at the end": nll.end},
    )


# --- rewards --------------------------------------------------------------------------------------------------------


@rule("margins_flat")
def _margins_flat(h: History, known: Known) -> Finding | None:
    name = "log_odds_chosen" if isinstance(known.loss, ORPO) else "rewards/margins"
    training, heldout = change_of(h, known, name, heldout=False), h.heldout_change(name, known_start(known, name))
    if training is None or not settled(h, known, 0.5) or training.by > training.error:
        return None
    if heldout is not None and heldout.by > 0:
        return None
    falls = training.by < -3 * training.error and training.end < 0
    what = "log odds of the chosen responses" if isinstance(known.loss, ORPO) else "reward margin"
    only = " The loss falls by its supervised term only." if isinstance(known.loss, ORPO) else ""
    return Finding(
        "alarm" if falls else "warning",
        f"the {what} {'falls' if falls else 'does not rise'}: {training.start:.3g} at first, {training.end:.3g} at the "
        f"end ({name}).{only}",
        "Raise loss.beta, which weighs the odds ratio, or the learning rate."
        if isinstance(known.loss, ORPO)
        else "Look at the pairs with `fastpref preview`, and at the learning rate.",
        training.steps,
        {"at first": training.start, "at the end": training.end},
    )


@rule("accuracy_at_chance")
def _accuracy_at_chance(h: History, known: Known) -> Finding | None:
    training, heldout = change_of(h, known, "rewards/accuracies", heldout=False), h[HELDOUT + "rewards/accuracies"]
    if training is None or not settled(h, known, 0.5) or training.rises():
        return None
    if training.end > 0.53 or (len(heldout) and heldout.values[-1] > 0.55):
        return None
    return Finding(
        "warning",
        f"accuracy in training is {percent(training.end)}: the chosen response has the higher reward no more often "
        "than by chance; 60 to 80% is usual.",
        f"Look at the pairs with `fastpref preview`; raise the learning rate{now(known)} or train longer.",
        training.steps,
        {"training accuracy": training.end},
    )


@rule("rejected_rises")
def _rejected_rises(h: History, known: Known) -> Finding | None:
    if supervised(known.loss):  # the supervised term also raises text like the chosen responses
        return None
    chosen, rejected = change_of(h, known, "rewards/chosen"), change_of(h, known, "rewards/rejected")
    if chosen is None or rejected is None or not settled(h, known):
        return None
    if not rejected.rises(max(0.5 * chosen.by, known.loss.beta * enough(known))):
        return None
    return Finding(
        "warning",
        f"rejected responses become likelier (rewards/rejected {rejected.by:+.3g}, rewards/chosen {chosen.by:+.3g}): "
        "the reward is won by something both sides share, such as their form or length.",
        "Lower the learning rate or raise loss.beta, and compare chosen with rejected in `fastpref preview`.",
        rejected.steps,
        {"rewards/chosen by": chosen.by, "rewards/rejected by": rejected.by},
    )


@rule("both_fall")
def _both_fall(h: History, known: Known) -> Finding | None:
    """Find likelihood displacement: chosen responses become less likely too, and other text becomes likelier."""
    chosen, rejected = change_of(h, known, "rewards/chosen"), change_of(h, known, "rewards/rejected")
    if chosen is None or rejected is None or not settled(h, known):
        return None
    margin = chosen.by - rejected.by
    if not chosen.falls(max(0.5 * margin, known.loss.beta * enough(known))) or not rejected.falls():
        return None
    sft = {
        "dpo": 'add loss.variants=["sigmoid", "sft"]', "simpo": "set loss.sft_weight=0.1",
        "cpo": "raise loss.sft_weight",
    }.get(known.loss.type, "raise loss.beta")  # fmt: skip
    return Finding(
        "warning",
        f"both log-probabilities fall: the chosen responses lose {-nats(known, chosen.by):.3g} nats, the rejected "
        f"ones {-nats(known, rejected.by):.3g}. What neither side says becomes likelier.",
        f"Lower the learning rate ({smaller(known, 3)}), or {sft}.",
        chosen.steps,
        {"rewards/chosen by": chosen.by, "rewards/rejected by": rejected.by},
    )


@rule("accuracy_pinned")
def _accuracy_pinned(h: History, known: Known) -> Finding | None:
    """Find an accuracy of 100% after a few steps, which shows that the pairs differ by something trivial."""
    series, loss, start = h["rewards/accuracies"], h["loss"], first_loss(known.loss)
    if start is None or not len(series) or not settled(h, known):
        return None
    total = known.steps or h.step
    early = loss[: int(np.searchsorted(loss.steps, 0.3 * total, side="right"))][-3:]
    if not len(early) or early.mean > 0.5 * start:  # right by a small margin only
        return None
    length = max(5, math.ceil(0.05 * len(series)), math.ceil(64 / (known.batch or 64)))
    first = _run_start(series, series.steps[series.values < 0.995], length)
    if first is None or first > 0.1 * total:
        return None
    return Finding(
        "warning",
        f"accuracy is 100% from step {first} on, in the first tenth of the run, and the loss {early.mean:.2g} "
        "before a third of it: chosen and rejected differ by something trivial.",
        "Compare them in `fastpref preview`: the same ending, an empty or a cut response, a template on one side? "
        "Otherwise the data are too easy to learn more from; train fewer steps.",
        (first, series.span[1]),
        {"step": first, "steps in all": total, "loss": early.mean},
    )


def _run_start(series: Series, breaks: np.ndarray, length: int) -> int | None:
    """Return the first step of the first `length` consecutive rows without a break, or None."""
    edges = np.concatenate([[-1], np.searchsorted(series.steps, breaks), [len(series)]])
    gaps = np.flatnonzero(np.diff(edges) > length)
    return int(series.steps[edges[gaps[0]] + 1]) if len(gaps) else None


@rule("length_bias")
def _length_bias(h: History, known: Known) -> Finding | None:
    change = change_of(h, known, "rewards/length_correlation")
    if change is None or not settled(h, known) or change.end < 0.6 or change.by < max(0.3, 3 * change.error):
        return None
    remedy = {
        "dpo": 'loss.variants=["sigmoid_norm"] or loss.length_alpha below 1 take length out',
        "kto": "balance the lengths of good and bad rows",
    }.get(known.loss.type, "balance the lengths of chosen and rejected")
    return Finding(
        "warning",
        f"rewards go with length: their correlation is {change.end:.2f}, and was {change.start:.2f}. The model may "
        "learn to write more instead of better.",
        f"See the lengths of both sides in `fastpref preview`; {remedy}.",
        change.steps,
        {"correlation at first": change.start, "correlation at the end": change.end},
    )


@rule("kl_stuck")
def _kl_stuck(h: History, known: Known) -> Finding | None:
    """Find a KL that stays 0. It is no reference point then, as max(0, ·) hides how far mismatched responses fall."""
    if not isinstance(known.loss, KTO) or known.loss.kl != "batch":
        return None
    kl = h["kl"].beyond(h.step / 5)
    moved = nats_moved(h, known)
    if len(kl) < 10 or not settled(h, known) or moved is None or moved < enough(known):
        return None
    zero = float((kl.values <= 0).mean())
    if zero < 0.95:
        return None
    return Finding(
        "warning",
        f"KTO's KL is zero in {percent(zero)} of the steps: good and bad rows are compared with 0 and not with the "
        "policy's own drift.",
        'Take a larger train.batch or a lower learning rate; loss.kl="none" trains like this, and faster.',
        kl.span,
        {"share of zeros": zero},
    )


# --- gradients ------------------------------------------------------------------------------------------------------


@rule("gradient_explodes", explains=("gradient_band", "gradient_spikes"))
def _gradient_explodes(h: History, known: Known) -> Finding | None:
    norms = h["grad_norm"]
    high = np.flatnonzero(norms.values > EXPLODING)
    if len(high) < max(3, 0.05 * len(norms)):
        return None
    steps = (int(norms.steps[high[0]]), int(norms.steps[high[-1]]))
    return Finding(
        "alarm",
        f"gradients explode: their norm is above {EXPLODING:g} in {count(high)}, {norms.values.max():.3g} "
        "at the highest.",
        f"Lower the learning rate ({smaller(known, 3)}) and see which rows those steps hold.",
        steps,
        {"steps": len(high), "highest": float(norms.values.max())},
    )


@rule("gradient_band")
def _gradient_band(h: History, known: Known) -> Finding | None:
    norms = h["grad_norm"]
    if len(norms) < 10 or not settled(h, known):
        return None
    low, high = GRADIENTS
    middle = float(np.median(norms.last.values))
    if low <= middle <= high:
        return None
    if middle > high:
        message = f"gradients are large: their norm is {middle:.3g}, above {high:g}"
        message += f"; every gradient is scaled down to {known.max_grad_norm:g}."
        advice = "The length of a step is then the learning rate's alone; lower it if the loss is restless."
    else:
        message = f"gradients are nearly gone: their norm is {middle:.2g}, below {low:g}."
        advice = "If accuracy is near 100%, fewer steps do; if not, look at the pairs and at loss.beta."
    return Finding("warning", message, advice, norms.last.span, {"grad_norm": middle})


@rule("gradient_spikes")
def _gradient_spikes(h: History, known: Known) -> Finding | None:
    norms = h["grad_norm"]
    if len(norms) < 20:
        return None
    edges = np.arange(0, len(norms), 50)
    medians = np.array([np.median(norms.values[max(0, a - 50) : a + 100]) for a in edges])
    usual = medians[np.arange(len(norms)) // 50]
    spikes = np.flatnonzero((norms.values > 10 * usual) & (norms.values > known.max_grad_norm))
    if not len(spikes):
        return None
    named = ", ".join(str(norms.steps[at]) for at in spikes[:5]) + (" …" if len(spikes) > 5 else "")
    worst = spikes[np.argmax(norms.values[spikes])]
    return Finding(
        "warning",
        f"the gradient jumps in {len(spikes)} of {len(norms)} logged steps ({named}): a norm of "
        f"{norms.values[worst]:.3g} where {usual[worst]:.2g} is usual.",
        "Look for broken or very long rows; a lower train.max_grad_norm makes such steps smaller.",
        (int(norms.steps[spikes[0]]), int(norms.steps[spikes[-1]])),
        {"steps": len(spikes), "highest": float(norms.values[worst]), "usual": float(usual[worst])},
    )


@rule("not_finite")
def _not_finite(h: History, known: Known) -> Finding | None:
    steps = h.not_finite
    if not steps:
        return None
    named = ", ".join(map(str, steps[:5])) + (" …" if len(steps) > 5 else "")
    return Finding(
        "warning",
        f"the loss or the gradient was not finite in {count(steps)} ({named}), which changed nothing.",
        "Look at the rows that were named then; float16 weights do better as bfloat16 or float32 (model.dtype).",
        (steps[0], steps[-1]),
        {"steps": len(steps)},
    )


# --- the data -------------------------------------------------------------------------------------------------------


@rule("truncation")
def _truncation(h: History, known: Known) -> Finding | None:
    share = known.cut / known.rows if known.rows else 0.0
    if share <= 0.05:
        return None
    return Finding(
        "warning",
        f"{percent(share)} of the training rows were cut: {known.cut:,} of {known.rows:,}.",
        'Raise tokens.max_length or tokens.max_prompt_length, or leave such rows out with tokens.overlong="drop".',
        (0, h.step),
        {"rows cut": known.cut, "rows": known.rows},
    )


@rule("labels_unbalanced")
def _labels_unbalanced(h: History, known: Known) -> Finding | None:
    """Find good and bad rows of KTO whose weights do not balance."""
    good, bad = known.labels or (0, 0)
    wrong = unbalanced(good, bad, known.loss)
    if wrong is None:
        return None
    message, advice = wrong
    severity = "warning" if good and bad else "alarm"
    return Finding(severity, f"{message}.", advice, (0, h.step), {"good": good, "bad": bad})


@rule("heldout_gap")
def _heldout_gap(h: History, known: Known) -> Finding | None:
    if not settled(h, known):
        return None
    return _overfit(h) or _accuracy_gap(h, known)


def _overfit(h: History) -> Finding | None:
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
    return Finding(
        "warning",
        f"the held-out loss rises from {lowest:.4g} at step {step} to {end:.4g} while the training loss falls to "
        f"{after.last.mean:.4g}: the rows are learnt by heart.",
        f"The model after step {step} is the better one: set eval.every and output.save_every, which keep the best "
        "checkpoint, or train fewer steps."
        if step
        else "The untrained model does better: take a lower learning rate, and see that both are labelled alike.",
        (step, heldout.span[1]),
        {"lowest held-out loss": lowest, "held-out loss": end, "training loss": after.last.mean},
    )


def _accuracy_gap(h: History, known: Known) -> Finding | None:
    training, heldout = h["rewards/accuracies"], h[HELDOUT + "rewards/accuracies"]
    if len(training) < 10 or len(heldout) < 2:
        return None
    gap = training.last.mean - float(heldout.values[-1])
    if gap < max(0.15, 3 * math.hypot(training.last.error, heldout_error(known))):
        return None
    return Finding(
        "warning",
        f"accuracy is {percent(training.last.mean)} in training and {percent(float(heldout.values[-1]))} held out: "
        "what is learnt does not carry over.",
        "Train fewer epochs or with more rows; see that the held-out rows are of the same kind.",
        training.last.span,
        {"training accuracy": training.last.mean, "held-out accuracy": float(heldout.values[-1])},
    )
