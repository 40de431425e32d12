"""The table of the first minutes, in Markdown."""

from collections.abc import Sequence
from typing import Any

from bench.first_card.blocks import BLOCKS
from bench.first_card.outcome import Record

_VERDICTS = {True: "right", False: "WRONG", None: ""}


def table(machine: dict[str, Any], records: Sequence[Record]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    device = machine["processor"] if machine["device"] == "cpu" else machine["device"]
    lines = [f"# {device}", "", f"{versions}; commit {machine['commit']}", ""]
    for name, block in BLOCKS.items():
        own = [record for record in records if record.block == name]
        if not own:
            continue
        lines += [f"## {block.title}", "", "| case | | numbers | s |", "|---|---|---|---:|"]
        for record in own:
            outcome = record.outcome
            numbers = [f"{what} {_short(value)}" for what, value in outcome.numbers.items()]
            said = "; ".join([*numbers, *([outcome.note] if outcome.note else [])]).replace("|", "\\|")
            lines.append(f"| {record.case} | {_VERDICTS[outcome.right]} | {said} | {record.seconds:.1f} |")
        lines.append("")
    return "\n".join([*lines, summary(records), ""])


def summary(records: Sequence[Record]) -> str:
    """Say in one sentence how many comparisons were right."""
    verdicts = [record.outcome.right for record in records if record.outcome.right is not None]
    left_out = sum(not record.outcome.numbers and record.outcome.right is None for record in records)
    return f"{sum(verdicts)} of {len(verdicts)} comparisons are right; {left_out} cases have no numbers."


def _short(value: float) -> str:
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
