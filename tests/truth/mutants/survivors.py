"""Mutants that no problem can tell from the kernels, and why: survivors.txt, a reason and below it their names."""

from pathlib import Path

PAGE = Path(__file__).with_name("survivors.txt")


def expected_survivors() -> dict[str, str]:
    """Return the reason for each mutant that is expected to survive, by its name."""
    reasons, reason = {}, ""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("# "):
            reason = line.removeprefix("# ")
        elif line:
            reasons[line] = reason
    return reasons
