"""Prepare the values that the template of the page shows."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from fastpref.data.example import OUTCOMES
from fastpref.health import RULES, diagnose
from fastpref.health.bands import Band, bands
from fastpref.report.heldout import HeldOut, Interval, held_out
from fastpref.report.source import Run
from fastpref.report.svg import Line, histogram, line_chart, number
from fastpref.run.history import HELDOUT, Series


@dataclass(frozen=True)
class Chart:
    """A metric over the steps, or two metrics that belong together."""

    title: str
    names: tuple[str, ...]  # one metric, or those of the chosen and the rejected responses
    positive: bool = False  # whether the axis may be logarithmic
    banded: str | None = None  # the metric whose band is shaded


CHARTS = (
    Chart("Loss", ("loss",), banded="loss"),
    Chart("Accuracy", ("rewards/accuracies",), banded="rewards/accuracies"),
    Chart("Reward margin", ("rewards/margins",), banded="rewards/margins"),
    Chart("Rewards", ("rewards/chosen", "rewards/rejected")),
    Chart("Log-probabilities", ("logps/chosen", "logps/rejected")),
    Chart("Log odds", ("log_odds_chosen",), banded="log_odds_chosen"),
    Chart("Supervised loss", ("nll_loss",)),
    Chart("KTO's KL", ("kl",)),
    Chart("Gradient norm", ("grad_norm",), positive=True, banded="grad_norm"),
    Chart("Learning rate", ("learning_rate",)),
    Chart("Reward against length", ("rewards/length_correlation",)),
    Chart("Entropy", ("entropy",)),
    Chart("Tokens per second", ("tokens_per_second",)),
)
_SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class Figure:
    title: str
    svg: Markup
    keys: list[tuple[str, str]]  # style and name of each line
    caption: str


@dataclass(frozen=True)
class MetricRow:
    """A line of the table of numbers, which states the content of the charts for those who cannot see them."""

    name: str
    cells: list[str]  # first and last value in training, first and last value held out


def render(run: Run) -> str:
    """Return the page. Everything that comes from data or models is escaped."""
    environment = Environment(
        loader=PackageLoader("fastpref.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    verdicts = diagnose(run.history, run.known)
    scores = held_out(run.facts)
    return environment.get_template("page.html.j2").render(
        run=run,
        method=run.known.loss.type.upper(),
        verdicts=verdicts,
        rules=len(RULES),
        number=number,
        capitalised=_capitalised,
        figures=figures(run),
        metrics=_metrics(run),
        heldout=_heldout(scores),
        margins=_margins(scores),
        samples=_samples(run),
        data=_data(run.facts.get("rows") or {}),
        speed=_speed(run),
        environment=run.facts.get("environment") or {},
    )


def _capitalised(text: str) -> Markup:
    """Return a sentence as HTML, with the parts in backticks as code."""
    parts = (text[:1].upper() + text[1:]).split("`")
    code = [Markup("<code>{}</code>").format(part) if at % 2 else Markup.escape(part) for at, part in enumerate(parts)]
    return Markup("").join(code)


def figures(run: Run) -> list[Figure]:
    """Return a chart for everything that was logged."""
    losses = run.history["loss"]
    healthy = bands(run.known.loss, float(losses.values[0]) if len(losses) else None)
    steps = max(run.history.step, 1)
    return [
        _figure(run, chart, healthy.get(chart.banded or ""), steps)
        for chart in CHARTS
        if any(len(run.history[prefix + name]) for name in chart.names for prefix in ("", HELDOUT))
    ]


def _figure(run: Run, chart: Chart, band: Band | None, steps: int) -> Figure:
    lines, keys, said = [], [], []
    for at, name in enumerate(chart.names):
        side = f"{_SIDES[at]}, " if len(chart.names) > 1 else ""
        training, heldout = ("rejected", "heldout-rejected") if at else ("training", "heldout")
        for prefix, style, where in (("", training, "training"), (HELDOUT, heldout, "held out")):
            series = run.history[prefix + name]
            if len(series):
                lines.append(Line(name, series, style))
                keys.append((style, side + where))
                said.append(f"{side}{where} {_from_to(series)}")
    shaded = _band(band)
    label = f"{chart.title} over {steps} steps: {'; '.join(said)}." + (f" {shaded}" if shaded else "")
    return Figure(chart.title, line_chart(label, lines, band, steps=steps, positive=chart.positive), keys, shaded)


def _from_to(series: Series) -> str:
    first, last = number(float(series.values[0])), number(float(series.values[-1]))
    return first if len(series) == 1 else f"from {first} to {last}"


def _band(band: Band | None) -> str:
    if band is None or (band.low is None and band.high is None):
        return ""
    if band.low is None:
        return f"Healthy below {number(band.high or 0.0)}."
    low = number(band.low)
    return f"Healthy above {low}." if band.high is None else f"Healthy from {low} to {number(band.high)}."


def _metrics(run: Run) -> list[MetricRow]:
    named = list(dict.fromkeys(name.removeprefix(HELDOUT) for name in run.history.names()))
    rows = []
    for name in named:
        training, heldout = run.history[name], run.history[HELDOUT + name]
        cells = [
            number(value) if value is not None else ""
            for series in (training, heldout)
            for value in ((float(series.values[0]), float(series.values[-1])) if len(series) else (None, None))
        ]
        rows.append(MetricRow(name, cells))
    return rows


def _heldout(scores: HeldOut | None) -> dict[str, Any] | None:
    if scores is None:
        return None

    def said(of: Interval, form: str) -> dict[str, str]:
        return {"mean": form.format(of.mean), "low": form.format(of.low), "high": form.format(of.high)}

    return {
        "step": scores.step,
        "count": f"{scores.count:,} {'pairs' if scores.paired else 'responses'}",
        "rows": {
            "accuracy": said(scores.accuracy, "{:.1%}"),
            "reward margin": said(scores.margin, "{:+.3f}"),
        },
    }


def _margins(scores: HeldOut | None) -> Figure | None:
    if scores is None or not len(scores.margins):
        return None
    wrong = int((scores.margins < 0).sum())
    label = (
        f"Histogram of the reward margins of {len(scores.margins)} held-out pairs, from "
        f"{number(float(scores.margins.min()))} to {number(float(scores.margins.max()))}; {wrong} below zero."
    )
    keys = [("training", "chosen above rejected"), ("rejected", "rejected above chosen")]
    return Figure("Margins of the held-out pairs", histogram(label, scores.margins), keys, "")


def _samples(run: Run) -> list[dict[str, Any]]:
    found = run.facts.get("samples")
    return [s for s in found if isinstance(s, dict) and set(s) >= {"asked", "before", "after"}] if found else []


def _data(rows: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Return the outcomes of the rows: a line for each, with training and held-out counts."""
    if not rows:
        return []
    lines = []
    for outcome in OUTCOMES:
        counts = [int((rows.get(part) or {}).get(outcome.name, 0)) for part in ("train", "heldout")]
        if any(counts) or outcome.name in ("rows", "kept"):
            lines.append((outcome.title, [f"{count:,}" for count in counts]))
    for name, said in (("duplicates", "dropped: duplicates"), ("left_out", "dropped: broken or of another form")):
        if rows.get(name):
            lines.append((said, [f"{int(rows[name]):,}", ""]))
    return lines


def _speed(run: Run) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    seconds, memory = run.facts.get("seconds"), run.facts.get("memory")
    if seconds:
        found.append(("time in all", duration(float(seconds))))
    for name, said in (
        ("pairs_per_second", f"{run.known.loss.unit}s a second"),
        ("tokens_per_second", "tokens a second"),
    ):
        series = run.history[name]
        if len(series):
            found.append((f"{said}, median", number(float(np.median(series.values)))))
    if memory:
        found.append(("memory at the highest", f"{memory / 1e9:.2f} GB"))
    return found


def duration(seconds: float) -> str:
    """Return a duration such as 1 h 2 min, 3 min 4 s or 5 s."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
