"""What the metrics of a run say about it: rules from rows to verdicts. Nothing here imports torch.

A rule looks at the history and at what is known of the run, and finds something or nothing. Beginning and end are means
over the first tenth and the last fifth of the logged steps, compared by their standard errors; evaluations are of the
same rows every time and are preferred where there are two. docs/health.md has every rule.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from fastpref.health import causes, symptoms  # noqa: F401 (causes register first)
from fastpref.health.rule import RULES, Finding, Known, Verdict, known_of
from fastpref.run.history import History

__all__ = ["RULES", "Known", "Verdict", "Watch", "diagnose", "known_of"]


def diagnose(history: History, known: Known) -> list[Verdict]:
    """All verdicts on a run, or on a run so far: alarms first, a cause instead of its symptoms."""
    found: dict[str, Finding] = {}
    for rule in RULES.values():
        explained = any(rule.name in RULES[name].explains for name in found)
        finding = None if explained else rule.check(history, known)
        if finding is not None:
            found[rule.name] = finding
    verdicts = [Verdict(name, f.severity, f.message, f.evidence, f.steps, f.advice) for name, f in found.items()]
    return sorted(verdicts, key=lambda verdict: verdict.severity != "alarm")


class Watch:
    """A run's health while it goes on. A verdict is told once, when it first appears."""

    def __init__(self, known: Known, rows: Iterable[Mapping[str, Any]] = ()):
        self.known, self.history = known, History(rows)
        self._told = {verdict.rule for verdict in self.verdicts()} if self.history.step else set()
        self._next = 0  # rows of training at which to look again

    def add(self, row: Mapping[str, Any]) -> list[Verdict]:
        """What is new after a row. Looked for at every evaluation, and ever more rarely as the run gets longer."""
        self.history.add(row)
        if "loss" in row and self.history.rows < self._next:
            return []
        self._next = self.history.rows + max(1, self.history.rows // 20)
        new = [verdict for verdict in self.verdicts() if verdict.rule not in self._told]
        self._told |= {verdict.rule for verdict in new}
        return new

    def verdicts(self) -> list[Verdict]:
        return diagnose(self.history, self.known)
