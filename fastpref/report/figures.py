"""The charts of a run, and of several runs together."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from fastpref.health.bands import Band, bands
from fastpref.report.heldout import HeldOut
from fastpref.report.source import Run
from fastpref.report.svg import Line, histogram, line_chart, number, only_points
from fastpref.run.history import HELDOUT, Series

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
_EXACT = {"learning_rate"}  # set, not measured: a running mean would show values that it never had
STYLES = 6  # runs that the style sheet has colours for


@dataclass(frozen=True)
class Figure:
    title: str
    svg: Markup
    keys: list[tuple[str, str]]  # style and name of each line
    caption: str


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
                line = Line(series, style, smooth=not prefix and name not in _EXACT, dots=bool(prefix))
                lines.append(line)
                keys.append((f"{style} points" if only_points(line) else style, side + where))
                changes.append(f"{side}{where} {_change(series)}")
    shaded = _band(band)
    label = f"{title} over {steps} steps: {'; '.join(changes)}." + (f" {shaded}" if shaded else "")
    svg = line_chart(label, lines, band, steps=steps, positive=names == ("grad_norm",))
    return Figure(title, svg, keys, shaded)


def _change(series: Series) -> str:
    first, last = number(float(series.values[0])), number(float(series.values[-1]))
    return first if len(series) == 1 else f"from {first} to {last}"


def _band(band: Band | None) -> str:
    if band is None or (band.low is None and band.high is None):
        return ""
    if band.low is None:
        return f"Healthy below {number(band.high or 0.0)}."
    low = number(band.low)
    return f"Healthy above {low}." if band.high is None else f"Healthy from {low} to {number(band.high)}."


def margins(scores: HeldOut) -> Figure:
    """Return the histogram of the margins of held-out pairs."""
    wrong = int((scores.margins < 0).sum())
    label = (
        f"Histogram of the reward margins of {len(scores.margins)} held-out pairs, from "
        f"{number(float(scores.margins.min()))} to {number(float(scores.margins.max()))}; {wrong} below zero."
    )
    keys = [("training", "chosen above rejected"), ("rejected", "rejected above chosen")]
    return Figure("Margins of the held-out pairs", histogram(label, scores.margins), keys, "")


# --- Several runs ---------------------------------------------------------------------------------------------------


def style_of(at: int) -> str:
    """Return the style of a run's lines. With more runs than colours, the second round is dashed."""
    return f"run-{at % STYLES}" + (" dashed" if at // STYLES % 2 else "")


def compared(runs: Sequence[Run], prefix: str) -> list[Figure]:
    """Return a chart for each metric that at least one run has under this prefix, with a line for each run.

    If the runs differ in the size of their batch, and all sizes are known, the charts are drawn over the rows of their
    steps, so that equal places are equally much training.
    """
    scales = _rows_a_step(runs)
    found = []
    for name in dict.fromkeys(name for names in CHARTS.values() for name in names):
        lines, keys, changes = [], [], []
        for at, run in enumerate(runs):
            series = run.history[prefix + name]
            if len(series):
                drawn = Series(series.steps * scales[at], series.values)
                line = Line(
                    drawn, style_of(at), smooth=not prefix and name not in _EXACT, dots=bool(prefix), pale=False
                )
                lines.append(line)
                keys.append((f"{line.style} points" if only_points(line) else line.style, run.name))
                changes.append(f"{run.name} {_change(series)}")
        if lines:
            title, steps = _title(name), max(run.history.step * scale for run, scale in zip(runs, scales))
            label = f"{title} of {len(lines)} runs: {'; '.join(changes)}."
            svg = line_chart(label, lines, steps=max(steps, 1), positive=name == "grad_norm")
            found.append(Figure(title, svg, keys, ""))
    return found


def over_rows(runs: Sequence[Run]) -> bool:
    """Return whether charts of these runs are drawn over rows instead of steps."""
    return any(scale != 1 for scale in _rows_a_step(runs))


def _rows_a_step(runs: Sequence[Run]) -> list[int]:
    batches = [run.known.batch or 0 for run in runs]
    return batches if all(batches) and len(set(batches)) > 1 else [1] * len(runs)


def _title(name: str) -> str:
    (title,) = (title for title, names in CHARTS.items() if name in names)
    return title if len(CHARTS[title]) == 1 else f"{title}, {name.rpartition('/')[2]}"
