"""Record a run in addition to its metrics: its health while it trains, and run.json for its report."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastpref.config import Config
from fastpref.data import repeats
from fastpref.data.cache import Tokenized
from fastpref.data.extras import has
from fastpref.health import Health, Verdict, Watch, known_of
from fastpref.report import write_report
from fastpref.run.environment import environment, peak_memory
from fastpref.run.folder import RunFolder
from fastpref.run.history import read_facts, read_rows
from fastpref.step.metrics import Metrics


class Record:
    """The record of a run, in the first process only. The training does not depend on it."""

    def __init__(self, folder: RunFolder, config: Config, steps: int, data: Tokenized, plan: str, device: torch.device):
        self._folder, self._device = folder, device
        self._began = time.monotonic()
        self._before = 0.0  # seconds before the run was resumed
        rows = {name: asdict(data.counts[name]) for name in ("train", "heldout")}
        rows |= (
            {"duplicates": data.duplicates, "left_out": data.left_out} | _labels(data) | _extras(data) | _faults(data)
        )
        self._facts: dict[str, Any] = {
            "plan": plan, "steps": steps, "rows": rows, "environment": environment(device)
        }  # fmt: skip
        self._config, self._watch = config, Watch(known_of(config, self._facts))

    def begin(self, *, resumed: bool) -> None:
        """Begin the record once the folder exists. A resumed run continues its old record."""
        if resumed:
            old = read_facts(self._folder.path)
            self._before = float(old.get("seconds") or 0.0)
            self._watch = Watch(self._watch.known, read_rows(self._folder.metrics))
            heldout = old.get("heldout")
            if heldout and heldout["step"] <= self._watch.history.step:  # the checkpoint may be an earlier one
                self._facts["heldout"] = heldout
        self._write(ended="going on")

    def add(self, row: Mapping[str, float]) -> list[Verdict]:
        """Add a logged row and return the verdicts that are new with it."""
        return self._watch.add(row)

    def evaluated(self, step: int, metrics: Metrics) -> None:
        """Record the rewards of all held-out completions, for intervals. Only those of the last evaluation are kept."""
        rewards = metrics.completions()
        sides = {"chosen": _short(rewards.chosen), "rejected": _short(rewards.rejected)}
        self._facts["heldout"] = {"step": step, "paired": metrics.paired} | sides
        self._write(ended="going on")

    def sampled(self, before: Sequence[Sequence[str]], after: Sequence[str]) -> None:
        """Record questions with the answers before and after the training, if the run was completed."""
        self._facts["samples"] = [
            {"asked": asked, "before": old, "after": after[at] if at < len(after) else None}
            for at, (asked, old) in enumerate(before)
        ]
        self._watch.know(known_of(self._config, self._facts))

    def health(self) -> Health:
        """Return what the rules say now, and add to the record what they said before."""
        health = self._watch.health()
        self._facts["passed"] = [{"rule": v.rule, "message": v.message, "steps": v.steps} for v in health.passed]
        return health

    def end(self, how: str) -> Path:
        """Write run.json and report.html. Raises WriteError."""
        self._write(ended=how)
        return write_report(self._folder.path)

    def _write(self, *, ended: str) -> None:
        seconds = self._before + time.monotonic() - self._began
        self._folder.record(self._facts | {"seconds": seconds, "memory": peak_memory(self._device), "ended": ended})


def _labels(data: Tokenized) -> dict[str, int]:
    """Count the good and the bad training rows if they are single completions."""
    labels = data.train.labels
    return {} if labels is None else {"good": int(labels.sum()), "bad": int((~labels).sum())}


def _extras(data: Tokenized) -> dict[str, int]:
    """Count the training rows with a weight or a margin, if there are any."""
    counts = {"weighted": has(data.train, "weight").sum(), "with_margins": has(data.train, "margin").sum()}
    return {name: int(count) for name, count in counts.items() if count}


def _faults(data: Tokenized) -> dict[str, int]:
    """Count what rules on the data ask for."""
    return {
        "ends": len(data.ends),
        "repeated": repeats.repeated(data.train),
        "leaked": repeats.leaked(data.train, data.heldout),
        "questionless": repeats.questionless(data.train),
    }


def _short(values: Tensor) -> list[float]:
    """Round values to six digits, because they are only counted and averaged."""
    return [float(f"{value:.6g}") for value in values.tolist()]
