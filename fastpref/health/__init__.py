"""Judge a run by its metrics: rules turn rows of metrics into verdicts. Nothing here imports torch.

A rule reads the history and other facts of the run, and returns a verdict or None. It compares the beginning with the
end, which are means over the first tenth and the last fifth of the logged steps, by their standard errors. Evaluations
always use the same rows, so rules prefer them if there are at least two. docs/health.md describes every rule.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from fastpref.health import causes, curves, data, imitation  # noqa: F401 (causes register first)
from fastpref.health.rule import RULES, Known, Verdict, known_of
from fastpref.run.history import History

__all__ = ["RULES", "Known", "Verdict", "Watch", "diagnose", "known_of"]


def diagnose(history: History, known: Known) -> list[Verdict]:
    """Return all verdicts on a run, complete or not: alarms first, and a cause instead of its symptoms."""
    verdicts: list[Verdict] = []
    for name, rule in RULES.items():
        explained = any(name in RULES[verdict.rule].explains for verdict in verdicts)
        if not explained and rule.applies(history, known) and (verdict := rule.check(history, known)) is not None:
            verdicts.append(replace(verdict, rule=name))
    return sorted(verdicts, key=lambda verdict: verdict.severity != "alarm")


class Watch:
    """Watches the health of a run while it trains. Each verdict appears once."""

    def __init__(self, known: Known, rows: Iterable[Mapping[str, Any]] = ()):
        self.known, self.history = known, History(rows)
        self._reported = {verdict.rule for verdict in self.verdicts()} if self.history.step else set()
        self._next = 0  # the number of training rows at which rules run next

    def add(self, row: Mapping[str, Any]) -> list[Verdict]:
        """Add a row and return new verdicts. Rules run at evaluations, and less often as the run gets longer."""
        self.history.add(row)
        if "loss" in row and self.history.rows < self._next:
            return []
        self._next = self.history.rows + max(1, self.history.rows // 20)
        new = [verdict for verdict in self.verdicts() if verdict.rule not in self._reported]
        self._reported |= {verdict.rule for verdict in new}
        return new

    def verdicts(self) -> list[Verdict]:
        return diagnose(self.history, self.known)
