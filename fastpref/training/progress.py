"""The display of a run: a live view on a terminal, plain lines elsewhere."""

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from textwrap import shorten, wrap

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from fastpref.health import Health, Verdict
from fastpref.run.times import duration
from fastpref.training.live import STOPPING, View, clock

_EVALUATION = (
    ("eval/loss", "held-out loss {:.4f}"),
    ("eval/perplexity", "perplexity {:.3f}"),
    ("eval/rewards/accuracies", "accuracy {:.1%}"),
    ("eval/rewards/margins", "margin {:+.3f}"),
)
_STYLES = {"alarm": "bold red", "warning": "yellow"}


def _console() -> Console:
    """Return the console of the program's output. A notebook gets plain lines, which it shows as one output."""
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_jupyter:
        return console
    return Console(highlight=False, soft_wrap=True, force_jupyter=False, force_terminal=False)


class Display:
    """Prints notes, steps, evaluations, verdicts and samples. Text from data is never read as markup."""

    def __init__(self, steps: int, done: int = 0, console: Console | None = None, *, examples: str = "pairs"):
        self.console = console or _console()
        self._live = self.console.is_terminal and not self.console.is_dumb_terminal
        self._steps, self._before = steps, done  # `done`: the steps before a run was resumed
        self._examples = examples  # what a batch consists of, in one word
        self._training = self._last_line = 0.0  # seconds in steps; when the last line was printed
        self._began = time.monotonic()
        self._taken, self._totals = 0, {"pairs": 0.0, "tokens": 0.0}  # steps, and what they computed
        self._memory: int | None = None
        self.view = View(self.console, steps, done)
        self._shown = Live(get_renderable=self.view.__rich__, console=self.console, transient=True)

    def __enter__(self) -> "Display":
        if self._live:
            self._shown.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._shown.stop()

    def past(self, rows: Iterable[Mapping[str, float]]) -> None:
        """Begin the curves of a resumed run with the steps before."""
        for row in rows:
            self.view.point(row)

    def phase(self, words: str, parts: int = 0, part: str = "") -> None:
        """Say in the live view what the run does now, in how many parts, and what a `part` is."""
        self.view.phase(words, parts, part)

    def part(self, number: int, of: int) -> None:
        """Say in the live view which of the phase's parts is computed: a micro-batch, or how many rows are done."""
        self.view.part(number, of)

    def stopping(self) -> None:
        """Say that an interrupt has been noticed. A signal's handler calls this, so no stream is written to."""
        self.view.stopping = True
        if not self._live and not self.console.quiet:
            with suppress(OSError):
                os.write(2, f"{STOPPING}\n".encode())

    def note(self, text: str) -> None:
        """Print a note; on a terminal between its words, but a command, which is indented, as it will be copied."""
        lines = text.split("\n")
        if self._live:
            width = self.console.width
            lines = [
                part
                for line in lines
                for part in ([line] if line.startswith(" ") or not line else _wrapped(line, width))
            ]
        self.console.print(escape("\n".join(lines)))

    def ended(self) -> None:
        """Print the time, the mean speed and the peak memory of the steps, which vanish with the bar."""
        if not self._taken:
            return
        pairs, tokens = (self._totals[what] / self._training for what in ("pairs", "tokens"))
        memory = "" if self._memory is None else f", {self._memory / 1e9:.2f} GB at most"
        steps = f"{self._taken:,} step{'s' * (self._taken > 1)} in {duration(self._training)}"
        self.console.print(f"{steps}: {pairs:.3g} {self._examples}/s, {tokens:,.0f} tokens/s{memory}")

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
        """Show a step. `memory` is the peak so far in bytes.

        Without a terminal, print at most one line per second, and per hundredth of the time so far.
        """
        now = time.monotonic()
        self._training += seconds
        self._taken, self._memory = self._taken + 1, memory
        for what in self._totals:
            self._totals[what] += metrics[f"{what}_per_second"] * seconds
        if self._live:
            facts = [f"{metrics['pairs_per_second']:.3g} {self._examples}/s"]
            facts += [] if memory is None else [f"peak memory {memory / 1e9:.2f} GB"]
            facts += [f"learning rate {metrics['learning_rate']:.2g}"] if "learning_rate" in metrics else []
            self.view.stepped(step, seconds, metrics, facts)
        elif now - self._last_line >= max(1, (now - self._began) / 100) or step == self._steps:
            self._last_line = now
            left = self._training / (step - self._before) * (self._steps - step)
            forms = (
                ("loss", "loss {:.4f}"),
                ("perplexity", "perplexity {:.3f}"),
                ("rewards/accuracies", "accuracy {:.0%}"),
                ("pairs_per_second", f"{{:.3g}} {self._examples}/s"),
                ("tokens_per_second", "{:.0f} tok/s"),
            )
            time_left = f"{left:.0f} s" if left < 120 else clock(left)
            self.console.print(f"step {step}/{self._steps}  {_in_words(metrics, forms)}  {time_left} left")

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


def _wrapped(line: str, width: int) -> list[str]:
    """Wrap a line between its words. A path that is longer than the line is left whole, so that it can be copied."""
    return wrap(line, width, break_long_words=False, break_on_hyphens=False)


def _line(verdict: Verdict) -> Text:
    return Text.assemble((f"{verdict.severity}: ", _STYLES[verdict.severity]), f"{verdict.message} {verdict.advice}")


def _in_words(metrics: Mapping[str, float], forms: Sequence[tuple[str, str]]) -> str:
    return "  ".join(form.format(metrics[name]) for name, form in forms if name in metrics)
