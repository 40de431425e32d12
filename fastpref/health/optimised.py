"""Find over-optimisation: pairs are told apart better and better, and the model no longer writes as it did."""

from collections.abc import Mapping

from fastpref.config.losses import LossOptions
from fastpref.health.bands import enough, loss_band, per_token
from fastpref.health.rule import UNASKED, Known, Unasked, Verdict, preferences, rule
from fastpref.run.history import HELDOUT, History

# The change of the chosen completions' log-probability that is a loss of language, as a share of its first value.
LOST = 0.1
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
    loss: LossOptions, now: Mapping[str, float], first: Mapping[str, float], *, extras: bool
) -> dict[str, float] | None:
    if loss.supervised or any(name not in metrics for name in METRICS for metrics in (now, first)) or not loss.beta:
        return None
    lost = (first["rewards/chosen"] - now["rewards/chosen"]) / loss.beta
    cost = abs(first["rewards/chosen"]) / loss.beta if per_token(loss) else abs(first["logps/chosen"])
    predicted = now["mean_token_accuracy"] - first["mean_token_accuracy"]
    worse = lost > max(enough(loss), LOST * cost) or predicted < -0.02
    low = loss_band(loss, extras=extras).low
    ratio = now["entropy"] / first["entropy"] if first["entropy"] > 0 else 1.0
    extreme = bool(low and now["loss"] < low) or not ENTROPY[0] <= ratio <= ENTROPY[1]
    if not (worse and extreme and now["rewards/margins"] > first["rewards/margins"]):
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
    evaluations = _evaluations(h)
    if len(evaluations) < 2:
        return UNASKED
    (begin, first), (end, last) = evaluations[0], evaluations[-1]
    evidence = _departure(known.loss, last, first, extras=known.extras)
    if evidence is None:
        return None
    healthy = max(step for step, now in evaluations if not departed(known.loss, now, first, extras=known.extras))
    lost, unit = evidence["nats lost by the chosen completions"], "token" if per_token(known.loss) else "completion"
    observed = [f"the chosen completions lose {lost:.3g} nats a {unit}"] if lost > 0 else []
    observed.append(f"the entropy goes from {first['entropy']:.3g} to {last['entropy']:.3g} nats a token")
    observed.append(f"the loss is {last['loss']:.2g}")
    advice = f"Use train.steps={healthy}, or {known.smaller_rate(3)}." if healthy else f"Use {known.smaller_rate(3)}."
    where = "on held-out rows" if h[HELDOUT + "loss"].span[1] == end and len(h[HELDOUT + "loss"]) > 1 else "in training"
    before = f"step {healthy} was the last healthy evaluation" if healthy else "no evaluation since was healthy"
    return Verdict(
        f"{where} {', '.join(observed)}. The model tells the pairs apart by leaving its language; {before}.",
        advice,
        (begin, end),
        evidence,
        "alarm",
    )


def _evaluations(h: History) -> list[tuple[int, dict[str, float]]]:
    """Return the step and the metrics of every evaluation, or if there is only one, of the first and last rows."""
    series = {name: h[HELDOUT + name] for name in METRICS}
    if len(series["loss"]) > 1 and series["loss"].steps[0] == 0:
        values = {name: dict(zip(of.steps.tolist(), of.values.tolist())) for name, of in series.items()}
        steps = [step for step in values["loss"] if all(step in of for of in values.values())]
        return [(step, {name: of[step] for name, of in values.items()}) for step in steps]
    training = {name: h[name] for name in METRICS}
    if min(map(len, training.values())) < 20:
        return []
    begin, end = training["loss"].span
    return [(begin, {name: of.first.mean for name, of in training.items()}),
            (end, {name: of.last.mean for name, of in training.items()})]  # fmt: skip
