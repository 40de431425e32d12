"""Rules that find the cause of a failing run, from the run as a whole, its labels and its rows."""

import math

import numpy as np

from fastpref.health.bands import MEMORISED_NLL, per_token
from fastpref.health.rule import (
    UNASKED,
    Known,
    Unasked,
    Verdict,
    change_of,
    cost_of,
    nats_moved,
    percent,
    preferences,
    rule,
)  # fmt: skip
from fastpref.run.history import HELDOUT, History


@rule(
    "learning_rate_high",
    explains=(
        "labels_shuffled", "swapped", "loss_rises", "loss_below_band", "margins_flat", "accuracy_at_chance",
        "rejected_rises", "both_fall", "gradient_explodes", "gradient_band", "gradient_spikes", "accuracy_pinned",
        "length_bias", "kl_stuck", "heldout_gap", "nll_rises", "entropy_collapses", "overoptimised",
        "answers_repeat", "answers_length", "answers_language",
    ),
)  # fmt: skip
def _learning_rate_high(h: History, known: Known) -> Verdict | Unasked | None:
    """Find a policy that has moved so far that it no longer writes as before the training."""
    loss, tokens = h["loss"], change_of(h, known, "mean_token_accuracy")
    if len(loss) < 3:
        return UNASKED
    start, worst = known.first_loss, float(loss.values.max())
    if start is None:  # single batches differ as their rows do, and only their means can be compared
        change = h.change("loss")
        start = loss.first.mean
        rises = change is not None and change.end > 3 * abs(start) and change.rises()
        high = loss.steps[loss.values > 3 * abs(start)] if rises else loss.steps[:0]
    else:
        high = loss.steps[loss.values > 3 * abs(start)]
    observed: list[str] = []
    evidence: dict[str, float] = {}
    steps = loss.span
    if len(high) >= 3:
        steps = int(high[0]), int(high[-1])
        observed.append(f"the loss rose from {start:.3g} to {worst:.3g}")
        evidence |= {"first loss": start, "highest loss": worst}
    if tokens is not None and tokens.end < 0.5 * tokens.start:
        steps = tokens.steps
        observed.append(
            f"the model predicts {percent(tokens.end)} of the tokens of {known.wanted} completions, instead of "
            f"{percent(tokens.start)} at first"
        )
        evidence |= {f"{known.wanted} tokens predicted at first": tokens.start, "at the end": tokens.end}
    if not observed:
        return None
    rate = "" if known.learning_rate is None else f", {known.learning_rate:g},"
    return Verdict(
        f"{', and '.join(observed)}. The learning rate{rate} is much too high.",
        f"Start again with {known.smaller_rate(10)}.",
        steps,
        evidence,
        "alarm",
    )


@rule(
    "swapped",
    explains=("labels_shuffled", "heldout_gap", "both_fall", "rejected_rises", "margins_flat", "accuracy_at_chance",
              "accuracy_pinned", "loss_below_band", "overoptimised", "answers_repeat", "answers_length",
              "answers_language"),
    of=preferences,
)  # fmt: skip
def _swapped(h: History, known: Known) -> Verdict | Unasked | None:
    """Find training that teaches the opposite of what the held-out rows prefer."""
    name = "rewards/accuracies"
    heldout = h.heldout_change(name, known.start(name))
    training = change_of(h, known, name, heldout=False)
    if heldout is None or training is None:
        return UNASKED
    contrary = heldout.end < 0.5 - 3 * known.heldout_error and heldout.by < -0.1
    if not contrary or training.end < 0.5 + max(0.05, 3 * training.error):
        return None
    return Verdict(
        f"accuracy is {percent(training.end)} on training rows, but falls from {percent(heldout.start)} to "
        f"{percent(heldout.end)} on held-out rows. Chosen and rejected are swapped in one of the two.",
        "Compare both with `fastpref preview`, and check the columns that [[data]] and [[eval.data]] name.",
        training.steps,
        {"training accuracy": training.end, "held-out accuracy": heldout.end},
        "alarm",
    )


