"""The tables of a run's report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fastpref.data.example import OUTCOMES
from fastpref.report.heldout import HeldOut, Interval
from fastpref.report.source import Run
from fastpref.report.svg import number
from fastpref.run.history import HELDOUT
from fastpref.run.times import day_and_time, duration, moment

# Held-out metrics with the names and the forms in which they are shown; the first two have intervals.
SCORES: dict[str, tuple[str, str]] = {
    "rewards/accuracies": ("accuracy", "{:.1%}"),
    "rewards/margins": ("reward margin", "{:+.3f}"),
    "loss": ("loss", "{:.4f}"),
    "perplexity": ("perplexity", "{:.3f}"),
    "rewards/chosen": ("chosen reward", "{:+.3f}"),
    "rewards/rejected": ("rejected reward", "{:+.3f}"),
    "entropy": ("entropy, nats", "{:.3f}"),
    "mean_token_accuracy": ("token accuracy", "{:.1%}"),
}


@dataclass(frozen=True)
class Table:
    id: str
    title: str
    head: Sequence[str]
    rows: list[tuple[str, list[str]]]  # each with its name
    numeric: bool = True
    caption: str = ""


def heldout(run: Run, scores: HeldOut | None) -> Table:
    """Return held-out scores before the training and now, with intervals where the rewards of all rows are known."""
    intervals = {} if scores is None else {"rewards/accuracies": scores.accuracy, "rewards/margins": scores.margin}
    losses = run.history[HELDOUT + "loss"]
    step = scores.step if scores is not None else int(losses.steps[-1]) if len(losses) else None
    rows = []
    for metric, (name, form) in SCORES.items():
        series, interval = run.history[HELDOUT + metric], intervals.get(metric)
        there = series.values[series.steps == step]  # of the weights that are kept, which may not be the last ones
        now = interval.mean if interval is not None else float(there[-1]) if len(there) else None
        if now is not None:
            first = (
                [score(float(series.values[0]), form) if len(series) and series.steps[0] == 0 else ""] if step else []
            )
            rows.append((name, [*first, score(now, form), *([between(interval, form)] if intervals else [])]))
    before = ["step 0"] if step else []
    head = ("", *before, f"step {step or 0:,}", *(["95% interval"] if intervals else []))
    caption = "" if scores is None else f"{scores.count:,} {run.known.loss.unit}s; intervals by resampling them"
    return Table("heldout", "Held out", head, rows, caption=caption)


def score(value: float, form: str) -> str:
    """Return a score in its form, or a large one with four digits."""
    return form.format(value) if abs(value) < 1000 else number(value)


def between(interval: Interval | None, form: str) -> str:
    return "" if interval is None else f"{score(interval.low, form)} to {score(interval.high, form)}"


def metrics(run: Run) -> Table:
    """Return the content of the charts as numbers, for those who cannot see them."""
    rows = []
    for name in dict.fromkeys(name.removeprefix(HELDOUT) for name in run.history.names()):
        both = run.history[name].values, run.history[HELDOUT + name].values
        ends = [(number(float(values[0])), number(float(values[-1]))) if len(values) else ("", "") for values in both]
        rows.append((name, [*ends[0], *ends[1]]))
    return Table("numbers", "Numbers", ("metric", "training, first", "last", "held out, first", "last"), rows)


def data(run: Run) -> Table:
    """Return the outcomes of the rows, with training and held-out counts."""
    counts, rows = run.facts.get("rows") or {}, []
    for outcome in OUTCOMES if counts else ():
        both = [int((counts.get(part) or {}).get(outcome.name, 0)) for part in ("train", "heldout")]
        if any(both) or outcome.name in ("rows", "kept"):
            rows.append((outcome.title, [f"{count:,}" for count in both]))
    for name, title in (
        ("duplicates", "dropped: duplicates"),
        ("left_out", "dropped: broken or of another form"),
        ("weighted", "with a weight"),
        ("with_margins", "with a margin"),
    ):
        if counts.get(name):
            rows.append((title, [f"{int(counts[name]):,}", ""]))
    return Table("data", "Data", ("rows", "training", "held out"), rows)


def tokens(run: Run) -> Table:
    """Return the lengths of prompts and completions in tokens, and how many tokens were cut."""
    parts, rows = run.facts.get("tokens"), []
    for part, about in parts.items() if isinstance(parts, Mapping) else ():
        for name, counts in (about or {}).items():
            rows.append((f"{name}, {_PARTS.get(part, part)}", [f"{int(count):,}" for count in counts]))
    return Table("tokens", "Tokens a row", ("", *LENGTHS, "cut"), rows)


LENGTHS = ("5%", "median", "95%", "longest")  # of training.record._tokens
_PARTS = {"train": "training", "heldout": "held out"}


def speed(run: Run) -> Table:
    rows = []
    seconds, memory = run.facts.get("seconds"), run.facts.get("memory")
    if seconds:
        rows.append(("time in all", [duration(float(seconds))]))
    for name, unit in (("pairs_per_second", f"{run.known.loss.unit}s"), ("tokens_per_second", "tokens")):
        series = run.history[name]
        if len(series):
            rows.append((f"{unit} a second, median", [number(float(np.median(series.values)))]))
    if memory:
        rows.append(("memory at the highest", [f"{memory / 1e9:.2f} GB"]))
    return Table("speed", "Memory and speed", (), rows)


def environment(run: Run) -> Table:
    rows = [(name, [str(value)]) for name, value in (run.facts.get("environment") or {}).items()]
    return Table("environment", "Environment", (), rows, numeric=False)


def written(run: Run) -> str:
    """Return when the facts of the page were written, or nothing."""
    at = moment(run.facts.get("written"))
    return "" if at is None else day_and_time(at)
