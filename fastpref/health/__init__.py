"""Judge a run by its metrics: rules turn rows of metrics into verdicts. Nothing here imports torch.

A rule reads the history and other facts of the run, and returns a verdict, None, or UNASKED if too little is known. It
compares the beginning with the end, which are means over the first tenth and the last fifth of the logged steps, by
their standard errors. Evaluations always use the same rows, so rules prefer them if there are at least two.
docs/health.md describes every rule.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

# isort: off
from fastpref.health import causes, optimised, curves, answers, data, heldout, imitation  # noqa: F401 (causes first)

# isort: on
from fastpref.health.rule import RULES, UNASKED, Known, Verdict, known_of, passed_of
from fastpref.run.history import History

__all__ = ["RULES", "Health", "Known", "Verdict", "Watch", "diagnose", "examine", "known_of", "passed_of"]


@dataclass(frozen=True)
class Health:
    """What the rules say about a run, complete or not."""

    verdicts: tuple[Verdict, ...]  # alarms first, and a cause instead of its symptoms
    asked: tuple[str, ...]  # the rules that could be asked
    waiting: tuple[str, ...]  # those that need more steps, evaluations or held-out rows
    passed: tuple[Verdict, ...] = ()  # verdicts that were given during the run and hold no longer

    def after(self, given: Iterable[Verdict]) -> "Health":
        """Return this with those of the verdicts `given` during the run that hold no longer and that none explains."""
        there = {verdict.rule for verdict in self.verdicts}
        there |= {name for verdict in self.verdicts for name in RULES[verdict.rule].explains}
        return replace(self, passed=tuple(verdict for verdict in given if verdict.rule not in there))

    def summary(self) -> str:
        """Return what was found, in one line without an end."""
        counts = {kind: sum(v.severity == kind for v in self.verdicts) for kind in ("alarm", "warning")}
        found = ", ".join(_counted(count, kind) for kind, count in counts.items() if count)
        if not self.asked:
            return "no rule could be asked yet, for want of steps, evaluations or held-out rows"
        words = [found or f"{_counted(len(self.asked), 'rule')} found nothing wrong"]
        if self.waiting:
            words.append(
                f"{len(self.waiting)} of {len(self.asked) + len(self.waiting)} could not be asked, for want of steps, "
                "evaluations or held-out rows"
            )
        if self.passed:
            names, verb = ", ".join(verdict.rule for verdict in self.passed), "have" if len(self.passed) > 1 else "has"
            words.append(f"{_counted(len(self.passed), 'finding')} given before {verb} passed ({names})")
        return "; ".join(words)


def examine(history: History, known: Known) -> Health:
    """Ask every rule that concerns the run."""
    verdicts: list[Verdict] = []
    asked, waiting = [], []
    for name, rule in RULES.items():
        if not rule.concerns(known):
            continue
        answer = rule.ask(history, known)
        (waiting if answer is UNASKED else asked).append(name)
        explained = any(name in RULES[verdict.rule].explains for verdict in verdicts)
        if isinstance(answer, Verdict) and not explained:
            verdicts.append(replace(answer, rule=name))
    verdicts.sort(key=lambda verdict: verdict.severity != "alarm")
    return Health(tuple(verdicts), tuple(asked), tuple(waiting))


def diagnose(history: History, known: Known) -> list[Verdict]:
    """Return all verdicts on a run, complete or not: alarms first, and a cause instead of its symptoms."""
    return list(examine(history, known).verdicts)


class Watch:
    """Watches the health of a run while it trains. Each verdict appears once."""

    def __init__(self, known: Known, rows: Iterable[Mapping[str, Any]] = ()):
        """Begin with the rows of the part of a run that was trained before, whose verdicts do not appear again."""
        self.known, self.history = known, History()
        self._told: dict[str, Verdict] = {}
        self._next = 0  # the number of training rows at which rules run next
        for row in rows:
            self.add(row)

    def add(self, row: Mapping[str, Any]) -> list[Verdict]:
        """Add a row and return new verdicts. Rules run at evaluations, and less often as the run gets longer."""
        self.history.add(row)
        if "loss" in row and self.history.rows < self._next:
            return []
        self._next = self.history.rows + max(1, self.history.rows // 20)
        new = [verdict for verdict in self.health().verdicts if verdict.rule not in self._told]
        self._told |= {verdict.rule: verdict for verdict in new}
        return new

    def know(self, known: Known) -> None:
        """Replace the facts of the run, once there are more."""
        self.known = known

    def health(self) -> Health:
        """Ask every rule. A verdict that was given has passed if it holds no longer and nothing explains it."""
        return examine(self.history, self.known).after(self._told.values())


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"
