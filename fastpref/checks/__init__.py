"""Looks at what a config names, before anything heavy is imported: files, rows, model, tokenizer, packages, devices.

`fastpref check` is this, and every training begins with it, so nothing here imports torch. What only the libraries know
is found by the run itself, before its first step.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from fastpref.checks.machine import device_mistakes, package_mistakes
from fastpref.checks.model import model_mistakes
from fastpref.checks.rows import data_mistakes
from fastpref.checks.space import space_findings
from fastpref.config import Config
from fastpref.errors import UserError


@dataclass
class Findings:
    """The mistakes of a config on this machine, and notes for the user."""

    mistakes: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def require(self) -> None:
        """Raise UserError with all mistakes, a line each, if there are any."""
        if self.mistakes:
            raise UserError("\n".join(self.mistakes))


_LOOKS: tuple[Callable[[Config], Iterator[str]], ...] = (
    model_mistakes, data_mistakes, package_mistakes, device_mistakes
)  # fmt: skip


def look(config: Config) -> Findings:
    """Look at what a config names. Raises nothing for what is wrong: see `Findings`."""
    findings = Findings()
    for mistakes in _LOOKS:
        try:
            for mistake in mistakes(config):
                findings.mistakes.append(mistake)
        except UserError as error:
            findings.mistakes.append(str(error))
    findings.mistakes = list(dict.fromkeys(findings.mistakes))
    mistakes, notes = space_findings(config)
    findings.mistakes += mistakes
    findings.notes += notes
    return findings
