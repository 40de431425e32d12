"""Prepare the values that the template of the page shows."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from fastpref.data.example import OUTCOMES
from fastpref.health import examine
from fastpref.health.bands import Band, bands
from fastpref.report.heldout import HeldOut, held_out
from fastpref.report.source import Run
from fastpref.report.svg import Line, histogram, line_chart, number
from fastpref.run.history import HELDOUT

# Title: one metric over the steps, or those of the chosen and the rejected completions.
CHARTS: dict[str, tuple[str, ...]] = {
    "Loss": ("loss",),
    "Accuracy": ("rewards/accuracies",),
    "Reward margin": ("rewards/margins",),
    "Kendall's τ": ("rewards/kendall_tau",),
    "Rewards": ("rewards/chosen", "rewards/rejected"),
    "Log-probabilities": ("logps/chosen", "logps/rejected"),
    "Log odds": ("log_odds_chosen",),
    "Supervised loss": ("nll_loss",),
    "Perplexity": ("perplexity",),
    "KTO's KL": ("kl",),
    "Gradient norm": ("grad_norm",),
    "Learning rate": ("learning_rate",),
    "Reward against length": ("rewards/length_correlation",),
    "Entropy": ("entropy",),
    "Tokens per second": ("tokens_per_second",),
}


@dataclass(frozen=True)
class Figure:
    title: str
    svg: Markup
    keys: list[tuple[str, str]]  # style and name of each line
    caption: str


@dataclass(frozen=True)
class Table:
    id: str
    title: str
    head: tuple[str, ...]
    rows: list[tuple[str, list[str]]]  # each with its name
    numeric: bool = True


def render(run: Run) -> str:
    """Return the page. Everything that comes from data or models is escaped."""
    environment = Environment(
        loader=PackageLoader("fastpref.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    scores, health = held_out(run.facts), examine(run.history, run.known)
    return environment.get_template("page.html.j2").render(
        run=run,
        method=run.known.loss.type.upper(),
        health=health,
        verdicts=health.verdicts,
        number=number,
        capitalised=_capitalised,
        figures=figures(run),
        scores=scores,
        heldout=_heldout(scores) if scores else None,
        margins=_margins(scores) if scores and len(scores.margins) else None,
        samples=_samples(run),
        tables=[table for table in (_metrics(run), _data(run), _speed(run), _environment(run)) if table.rows],
    )


def _capitalised(text: str) -> Markup:
    """Return a sentence as HTML, with the parts in backticks as code."""
    parts = (text[:1].upper() + text[1:]).split("`")
    code = [Markup("<code>{}</code>").format(part) if at % 2 else Markup.escape(part) for at, part in enumerate(parts)]
    return Markup("").join(code)


def figures(run: Run) -> list[Figure]:
    """Return a chart for everything that was logged."""
    losses = run.history["loss"]
    healthy = bands(run.known.loss, float(losses.values[0]) if len(losses) else None, extras=run.known.extras)
    steps = max(run.history.step, 1)
    return [
        _figure(run, title, names, healthy.get(names[0]) if len(names) == 1 else None, steps)
        for title, names in CHARTS.items()
        if any(len(run.history[prefix + name]) for name in names for prefix in ("", HELDOUT))
    ]


def _figure(run: Run, title: str, names: tuple[str, ...], band: Band | None, steps: int) -> Figure:
    lines, keys, changes = [], [], []
    for at, name in enumerate(names):
        side = f"{('chosen', 'rejected')[at]}, " if len(names) > 1 else ""
        training, heldout = ("rejected", "heldout-rejected") if at else ("training", "heldout")
        for prefix, style, where in (("", training, "training"), (HELDOUT, heldout, "held out")):
            series = run.history[prefix + name]
            if len(series):
                first, last = number(float(series.values[0])), number(float(series.values[-1]))
                lines.append(Line(series, style))
                keys.append((style, side + where))
                changes.append(f"{side}{where} " + (first if len(series) == 1 else f"from {first} to {last}"))
    shaded = _band(band)
    label = f"{title} over {steps} steps: {'; '.join(changes)}." + (f" {shaded}" if shaded else "")
    svg = line_chart(label, lines, band, steps=steps, positive=names == ("grad_norm",))
    return Figure(title, svg, keys, shaded)


def _band(band: Band | None) -> str:
    if band is None or (band.low is None and band.high is None):
        return ""
    if band.low is None:
        return f"Healthy below {number(band.high or 0.0)}."
    low = number(band.low)
    return f"Healthy above {low}." if band.high is None else f"Healthy from {low} to {number(band.high)}."


def _metrics(run: Run) -> Table:
    """Return the content of the charts as numbers, for those who cannot see them."""
    rows = []
    for name in dict.fromkeys(name.removeprefix(HELDOUT) for name in run.history.names()):
        both = run.history[name].values, run.history[HELDOUT + name].values
        ends = [(number(float(values[0])), number(float(values[-1]))) if len(values) else ("", "") for values in both]
        rows.append((name, [*ends[0], *ends[1]]))
    return Table("numbers", "Numbers", ("metric", "training, first", "last", "held out, first", "last"), rows)


def _heldout(scores: HeldOut) -> list[tuple[str, list[str]]]:
    """Return a row for each score: its mean and the ends of its interval."""
    formats = (("accuracy", scores.accuracy, "{:.1%}"), ("reward margin", scores.margin, "{:+.3f}"))
    return [(name, [form.format(of.mean), f"{form} to {form}".format(of.low, of.high)]) for name, of, form in formats]


def _margins(scores: HeldOut) -> Figure:
    wrong = int((scores.margins < 0).sum())
    label = (
        f"Histogram of the reward margins of {len(scores.margins)} held-out pairs, from "
        f"{number(float(scores.margins.min()))} to {number(float(scores.margins.max()))}; {wrong} below zero."
    )
    keys = [("training", "chosen above rejected"), ("rejected", "rejected above chosen")]
    return Figure("Margins of the held-out pairs", histogram(label, scores.margins), keys, "")


def _samples(run: Run) -> list[dict[str, Any]]:
    samples = run.facts.get("samples") or ()
    return [s for s in samples if isinstance(s, dict) and set(s) >= {"asked", "before", "after"}]


def _data(run: Run) -> Table:
    """Return the outcomes of the rows, with training and held-out counts."""
    counts, rows = run.facts.get("rows") or {}, []
    for outcome in OUTCOMES if counts else ():
        both = [int((counts.get(part) or {}).get(outcome.name, 0)) for part in ("train", "heldout")]
        if any(both) or outcome.name in ("rows", "kept"):
            rows.append((outcome.title, [f"{count:,}" for count in both]))
    for name, title in (("duplicates", "dropped: duplicates"), ("left_out", "dropped: broken or of another form")):
        if counts.get(name):
            rows.append((title, [f"{int(counts[name]):,}", ""]))
    return Table("data", "Data", ("rows", "training", "held out"), rows)


def _speed(run: Run) -> Table:
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


def _environment(run: Run) -> Table:
    rows = [(name, [str(value)]) for name, value in (run.facts.get("environment") or {}).items()]
    return Table("environment", "Environment", (), rows, numeric=False)


def duration(seconds: float) -> str:
    """Return a duration such as 1 h 2 min, 3 min 4 s or 5 s."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
