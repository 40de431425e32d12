"""One run in a few numbers, for lists and comparisons of runs."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from fastpref.errors import UserError, one_line
from fastpref.health import Verdict
from fastpref.report.source import GOING_ON, Run, is_run, is_trl_run, read_run
from fastpref.run.history import HELDOUT, METRICS, REPORT, Series
from fastpref.run.times import moment

_DEPTH = 3  # folders below the one that is named


@dataclass(frozen=True)
class Summary:
    """A run in a few numbers. What is unknown is None."""

    run: Run
    state: str  # "finished", "stopped", "failed", "going on", "killed", or "" if that is not recorded
    verdicts: tuple[Verdict, ...]

    @property
    def began(self) -> datetime | None:
        return moment(self.run.facts.get("began"))

    @property
    def seconds(self) -> float | None:
        seconds = self.run.facts.get("seconds")
        return float(seconds) if isinstance(seconds, int | float) else None

    @property
    def health(self) -> str:
        """The verdicts in a word or two."""
        counts = [(kind, sum(v.severity == kind for v in self.verdicts)) for kind in ("alarm", "warning")]
        found = ", ".join(f"{n} {kind}{'s' * (n > 1)}" for kind, n in counts if n)
        asked, waiting = len(self.run.health.asked), len(self.run.health.waiting)
        if found or not waiting:
            return found or "nothing found"
        return f"nothing found, {asked} of {asked + waiting} rules asked" if asked else "not asked yet"

    def heldout(self, metric: str) -> float | None:
        """Return a held-out metric of the weights that are kept, or of the last evaluation."""
        series = self.run.history[HELDOUT + metric]
        scores = self.run.facts.get("heldout")
        kept = scores.get("step") if isinstance(scores, dict) else None
        there = series.values[series.steps == kept]
        return _last(Series(series.steps, there)) if len(there) else _last(series)

    def training(self, metric: str) -> float | None:
        return _last(self.run.history[metric])

    def median(self, metric: str) -> float | None:
        values = self.run.history[metric].values
        return float(np.median(values)) if len(values) else None

    def as_json(self) -> dict[str, Any]:
        run = self.run
        metrics = ("loss", "rewards/accuracies", "rewards/margins", "perplexity", "entropy")
        held = {HELDOUT + name: self.heldout(name) for name in metrics}
        return {
            "folder": str(run.folder),
            "loss": run.known.loss.type,
            "model": run.model,
            "state": self.state,
            "step": run.history.step,
            "steps": run.known.steps,
            "began": run.facts.get("began"),
            "seconds": self.seconds,
            "training/loss": self.training("loss"),
            **{name: value for name, value in held.items() if value is not None},
            "verdicts": [{"rule": v.rule, "severity": v.severity} for v in self.verdicts],
            "report": str(run.folder / REPORT) if (run.folder / REPORT).is_file() else None,
        }


def summary(run: Run) -> Summary:
    """Return a run in a few numbers."""
    ended = str(run.facts.get("ended") or "")
    state = "killed" if ended == GOING_ON and not run.going_on else ended
    return Summary(run, "failed" if state == "ended by a fault" else state, run.health.verdicts)


@dataclass(frozen=True)
class Found:
    """A run's folder, and what it holds or why that cannot be read."""

    folder: Path
    summary: Summary | None
    refusal: str = ""


def find_runs(folders: Sequence[Path]) -> list[Found]:
    """Return all runs in folders and in the folders below them, the newest first. Raises UserError.

    A run that cannot be read is part of the list, with the reason.
    """
    places: dict[Path, Path] = {}
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: there is no such folder; name one that has runs in it")
        for place in _runs_in(folder, _DEPTH):
            places.setdefault(place.resolve(), place)
    return sorted(map(_found, places.values()), key=_age, reverse=True)


def _runs_in(folder: Path, depth: int) -> Iterator[Path]:
    try:
        is_one = is_run(folder) or is_trl_run(folder)
        below = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir()) if depth and not is_one else []
    except OSError:  # a folder of another user
        return
    if is_one:
        yield folder
    for name in below:
        if not name.startswith("."):
            yield from _runs_in(folder / name, depth - 1)


def _found(folder: Path) -> Found:
    try:
        return Found(folder, summary(read_run(folder)))
    except Exception as error:  # one broken run must not hide the others
        return Found(folder, None, str(error) if isinstance(error, UserError) else one_line(error, named=True))


def _age(found: Found) -> float:
    """Return when a run was written to last, in seconds."""
    metrics = found.folder / METRICS
    return (metrics if metrics.exists() else found.folder).stat().st_mtime


def _last(series: Series) -> float | None:
    return float(series.values[-1]) if len(series.values) else None
