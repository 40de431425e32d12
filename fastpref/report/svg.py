"""Draw line charts and histograms as inline SVG: no script, no network, colours from the style sheet of the page."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape

from fastpref.health.bands import Band
from fastpref.run.history import Series

WIDTH, HEIGHT = 360, 210  # as wide as a phone, so that text keeps its size there
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 10, 10, 26
POINTS = 240  # at most, per line


@dataclass(frozen=True)
class Line:
    """A series and how it is drawn. Its style is a class of the style sheet, or several."""

    series: Series
    style: str  # "training", "rejected", "heldout", "heldout-rejected", "run-0", …
    smooth: bool = True  # whether the strong line is the running mean
    dots: bool = False  # whether each value is marked
    pale: bool = True  # whether the values behind a running mean are shown, too


@dataclass(frozen=True)
class Axis:
    """Maps values to pixels."""

    low: float
    high: float
    begin: float
    end: float
    logarithmic: bool = False
    whole: bool = False  # whether the values are numbers of something: steps, pairs

    def __call__(self, value: float) -> float:
        return float(self.of(np.array([value]))[0])

    def of(self, values: np.ndarray) -> np.ndarray:
        """Map values [n] to pixels [n] inside the plot."""
        low, high = self.low, self.high
        if self.logarithmic:
            values, low, high = np.log10(np.maximum(values, low)), math.log10(low), math.log10(high)
        share = (np.clip(values, low, high) - low) / (high - low)
        return self.begin + share * (self.end - self.begin)

    def ticks(self) -> list[float]:
        if self.logarithmic:
            first, last = math.ceil(math.log10(self.low)), math.floor(math.log10(self.high))
            every = max(1, math.ceil((last - first + 1) / 5))
            return [10.0**power for power in range(first, last + 1, every)]
        raw = (self.high - self.low) / 4
        size = 10 ** math.floor(math.log10(raw))
        step = next(size * nice for nice in (1, 2, 2.5, 5, 10) if size * nice >= raw * 0.999)
        step = max(step, 1) if self.whole else step
        first = math.ceil(self.low / step - 1e-9)
        multiples = range(first, math.floor(self.high / step + 1e-9) + 1)
        return [float(f"{k * step:.6g}") for k in multiples]  # without the rounding error of the product


def line_chart(
    label: str, lines: Sequence[Line], band: Band | None = None, *, steps: int, positive: bool = False
) -> Markup:
    """Draw lines over the steps 0…`steps`, and shade the healthy band. `positive` values may get a logarithmic axis.

    `label` describes the chart for those who cannot see it.
    """
    x = Axis(0, max(steps, 1), _LEFT, WIDTH - _RIGHT, whole=True)
    y = _vertical(lines, band, positive=positive)
    parts = [_shading(band, y), _grid(x, y)]
    for line in lines:
        parts += _drawn(line, x, y)
    return _svg(label, parts)


def only_points(line: Line) -> bool:
    """Return whether a line is drawn as points: one or two values are no curve."""
    return len(line.series) <= 2


def _drawn(line: Line, x: Axis, y: Axis) -> list[str]:
    middle, lows, highs = _thin(line.series)
    dots = [
        f'<circle class="dot {line.style}" cx="{a:.1f}" cy="{b:.1f}" r="3"/>'
        for a, b in zip(x.of(middle.steps), y.of(middle.values))
        if only_points(line) or (line.dots and len(middle) <= 60)
    ]
    if only_points(line):
        return dots
    strong = f"line {line.style}"
    if not line.smooth or len(middle) <= 5:
        return [_path(x, y, middle, strong), *dots]
    faint = f"line faint {line.style}"
    thinned = len(middle) < len(line.series)
    behind = _area(x, y, middle.steps, lows, highs, line.style) if thinned else _path(x, y, middle, faint)
    return [*([behind] if line.pale else []), _path(x, y, _smooth(middle), strong), *dots]


def histogram(label: str, values: np.ndarray, bins: int = 24) -> Markup:
    """Draw a histogram of values [n] over equal parts of their range, one of which begins at zero."""
    low, high = _room(min(float(values.min()), 0.0), max(float(values.max()), 0.0))
    part = (high - low) / bins
    edges = part * np.arange(math.floor(low / part), math.ceil(high / part) + 1)
    counts, _ = np.histogram(values, edges)
    x = Axis(float(edges[0]), float(edges[-1]), _LEFT, WIDTH - _RIGHT)
    y = Axis(0, max(1.0, counts.max() * 1.05), HEIGHT - _BOTTOM, _TOP, whole=True)
    parts = [_grid(x, y)]
    for count, a, b in zip(counts, edges, edges[1:]):
        if count:
            style = "bar rejected" if b <= 0 else "bar training"
            top = y(float(count))
            parts.append(
                f'<rect class="{style}" x="{x(a) + 0.5:.1f}" y="{top:.1f}" width="{x(b) - x(a) - 1:.1f}" '
                f'height="{y(0) - top:.1f}"/>'
            )
    parts.append(f'<line class="zero" x1="{x(0):.1f}" x2="{x(0):.1f}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}"/>')
    return _svg(label, parts)


def number(value: float) -> str:
    """Return a short number for ticks and tables."""
    if value == 0:
        return "0"
    if not math.isfinite(value):
        return str(value)
    if 1e-3 <= abs(value) < 1e7:
        return f"{value:,.4g}" if abs(value) < 9999.5 else f"{value:,.0f}"
    digits, _, power = f"{value:.2e}".partition("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(power)}"


def _svg(label: str, parts: Sequence[str]) -> Markup:
    return Markup('<svg role="img" viewBox="0 0 {} {}" aria-label="{}"><title>{}</title>{}</svg>').format(
        WIDTH, HEIGHT, label, label, Markup("".join(parts))
    )


def _thin(series: Series) -> tuple[Series, np.ndarray, np.ndarray]:
    """Return the means of at most POINTS runs of rows, and the least and greatest value of each run."""
    if len(series) <= POINTS:
        return series, series.values, series.values
    edges = np.linspace(0, len(series), POINTS + 1).astype(int)[:-1]
    counts = np.diff([*edges, len(series)])
    means = np.add.reduceat(series.values, edges) / counts
    steps = np.add.reduceat(series.steps, edges) / counts
    least, greatest = np.minimum.reduceat(series.values, edges), np.maximum.reduceat(series.values, edges)
    return Series(steps, means), least, greatest


def _smooth(series: Series) -> Series:
    """Return the moving mean over a twentieth of the points, fewer at the ends."""
    half = max(1, len(series) // 40)
    sums = np.concatenate([[0.0], np.cumsum(series.values)])
    at = np.arange(len(series))
    reach = np.minimum(half, np.minimum(at, len(series) - 1 - at))
    return Series(series.steps, (sums[at + reach + 1] - sums[at - reach]) / (2 * reach + 1))


def _vertical(lines: Sequence[Line], band: Band | None, *, positive: bool) -> Axis:
    values = np.concatenate([line.series.values for line in lines])
    low, high = float(values.min()), float(values.max())
    if positive and low > 0 and high > 30 * low:
        return Axis(
            10 ** (math.log10(low) - 0.1), 10 ** (math.log10(high) + 0.1), HEIGHT - _BOTTOM, _TOP, logarithmic=True
        )
    span = max(high - low, _least(low, high))
    for edge in () if band is None else (band.low, band.high):
        if edge is not None and low - span <= edge <= high + span:  # show an edge of the band that is near the values
            low, high = min(low, edge), max(high, edge)
    return Axis(*_room(low, high), HEIGHT - _BOTTOM, _TOP)


def _room(low: float, high: float) -> tuple[float, float]:
    """Return a range around values, wide enough for ticks that differ in the digits that are shown."""
    missing = max(_least(low, high) - (high - low), 0.0) / 2
    margin = missing + 0.05 * (high - low)
    return low - margin, high + margin


def _least(low: float, high: float) -> float:
    return 0.005 * max(abs(low), abs(high)) or 1.0


def _shading(band: Band | None, y: Axis) -> str:
    if band is None or (band.low is None and band.high is None):
        return ""
    bottom = y.begin if band.low is None else y(band.low)
    top = y.end if band.high is None else y(band.high)
    if bottom - top < 0.5:
        return ""
    return (
        f'<rect class="band" x="{_LEFT}" y="{top:.1f}" width="{WIDTH - _LEFT - _RIGHT}" height="{bottom - top:.1f}"/>'
    )


def _grid(x: Axis, y: Axis) -> str:
    parts = []
    for tick in y.ticks():
        at = y(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="tick" text-anchor="end" x="{_LEFT - 6}" y="{at + 4:.1f}">{number(tick)}</text>')
    for tick in x.ticks():
        at = x(tick)
        anchor = "end" if at > WIDTH - 24 else "middle"
        parts.append(f'<text class="tick" text-anchor="{anchor}" x="{at:.1f}" y="{HEIGHT - 8}">{number(tick)}</text>')
    return "".join(parts)


def _path(x: Axis, y: Axis, series: Series, style: str) -> str:
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x.of(series.steps), y.of(series.values)))
    return f'<polyline class="{escape(style)}" points="{points}"/>'


def _area(x: Axis, y: Axis, steps: np.ndarray, lows: np.ndarray, highs: np.ndarray, style: str) -> str:
    across = x.of(steps)
    there = [f"{a:.1f},{b:.1f}" for a, b in zip(across, y.of(highs))]
    back = [f"{a:.1f},{b:.1f}" for a, b in zip(across[::-1], y.of(lows)[::-1])]
    return f'<polygon class="area {escape(style)}" points="{" ".join(there + back)}"/>'