@rule(
    "labels_shuffled",
    explains=("nothing_learnt", "heldout_gap", "margins_flat", "accuracy_at_chance", "both_fall", "rejected_rises",
              "loss_below_band", "loss_rises", "overoptimised"),
    after=0.5,
    of=preferences,
)  # fmt: skip
def _labels_shuffled(h: History, known: Known) -> Verdict | Unasked | None:
    """Find a policy that moves while its held-out accuracy stays at chance."""
    heldout, training = h[HELDOUT + "rewards/accuracies"], change_of(h, known, "rewards/accuracies", heldout=False)
    moved = nats_moved(h, known)
    if len(heldout) < 2 or training is None or moved is None:
        return UNASKED
    if known.heldout is not None and known.heldout < 20:  # too few rows to exclude chance
        return UNASKED
    if moved < 0.02 * known.enough or abs(float(heldout.values[0]) - 0.5) > 0.15:
        return None
    end, width = float(heldout.values[-1]), max(0.05, 1.5 * known.heldout_error)
    at_chance = max(abs(float(np.mean(heldout.values[1:])) - 0.5), abs(end - 0.5)) < width
    memorised = training.end > max(end, 0.5) + max(0.1, 3 * math.hypot(training.error, known.heldout_error))
    margin = h.heldout_change("rewards/margins", known.start("rewards/margins"))
    if margin is not None and known.spread and known.heldout:
        error = known.spread / math.sqrt(known.heldout)
        at_chance = at_chance and margin.by < 2 * error  # otherwise the labels say something
    if not at_chance or not (memorised or training.end < 0.53):
        return None
    if not memorised and not known.tells_chance(training.end, len(h["rewards/accuracies"].last)):
        return UNASKED
    observed = (
        f"training accuracy rises to {percent(training.end)}, but held-out accuracy stays at {percent(end)}: the model "
        "memorises rows"
        if memorised
        else f"the model changes, but accuracy stays near 50%: {percent(training.end)} on training rows, "
        f"{percent(end)} on held-out rows"
    )
    return Verdict(
        f"{observed}. The labels are no better than random ones.",
        "Read some rows with `fastpref preview`: would you choose as they do?",
        training.steps,
        {"training accuracy": training.end, "held-out accuracy": end, "nats": moved},
        "alarm",
    )


@rule("nothing_learnt", explains=("margins_flat", "accuracy_at_chance", "kl_stuck", "loss_rises"), after=0.5)
def _nothing_learnt(h: History, known: Known) -> Verdict | Unasked | None:
    if known.loss.supervised:
        return _nothing_imitated(h, known)
    loss, moved, accuracy = change_of(h, known, "loss"), nats_moved(h, known), h.change("rewards/accuracies")
    if loss is None or moved is None or accuracy is None:
        return UNASKED
    if moved > 0.5 * known.enough or abs(loss.by) > 0.01 * abs(loss.start):
        return None
    if moved > 0.02 * known.enough and accuracy.end < 0.55:  # the policy moves, so the rate is not the cause
        return None
    return Verdict(
        f"the log-probabilities change by {moved:.2g} nats a {'token' if per_token(known.loss) else 'completion'}, and "
        f"the loss from {loss.start:.4g} to {loss.end:.4g}. The model learns almost nothing.",
        f"Raise {known.rate} three to ten times, or train longer.",
        loss.steps,
        {"nats": moved, "loss at first": loss.start, "loss at the end": loss.end},
    )


def _nothing_imitated(h: History, known: Known) -> Verdict | Unasked | None:
    nll = change_of(h, known, cost_of(h))
    if nll is None:
        return UNASKED
    if nll.start < MEMORISED_NLL or abs(nll.by) + 3 * nll.error > 0.01 * nll.start:
        return None
    return Verdict(
        f"the completions cost {nll.start:.4g} nats a token at first and {nll.end:.4g} at the end. The model learns "
        "almost nothing.",
        f"Raise {known.rate} three to ten times, or train longer.",
        nll.steps,
        {"nats a token at first": nll.start, "at the end": nll.end},
    )


@rule("already_preferred", of=lambda known: known.loss.paired or known.loss.listwise)
def _already_preferred(h: History, known: Known) -> Verdict | Unasked | None:
    """Find chosen completions that are nearly always the likelier ones before any training."""
    ranking = h[HELDOUT + "logps/accuracies"][:1]
    count = known.heldout or 0
    if not len(ranking) or ranking.steps[0] != 0:
        ranking = h["logps/accuracies"][:4]
        count = len(ranking) * (known.batch or 0)
        if len(ranking) < 4 or ranking.steps[-1] > 10:
            return UNASKED
    if count < 20:
        return UNASKED
    if ranking.mean < 0.95:
        return None
    return Verdict(
        f"before training, the chosen completion is likelier than the rejected one in {percent(ranking.mean)} of the "
        "pairs. They are swapped, or the model was trained on them before.",
        "Check the pairs with `fastpref preview`; there may be little left to learn from them.",
        ranking.span,
        {"share of pairs": ranking.mean},
    )
