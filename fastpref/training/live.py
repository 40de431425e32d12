"""The live view of a run on a terminal: what it does now, how far it is, and its curves."""

import time
from array import array
from collections.abc import Mapping, Sequence

import numpy as np
from rich.console import Console, Group
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

_BLOCKS = "▁▂▃▄▅▆▇█"
CURVES = (  # metric, its name, its format, whether its scale is 0 to 1
    ("loss", "loss", "{:.4f}", False),
    ("perplexity", "perplexity", "{:.3f}", False),
    ("rewards/margins", "margin", "{:+.3f}", False),
    ("rewards/accuracies", "accuracy", "{:.0%}", True),
)
STOPPING = "stopping after this step, with a checkpoint; Ctrl-C again stops without one"


class View:
    """The state of a run, drawn whenever the terminal asks for it."""

    def __init__(self, console: Console, steps: int, done: int = 0):
        self._console, self.steps, self.done, self._first = console, steps, done, done
        self.stopping = False
        self._began = time.monotonic()
        self._training = 0.0  # seconds in steps
        self.phase("")
        self._facts = ""
        self._curves: dict[str, array[float]] = {name: array("d") for name, *_ in CURVES}

    def phase(self, words: str, parts: int = 0, part: str = "") -> None:
        """Say what is done now, in how many parts, and what a `part` is."""
        self._phase, self._since, self._part, self._parts = words, time.monotonic(), 0, parts
        self._each = f"{part} " if part else ""

    def part(self, number: int, of: int) -> None:
        self._part, self._parts = number, of

    def point(self, metrics: Mapping[str, float]) -> None:
        """Add a step to the curves."""
        for name, values in self._curves.items():
            value = metrics.get(name)
            if value is not None and np.isfinite(value):
                values.append(value)

    def stepped(self, step: int, seconds: float, metrics: Mapping[str, float], facts: Sequence[str]) -> None:
        """Show a step that took `seconds`, with its metrics and further facts."""
        self.done, self._training = step, self._training + seconds
        self.point(metrics)
        self._facts = "  ".join(facts)

    @property
    def left(self) -> float | None:
        """The seconds that the remaining steps will take, or None before the first step."""
        taken = self.done - self._first
        return self._training / taken * (self.steps - self.done) if taken else None

    def __rich__(self) -> Group:
        lines = [self._bar(), self._now()]
        if self.stopping:
            lines.append(Text(STOPPING, style="bold", no_wrap=True, overflow="ellipsis"))
        if any(self._curves.values()):
            lines.append(self._table())
        if self._facts:
            lines.append(Text(self._facts, no_wrap=True, overflow="ellipsis"))
        return Group(*lines)

    def _bar(self) -> Table:
        left = self.left
        words = f"{self.done:,}/{self.steps:,}  " + ("-:--" if left is None else clock(left)) + " left"
        row = Table.grid(Column(ratio=1), Column(no_wrap=True), padding=(0, 1), expand=True)
        row.add_row(ProgressBar(total=self.steps, completed=self.done), words)
        return row

    def _now(self) -> Text:
        now = time.monotonic()
        words = self._phase
        if self._parts > 1:
            words += f", {self._each}{self._part:,} of {self._parts:,}"
        words += f"  {clock(now - self._since)}"
        total = f"  {clock(now - self._began)} in all"
        return Text(words + (total if len(words + total) <= self._console.width else ""), no_wrap=True, style="dim")

    def _table(self) -> Table:
        """Return the curves, each with its last value, and with its least and greatest where there is room."""
        drawn, room = self._console.encoding.lower().startswith("utf"), self._console.width
        justified = ("left", "right", "left", "left")
        table = Table.grid(*(Column(no_wrap=True, justify=side) for side in justified), padding=(0, 1))
        width = min(40, room - 20)
        for name, words, form, share in CURVES:
            values = self._curves[name]
            if values:
                line = sparkline(values, width, (0.0, 1.0) if share else None) if drawn and width > 4 else ""
                bounds = f"{form.format(min(values))} to {form.format(max(values))}" if room >= 76 else ""
                table.add_row(words, form.format(values[-1]), Text(line, style="cyan"), Text(bounds, style="dim"))
        return table


def clock(seconds: float) -> str:
    """Return a time as 0:07, 12:34 or 3:02:05."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours:,}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def sparkline(values: Sequence[float], width: int, scale: tuple[float, float] | None = None) -> str:
    """Draw values in at most `width` blocks, one per part for its mean, scaled from the least mean to the greatest."""
    edges = np.unique(np.linspace(0, len(values), min(width, len(values)) + 1).astype(int))
    means = np.add.reduceat(np.asarray(values), edges[:-1]) / np.diff(edges)
    low, high = scale or (float(means.min()), float(means.max()))
    if high <= low:
        return _BLOCKS[3] * len(means)
    places = np.clip((means - low) / (high - low) * len(_BLOCKS), 0, len(_BLOCKS) - 1).astype(int)
    return "".join(_BLOCKS[at] for at in places)
