"""Rules on what the model makes of the completions: before the training, and as supervised training goes on."""

from fastpref.health.bands import FEWEST_TOKENS, FIRST_NLL
from fastpref.health.rule import UNASKED, Known, Unasked, Verdict, cost_of, imitation, percent, preferences, rule
from fastpref.run.history import HELDOUT, History


@rule("first_nll", of=imitation)
def _first_nll(h: History, known: Known) -> Verdict | Unasked | None:
    """Find completions that the model cannot write before any training, or that it knows by heart."""
    series = h[HELDOUT + cost_of(h)][:1]
    if not len(series) or series.steps[0] != 0:
        series = h[cost_of(h)][:1]
    if not len(series) or series.steps[0] > 1:
        return UNASKED
    low, high = FIRST_NLL
    if low <= series.mean <= high:
        return None
    observed = f"before training, the completions cost the model {series.mean:.3g} nats a token"
    if series.mean > high:
        message = f"{observed}, more than {high:g}. They are not text as it expects it: the chat template or the "
        message += "tokens are not the model's, or the model is not trained."
        advice = "Compare the text in `fastpref preview` with what the model's card shows; see tokens.chat_template."
    else:
        message = f"{observed}, less than {low:g}. It was trained on them before, or they say next to nothing."
        advice = "Read some rows with `fastpref preview`; there is little to learn from them."
    return Verdict(message, advice, series.span, {"nats a token": series.mean})


@rule("first_tokens", of=preferences)
def _first_tokens(h: History, known: Known) -> Verdict | Unasked | None:
    """Find completions that the model cannot write before any training."""
    series = h[HELDOUT + "mean_token_accuracy"][:1]
    if not len(series) or series.steps[0] != 0:
        series = h["mean_token_accuracy"][:1]
    if not len(series) or series.steps[0] > 1:
        return UNASKED
    if series.mean >= FEWEST_TOKENS:
        return None
    return Verdict(
        f"before training, the model predicts {percent(series.mean)} of the tokens of the chosen completions; half is "
        "usual. They are not text as it expects it: the chat template or the tokens are not the model's, or the model "
        "is not trained.",
        "Compare the text in `fastpref preview` with what the model's card shows; see tokens.chat_template.",
        series.span,
        {"tokens predicted": series.mean},
    )


@rule("entropy_collapses", after=0.3, of=imitation)
def _entropy_collapses(h: History, known: Known) -> Verdict | Unasked | None:
    """Find a model that has become surer than it is right: it expects fewer nats a token than held-out rows cost it."""
    entropy, nll = h.heldout_change("entropy"), h.heldout_change(cost_of(h))
    if entropy is None or nll is None:
        return UNASKED
    if not entropy.falls():
        return None
    before, after = (cost / expected if expected else 1.0 for cost, expected in
                     ((nll.start, entropy.start), (nll.end, entropy.end)))  # fmt: skip
    if after < max(1.5, 1.5 * before):
        return None
    return Verdict(
        f"on held-out rows the entropy falls from {entropy.start:.3g} to {entropy.end:.3g} nats a token, and their "
        f"tokens cost {nll.end:.3g}. The model has become surer than it is right.",
        f"Train for fewer epochs or on more rows, or use {known.smaller_rate(3)}.",
        entropy.steps,
        {"entropy at first": entropy.start, "entropy at the end": entropy.end, "nats a token at the end": nll.end},
    )
