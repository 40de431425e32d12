"""Find over-optimisation: pairs are told apart better and better, and the model no longer writes as it did."""

from collections.abc import Mapping
from types import MappingProxyType

from fastpref.config.losses import LossOptions
from fastpref.health.bands import FEW, enough, loss_band, per_token
from fastpref.health.rule import UNASKED, Known, Unasked, Verdict, preferences, rule
from fastpref.run.history import HELDOUT, History

# The change of the chosen completions' log-probability that is a loss of language, as a share of its first value.
LOST = 0.1
MISSED = 0.02  # the share of the chosen tokens that are predicted no longer, which is one, too
ENTROPY = (0.5, 2.0)  # the healthy entropy, in multiples of that before the training
METRICS = (
    "loss", "rewards/chosen", "rewards/margins", "logps/chosen", "entropy", "mean_token_accuracy",
)  # fmt: skip


def departed(loss: LossOptions, now: Mapping[str, float], first: Mapping[str, float], *, extras: bool = False) -> bool:
    """Return whether the model has left its language for larger margins. `first` are the metrics before the training.

    The margin has risen; the chosen completions have become less likely or less predictable; and the loss is below its
    healthy band, or the entropy far from that before. Without one of the metrics nothing is found.
    """
    return _departure(loss, now, first, extras=extras) is not None


def _departure(
    loss: LossOptions,
    now: Mapping[str, float],
    first: Mapping[str, float],
    *,
    extras: bool,
    errors: Mapping[str, float] = MappingProxyType({}),
) -> dict[str, float] | None:
    """Return what shows that the model has left its language, or None.

    `errors` are the standard errors of the changes if both sides are not of the same rows; three of them prove nothing.
    """
    if loss.supervised or any(name not in metrics for name in METRICS for metrics in (now, first)) or not loss.beta:
        return None
    chance = {name: 3 * errors.get(name, 0.0) for name in METRICS}
    lost = (first["rewards/chosen"] - now["rewards/chosen"]) / loss.beta
    cost = abs(first["rewards/chosen"]) / loss.beta if per_token(loss) else abs(first["logps/chosen"])
    missed = first["mean_token_accuracy"] - now["mean_token_accuracy"]
    worse = lost > max(enough(loss), LOST * cost, chance["rewards/chosen"] / loss.beta)
    worse = worse or missed > max(MISSED, chance["mean_token_accuracy"])
    low = loss_band(loss, extras=extras).low
    ratio = now["entropy"] / first["entropy"] if first["entropy"] > 0 else 1.0
    extreme = bool(low and now["loss"] < low) or not ENTROPY[0] <= ratio <= ENTROPY[1]
    if not (worse and extreme and now["rewards/margins"] - first["rewards/margins"] > chance["rewards/margins"]):
        return None
    return {
        "nats lost by the chosen completions": lost, "loss": now["loss"], "entropy at first": first["entropy"],
        "entropy": now["entropy"], "chosen tokens predicted at first": first["mean_token_accuracy"],
        "chosen tokens predicted": now["mean_token_accuracy"],
    }  # fmt: skip


@rule(
    "overoptimised",
    explains=("loss_below_band", "both_fall", "gradient_band", "nll_rises", "length_bias", "kl_stuck",
              "answers_repeat", "answers_length", "answers_language"),
    of=preferences,
)  # fmt: skip
def _overoptimised(h: History, known: Known) -> Verdict | Unasked | None:
    evaluations = _evaluations(h) if known.heldout is None or known.heldout >= FEW else []
    if len(evaluations) < 2:
        return _in_training(h, known)
    (begin, first), (end, last) = evaluations[0], evaluations[-1]
    evidence = _departure(known.loss, last, first, extras=known.extras)
    if evidence is None:
        return None
    healthy = max(step for step, now in evaluations if not departed(known.loss, now, first, extras=known.extras))
    since = f"step {healthy} was the last healthy evaluation" if healthy else "no evaluation since was healthy"
    advice = f"Use train.steps={healthy}, or {known.smaller_rate(3)}." if healthy else f"Use {known.smaller_rate(3)}."
    return _verdict("on held-out rows", f"; {since}", advice, known, (begin, end), evidence)


def _in_training(h: History, known: Known) -> Verdict | Unasked | None:
    """Compare the first training rows with the last ones, where no two evaluations can be compared."""
    changes = {name: h.change(name, known.start(name)) for name in METRICS}
    trends = {name: change for name, change in changes.items() if change is not None}
    if len(trends) < len(METRICS) or len(h["loss"]) < 20:
        return UNASKED
    first, last, errors = (
        {name: getattr(trend, part) for name, trend in trends.items()} for part in ("start", "end", "error")
    )
    evidence = _departure(known.loss, last, first, extras=known.extras, errors=errors)
    if evidence is None:
        return None
    advice = f"Use {known.smaller_rate(3)}, or train for fewer steps."
    return _verdict("in training", "", advice, known, trends["loss"].steps, evidence)


def _verdict(
    where: str, since: str, advice: str, known: Known, steps: tuple[int, int], evidence: Mapping[str, float]
) -> Verdict:
    lost, unit = evidence["nats lost by the chosen completions"], "token" if per_token(known.loss) else "completion"
    observed = [f"the chosen completions lose {lost:.3g} nats a {unit}"] if lost > 0 else []
    observed.append(
        f"the entropy goes from {evidence['entropy at first']:.3g} to {evidence['entropy']:.3g} nats a token"
    )
    observed.append(f"the loss is {evidence['loss']:.2g}")
    return Verdict(
        f"{where} {', '.join(observed)}. The model tells the pairs apart by leaving its language{since}.",
        advice,
        steps,
        evidence,
        "alarm",
    )


def _evaluations(h: History) -> list[tuple[int, dict[str, float]]]:
    """Return the step and the metrics of every evaluation; none if there was none before the training."""
    series = {name: h[HELDOUT + name] for name in METRICS}
    if not len(series["loss"]) or series["loss"].steps[0] != 0:
        return []
    values = {name: dict(zip(of.steps.tolist(), of.values.tolist())) for name, of in series.items()}
    steps = [step for step in values["loss"] if all(step in of for of in values.values())]
    return [(step, {name: of[step] for name, of in values.items()}) for step in steps]
