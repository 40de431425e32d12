"""What a person sees of a run: a live bar on a terminal, plain lines elsewhere."""

import time
from collections.abc import Mapping
from textwrap import shorten

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table


class Display:
    """Prints notes, evaluations and samples, and follows the steps. Text from data is never read as markup."""

    def __init__(self, steps: int, done: int = 0, console: Console | None = None):
        self.console = console or Console(highlight=False, soft_wrap=True)
        self._live = self.console.is_terminal
        self._steps, self._before = steps, done  # those of a run that is resumed
        self._training = 0.0  # seconds in steps
        self._last_line = 0.0
        # Narrow enough for 80 columns: a wider line would lose the bar and the time left.
        self._bar = Progress(
            BarColumn(bar_width=12),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("left  {task.fields[said]}", table_column=Column(no_wrap=True)),
            console=self.console,
            transient=True,
        )
        self._task = self._bar.add_task("", total=steps, completed=done, said="")

    def __enter__(self) -> "Display":
        if self._live:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._bar.stop()

    def note(self, text: str) -> None:
        self.console.print(escape(text))

    def precomputing(self, completions: int) -> None:
        """So many completions have their reference log-probabilities. A line every five seconds is enough."""
        now = time.monotonic()
        self._last_line = self._last_line or now
        if now - self._last_line >= 5:
            self._last_line = now
            self.console.print(f"reference log-probabilities: {completions:,} completions computed")

    def step(self, step: int, seconds: float, metrics: Mapping[str, float]) -> None:
        """One step is done. Off a terminal a line a second is enough, and one for the last step."""
        now = time.monotonic()
        self._training += seconds
        said = _short(metrics)
        if self._live:
            self._bar.update(self._task, completed=step, said=said)
        elif now - self._last_line >= 1 or step == self._steps:
            self._last_line = now
            left = self._training / (step - self._before) * (self._steps - step)
            self.console.print(f"step {step}/{self._steps}  {said}  {left:.0f} s left")

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        accuracy = metrics.get("eval/rewards/accuracies")
        said = "" if accuracy is None else f"  accuracy {accuracy:.1%}"
        margin = metrics.get("eval/rewards/margins")
        said += "" if margin is None else f"  margin {margin:+.3f}"
        self.console.print(f"step {step}: held-out loss {metrics['eval/loss']:.4f}{said}")

    def samples(self, before: list[tuple[str, str]], after: list[str]) -> None:
        """(question, answer) before the training, and the answers after it."""
        for (question, old), new in zip(before, after):
            table = Table.grid(padding=(0, 2))
            table.add_row("asked", escape(shorten(question, 400, placeholder=" …")))
            table.add_row("before", escape(old))
            table.add_row("after", escape(new))
            self.console.print(Panel(table, title="a held-out prompt", title_align="left", expand=False))


def _short(metrics: Mapping[str, float]) -> str:
    wanted = (
        ("loss", "loss {:.4f}"),
        ("rewards/accuracies", "accuracy {:.0%}"),
        ("pairs_per_second", "{:.3g} pairs/s"),
        ("tokens_per_second", "{:.0f} tok/s"),
    )
    return "  ".join(form.format(metrics[name]) for name, form in wanted if name in metrics)
