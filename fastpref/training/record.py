"""Record a run in addition to its metrics: its health while it trains, and run.json for its report."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import torch
from torch import Tensor

from fastpref.config import Config
from fastpref.config.toml import to_toml
from fastpref.data import repeats
from fastpref.data.cache import Tokenized
from fastpref.data.extras import has
from fastpref.data.table import Examples
from fastpref.errors import UserError
from fastpref.health import Health, Verdict, Watch, known_of
from fastpref.preview.numbers import lengths
from fastpref.report import write_report
from fastpref.report.source import GOING_ON, Run
from fastpref.run.environment import environment, peak_memory
from fastpref.run.folder import RunFolder
from fastpref.run.history import read_facts, read_rows
from fastpref.run.times import now
from fastpref.step.metrics import Metrics

_RENEWED = 30.0  # seconds between two reports of a run that goes on, at least
_COST = 50  # a report may take this part of the time since the last one


class Record:
    """The record of a run, in the first process only. The training does not depend on it."""

    def __init__(self, folder: RunFolder, config: Config, steps: int, data: Tokenized, plan: str, device: torch.device):
        self._folder, self._device = folder, device
        self._config = config
        self._began = time.monotonic()
        self._day = now()  # when the run began
        self._renewed, self._took = 0.0, 0.0  # when the last report was written, and the seconds that took
        self._refused = False  # whether a report could not be written
        self._before = 0.0  # seconds before the run was resumed
        rows = {name: asdict(data.counts[name]) for name in ("train", "heldout")}
        rows |= {"duplicates": data.duplicates, "left_out": data.left_out}
        rows |= _labels(data) | _extras(data) | _faults(data)
        self._facts: dict[str, Any] = {
            "plan": plan, "steps": steps, "rows": rows, "tokens": _tokens(data), "environment": environment(device)
        }  # fmt: skip
        self._watch = Watch(known_of(config, self._facts))

    def begin(self, *, resumed: bool) -> None:
        """Begin the record once the folder exists. A resumed run continues its old record."""
        if resumed:
            old = read_facts(self._folder.path)
            self._before = float(old.get("seconds") or 0.0)
            self._day = str(old.get("began") or self._day)
            self._watch = Watch(self._watch.known, read_rows(self._folder.metrics))
            heldout = old.get("heldout")
            if heldout and heldout["step"] <= self._watch.history.step:  # the checkpoint may be an earlier one
                self._facts["heldout"] = heldout
        self._write()

    def add(self, row: Mapping[str, float]) -> list[Verdict]:
        """Add a logged row and return the verdicts that are new with it."""
        return self._watch.add(row)

    def evaluated(self, step: int, metrics: Metrics) -> None:
        """Record the rewards of all held-out completions, for intervals. Only those of the last evaluation are kept."""
        rewards = metrics.completions()
        sides = {"chosen": _short(rewards.chosen), "rejected": _short(rewards.rejected)}
        self._facts["heldout"] = {"step": step, "paired": metrics.paired} | sides
        self._watch.know(known_of(self._config, self._facts))
        self._write()

    def sampled(self, before: Sequence[Sequence[str]], after: Sequence[str]) -> None:
        """Record questions with the answers before and after the training, if the run was completed."""
        self._facts["samples"] = [
            {"asked": asked, "before": old, "after": after[at] if at < len(after) else None}
            for at, (asked, old) in enumerate(before)
        ]
        self._watch.know(known_of(self._config, self._facts))

    def health(self) -> Health:
        """Return what the rules say now, and record which of their verdicts have passed."""
        health = self._watch.health()
        self._facts["passed"] = [{"rule": v.rule, "message": v.message, "steps": v.steps} for v in health.passed]
        return health

    def renew(self, before: Sequence[Sequence[str]], *, at_once: bool) -> str | None:
        """Write report.html while the run goes on, at once or if the last one is old enough.

        `before` are questions with the answers before the training. Returns what a user should know, once: that the
        report cannot be written. The run goes on without.
        """
        since = time.monotonic() - self._renewed
        if self._refused or (since < max(_RENEWED, _COST * self._took) and not at_once):
            return None
        began = time.monotonic()
        try:
            self.sampled(before, ())
            self.health()  # some findings may have passed
            self._write()
            write_report(self._now)
        except Exception as error:
            self._refused = True
            return f"no report before the end: {error if isinstance(error, UserError) else repr(error)}"
        finally:
            self._renewed = time.monotonic()
            self._took = self._renewed - began
        return None

    @property
    def _now(self) -> Run:
        """The run so far, as its report shows it."""
        return Run(
            name=self._folder.path.resolve().name,
            folder=self._folder.path,
            history=self._watch.history,
            known=self._watch.known,
            config=to_toml(self._config),
            model=self._config.model.name,
            facts=self._facts | self._moving(GOING_ON),
            going_on=True,
        )

    def end(self, how: str) -> Path:
        """Write run.json and report.html. Raises WriteError."""
        self._write(how)
        return write_report(self._folder.path)

    def _write(self, ended: str = GOING_ON) -> None:
        self._folder.record(self._facts | self._moving(ended))

    def _moving(self, ended: str) -> dict[str, Any]:
        """Return the facts that change as time passes."""
        seconds = self._before + time.monotonic() - self._began
        memory = peak_memory(self._device)
        return {"seconds": seconds, "memory": memory, "ended": ended, "began": self._day, "written": now()}


def _tokens(data: Tokenized) -> dict[str, Any]:
    """Return percentiles of the lengths of each part of the rows, and then how many tokens were cut from that part."""
    return {
        name: {part.name: [*part.percentiles, cut] for part, cut in zip(lengths(examples), _cut(examples))}
        for name, examples in (("train", data.train), ("heldout", data.heldout))
        if len(examples)
    }


def _cut(examples: Examples) -> list[int]:
    """Return the tokens that were cut from the prompts, and from each kind of completion."""
    prompts = int(examples.table.column("prompt_cut").to_numpy().sum())
    lost = pc.list_flatten(examples.table.column("completions_cut")).to_numpy()  # pyright: ignore[reportAttributeAccessIssue]
    kinds = 1 if examples.ranked else examples.completion_lengths.shape[1]
    return [prompts, *(int(tokens) for tokens in lost.reshape(-1, kinds).sum(axis=0))]


def _labels(data: Tokenized) -> dict[str, int]:
    """Count the good and the bad training rows if they are single completions."""
    labels = data.train.labels
    return {} if labels is None else {"good": int(labels.sum()), "bad": int((~labels).sum())}


def _faults(data: Tokenized) -> dict[str, int]:
    """Count what rules on the rows ask for."""
    return {
        "ends": len(data.ends),
        "repeated": repeats.repeated(data.train),
        "leaked": repeats.leaked(data.train, data.heldout),
        "questionless": repeats.questionless(data.train),
    }


def _extras(data: Tokenized) -> dict[str, int]:
    """Count the training rows with a weight or a margin, if there are any."""
    counts = {"weighted": has(data.train, "weight").sum(), "with_margins": has(data.train, "margin").sum()}
    return {name: int(count) for name, count in counts.items() if count}


def _short(values: Tensor) -> list[float]:
    """Round values to six digits, because they are only counted and averaged."""
    return [float(f"{value:.6g}") for value in values.tolist()]
