"""The logged rows of a run as series, and how they have changed. Nothing here imports torch."""

import json
import math
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

METRICS, FACTS, REPORT = "metrics.jsonl", "run.json", "report.html"  # in a run's folder
HELDOUT = "eval/"


@dataclass(frozen=True)
class Series:
    """The finite values of a metric over the logged steps."""

    steps: np.ndarray  # [n] int64, rising
    values: np.ndarray  # [n] float64

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, part: slice) -> "Series":
        return Series(self.steps[part], self.values[part])

    def beyond(self, step: float) -> "Series":
        """Return the part after a step."""
        return self[int(np.searchsorted(self.steps, step, side="right")) :]

    @property
    def first(self) -> "Series":
        """The first tenth of the rows, at least three."""
        return self[: max(3, len(self) // 10)]

    @property
    def last(self) -> "Series":
        """The last fifth of the rows, at least five."""
        return self[-max(5, len(self) // 5) :]

    @property
    def mean(self) -> float:
        return float(self.values.mean())

    @property
    def error(self) -> float:
        """The standard error of the mean if the rows are independent."""
        return float(self.values.std(ddof=1) / math.sqrt(len(self))) if len(self) > 1 else 0.0

    @property
    def span(self) -> tuple[int, int]:
        return int(self.steps[0]), int(self.steps[-1])


EMPTY = Series(np.zeros(0, np.int64), np.zeros(0))


@dataclass(frozen=True)
class Trend:
    """The change of a series from its beginning to its end."""

    start: float
    end: float
    error: float  # the standard error of their difference
    steps: tuple[int, int]

    @property
    def by(self) -> float:
        return self.end - self.start

    def rises(self, more_than: float = 0.0) -> bool:
        """Return whether the rise exceeds three standard errors and `more_than`."""
        return self.by > max(more_than, 3 * self.error)

    def falls(self, more_than: float = 0.0) -> bool:
        return -self.by > max(more_than, 3 * self.error)


class History:
    """All rows logged so far, in eight bytes per number."""

    def __init__(self, rows: Iterable[Mapping[str, Any]] = ()):
        self._series: dict[str, tuple[array[int], array[float]]] = {}  # name → steps and values
        self.rows = 0  # number of training rows
        self.not_finite: list[int] = []  # steps whose loss or gradient is not finite
        self.not_finite_heldout: list[int] = []  # steps of evaluations whose loss is not finite
        self.step = 0
        for row in rows:
            self.add(row)

    def add(self, row: Mapping[str, Any]) -> None:
        """Add a row of metrics.jsonl."""
        step = int(row["step"])
        self.step = max(self.step, step)
        self.rows += "loss" in row
        for name in ("loss", "grad_norm"):
            if name in row and not _finite(row[name]) and step not in self.not_finite[-1:]:
                self.not_finite.append(step)
        if HELDOUT + "loss" in row and not _finite(row[HELDOUT + "loss"]):
            self.not_finite_heldout.append(step)
        for name, value in row.items():
            if name != "step" and _finite(value):
                steps, values = self._series.get(name) or self._series.setdefault(name, (array("q"), array("d")))
                steps.append(step)
                values.append(value)

    def names(self) -> list[str]:
        return list(self._series)

    def __getitem__(self, name: str) -> Series:
        if name not in self._series:
            return EMPTY
        steps, values = self._series[name]
        return Series(np.array(steps), np.array(values))

    def change(self, name: str, start: float | None = None) -> Trend | None:
        """Return how a metric of at least eight training rows changed, or None. `start` is its known first value."""
        series = self[name]
        if len(series) < 8:
            return None
        last, error = series.last, series.last.error
        if start is None:
            start, error = series.first.mean, math.hypot(series.first.error, error)
        return Trend(start, last.mean, error, series.span)

    def heldout_change(self, name: str, start: float | None = None) -> Trend | None:
        """Return how a metric changed from the first evaluation to the last, or None if there is only one.

        Both are of the same rows, so the change has no sampling error. `start` replaces an evaluation before the
        training if there was none.
        """
        series = self[HELDOUT + name]
        if len(series) < 2:
            return None
        first = float(series.values[0]) if start is None or series.steps[0] == 0 else start
        return Trend(first, float(series.values[-1]), 0.0, series.span)


def _finite(value: Any) -> bool:
    return type(value) in (float, int) and math.isfinite(value)


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a metrics.jsonl without a last line that a killed run left incomplete."""
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                yield row


_KINDS: dict[str, type | tuple[type, ...]] = {  # of the values of run.json; null is none
    **dict.fromkeys(("rows", "tokens", "environment", "heldout"), dict),
    **dict.fromkeys(("samples", "passed"), list),
    **dict.fromkeys(("plan", "began", "ended", "written"), str),
    **dict.fromkeys(("seconds", "memory"), (int, float)),
    "steps": int,
}


def read_facts(folder: Path) -> dict[str, Any]:
    """Read run.json, which the report needs in addition to config and metrics. Returns {} if there is none.

    Values of another type than a run writes are left out, as the whole is if it is no JSON: a report does without.
    """
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(facts, dict):
        return {}
    return {name: value for name, value in facts.items() if _fits(name, value)}


def _fits(name: str, value: Any) -> bool:
    if not isinstance(value, _KINDS.get(name, object)):
        return False
    return name not in ("rows", "tokens") or all(isinstance(value.get(part, {}), dict) for part in ("train", "heldout"))
