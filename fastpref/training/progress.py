"""The display of a run: a live view on a terminal, plain lines elsewhere."""

import time
from array import array
from collections.abc import Mapping, Sequence
from textwrap import shorten

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from fastpref.health import Health, Verdict

_BLOCKS = "▁▂▃▄▅▆▇█"
_CURVES = (  # metric, its name, its format, whether its scale is 0 to 1
    ("loss", "loss", "{:.4f}", False),
    ("perplexity", "perplexity", "{:.3f}", False),
    ("rewards/margins", "margin", "{:+.3f}", False),
    ("rewards/accuracies", "accuracy", "{:.0%}", True),
)
_EVALUATION = (
    ("eval/loss", "held-out loss {:.4f}"),
    ("eval/perplexity", "perplexity {:.3f}"),
    ("eval/rewards/accuracies", "accuracy {:.1%}"),
    ("eval/rewards/margins", "margin {:+.3f}"),
)
_STYLES = {"alarm": "bold red", "warning": "yellow"}


class Display:
    """Prints notes, steps, evaluations, verdicts and samples. Text from data is never read as markup."""

    def __init__(self, steps: int, done: int = 0, console: Console | None = None, *, examples: str = "pairs"):
        self.console = console or Console(highlight=False, soft_wrap=True)
        self._live = self.console.is_terminal and not self.console.is_dumb_terminal
        self._steps, self._before = steps, done  # `done`: the steps before a run was resumed
        self._examples = examples  # what a batch consists of, in one word
        self._training = self._last_line = 0.0  # seconds in steps; when the last line was printed
        self._curves: dict[str, array[float]] = {name: array("d") for name, *_ in _CURVES}
        self._speed = ""
        self._bar = Progress(  # narrow enough for 40 columns
            BarColumn(bar_width=12), MofNCompleteColumn(), TimeRemainingColumn(compact=True),
            TextColumn("left", table_column=Column(no_wrap=True)), console=self.console,
        )  # fmt: skip
        self._task = self._bar.add_task("", total=steps, completed=done)
        self._view = Live(get_renderable=self._seen, console=self.console, transient=True, vertical_overflow="crop")

    def __enter__(self) -> "Display":
        if self._live:
            self._view.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._view.stop()

    def _seen(self) -> Group:
        """Return the progress bar, and under it the curves of loss, margin and accuracy."""
        table = Table.grid(Column(), Column(justify="right"), Column(no_wrap=True), padding=(0, 1))
        drawn = self.console.encoding.lower().startswith("utf")
        width = min(40, self.console.width - 20)
        for name, words, form, share in _CURVES:
            values = self._curves[name]
            if values:
                line = sparkline(values, width, (0.0, 1.0) if share else None) if drawn and width > 4 else ""
                table.add_row(words, form.format(values[-1]), Text(line, style="cyan"))
        return Group(self._bar, table, Text(self._speed, no_wrap=True))

    def note(self, text: str) -> None:
        self.console.print(escape(text))

    def verdict(self, verdict: Verdict) -> None:
        """Print a verdict that has just appeared."""
        self._sentence(_line(verdict))

    def health(self, health: Health) -> None:
        """Print what the rules say at the end of the run."""
        self._sentence(Text(f"health: {health.summary()}"))
        for verdict in health.verdicts:
            self._sentence(Text("  ") + _line(verdict))

    def _sentence(self, text: Text) -> None:
        """Print a text wrapped between words on a terminal, and on one line elsewhere."""
        self.console.print(text, soft_wrap=not self._live)

    def precomputing(self, completions: int) -> None:
        """Print how many completions have reference log-probabilities, every five seconds."""
        now = time.monotonic()
        self._last_line = self._last_line or now
        if now - self._last_line >= 5:
            self._last_line = now
            self.console.print(f"reference log-probabilities: {completions:,} completions computed")

    def step(self, step: int, seconds: float, metrics: Mapping[str, float], memory: int | None = None) -> None:
        """Show a step. `memory` is the peak so far in bytes. Without a terminal, print at most one line per second."""
        now = time.monotonic()
        self._training += seconds
        if self._live:
            for name, values in self._curves.items():
                if name in metrics and np.isfinite(metrics[name]):
                    values.append(metrics[name])
            self._speed = f"{metrics['pairs_per_second']:.3g} {self._examples}/s"
            self._speed += "" if memory is None else f"  {memory / 1e9:.2f} GB"
            self._bar.update(self._task, completed=step)
        elif now - self._last_line >= 1 or step == self._steps:
            self._last_line = now
            left = self._training / (step - self._before) * (self._steps - step)
            forms = (
                ("loss", "loss {:.4f}"),
                ("perplexity", "perplexity {:.3f}"),
                ("rewards/accuracies", "accuracy {:.0%}"),
                ("pairs_per_second", f"{{:.3g}} {self._examples}/s"),
                ("tokens_per_second", "{:.0f} tok/s"),
            )
            self.console.print(f"step {step}/{self._steps}  {_in_words(metrics, forms)}  {left:.0f} s left")

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        self.console.print(f"step {step}: {_in_words(metrics, _EVALUATION)}")

    def samples(self, before: Sequence[Sequence[str]], after: Sequence[str]) -> None:
        """Print questions with their answers before and after the training."""
        for (question, old), new in zip(before, after):
            table = Table.grid(padding=(0, 2))
            table.add_row("asked", escape(shorten(question, 400, placeholder=" …")))
            table.add_row("before", escape(old))
            table.add_row("after", escape(new))
            self.console.print(Panel(table, title="a held-out prompt", title_align="left", expand=False))


def sparkline(values: Sequence[float], width: int, scale: tuple[float, float] | None = None) -> str:
    """Draw values in at most `width` blocks, one per part for its mean, scaled from the least mean to the greatest."""
    edges = np.unique(np.linspace(0, len(values), min(width, len(values)) + 1).astype(int))
    means = np.add.reduceat(np.asarray(values), edges[:-1]) / np.diff(edges)
    low, high = scale or (float(means.min()), float(means.max()))
    if high <= low:
        return _BLOCKS[3] * len(means)
    places = np.clip((means - low) / (high - low) * len(_BLOCKS), 0, len(_BLOCKS) - 1).astype(int)
    return "".join(_BLOCKS[at] for at in places)


def _line(verdict: Verdict) -> Text:
    return Text.assemble((f"{verdict.severity}: ", _STYLES[verdict.severity]), f"{verdict.message} {verdict.advice}")


def _in_words(metrics: Mapping[str, float], forms: Sequence[tuple[str, str]]) -> str:
    return "  ".join(form.format(metrics[name]) for name, form in forms if name in metrics)
