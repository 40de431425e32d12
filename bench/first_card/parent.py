"""The processes of the blocks, and what they leave in the results' folder."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.first_card.blocks import BLOCKS
from bench.first_card.outcome import Outcome, Record, read
from bench.first_card.table import table


def run_blocks(minutes: float, folder: Path, machine: dict[str, Any], tell: Callable[[str], object]) -> list[Record]:
    """Run all blocks in at most so many minutes, and return their records. The folder has what is known at any time."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = folder.resolve() / "cases.jsonl"
    lines.unlink(missing_ok=True)
    deadline, tiny = time.monotonic() + 60 * minutes, machine["device"] == "cpu"
    for name, seconds in _times(deadline):
        tell(f"{BLOCKS[name].title}: at most {seconds:.0f} s")
        last = _run(name, seconds, lines, tiny=tiny)
        if last is not None:
            with lines.open("a", encoding="utf-8") as file:
                file.write(Record(name, "", last).line())
        _write(folder, machine, list(read(lines)))
    return list(read(lines))


def _times(deadline: float) -> Iterator[tuple[str, float]]:
    """Yield each block with its share of the seconds that are left."""
    left = sum(block.share for block in BLOCKS.values())
    for name, block in BLOCKS.items():
        yield name, max(1.0, (deadline - time.monotonic()) * block.share / left)
        left -= block.share


def _run(name: str, seconds: float, lines: Path, *, tiny: bool) -> Outcome | None:
    """Run a block in a process of its own. Return what went wrong with the process, or None."""
    command = [sys.executable, "-m", "bench.first_card", "--block", name, "--output", str(lines)]
    root = Path(__file__).parents[2]
    try:
        process = subprocess.run(
            [*command, *(["--tiny"] if tiny else [])], cwd=root, capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return Outcome(note=f"stopped after {seconds:.0f} s; its further cases did not run")
    if process.returncode:
        said = [line for line in process.stderr.splitlines() if line.strip()] or [f"status {process.returncode}"]
        missing = said[-1].startswith("ModuleNotFoundError")
        return Outcome(
            right=None if missing else False, note=f"{'left out' if missing else 'failed'}: {said[-1][:200]}"
        )
    return None


def _write(folder: Path, machine: dict[str, Any], records: list[Record]) -> None:
    result = {"machine": machine, "cases": [asdict(record) for record in records]}
    (folder / "results.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (folder / "results.md").write_text(table(machine, records), encoding="utf-8")
