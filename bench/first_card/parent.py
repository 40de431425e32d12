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
from bench.first_card.outcome import LOST, Outcome, Record, begun, read
from bench.first_card.table import table


def run_blocks(minutes: float, folder: Path, machine: dict[str, Any], tell: Callable[[str], object]) -> list[Record]:
    """Run all blocks in at most so many minutes, and return their records. The folder has what is known at any time."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = folder.resolve() / "cases.jsonl"
    lines.unlink(missing_ok=True)
    deadline, tiny = time.monotonic() + 60 * minutes, machine["device"] == "cpu"
    for name, seconds in _times(deadline):
        tell(f"{BLOCKS[name].title}: at most {seconds:.0f} s")
        _run_block(name, seconds, lines, tiny=tiny)
        _write(folder, machine, list(read(lines)))
    return list(read(lines))


def _times(deadline: float) -> Iterator[tuple[str, float]]:
    """Yield each block with its share of the seconds that are left."""
    left = sum(block.share for block in BLOCKS.values())
    for name, block in BLOCKS.items():
        yield name, max(1.0, (deadline - time.monotonic()) * block.share / left)
        left -= block.share


def _run_block(name: str, seconds: float, lines: Path, *, tiny: bool) -> None:
    """Run a block in a process of its own, and go on in another after a case that kills it or loses the GPU.

    A process that finishes no case is the last one.
    """
    deadline = time.monotonic() + seconds
    while True:
        before = _cases(name, lines)
        status, printed, outcome = _run(name, max(1.0, deadline - time.monotonic()), lines, tiny=tiny)
        after = _cases(name, lines)
        if outcome is not None:
            case = begun(printed)
            with lines.open("a", encoding="utf-8") as file:
                file.write(Record(name, "" if case in after else case, outcome).line())
        if after == before or not (status == LOST or status < 0) or time.monotonic() > deadline:
            return


def _cases(block: str, lines: Path) -> set[str]:
    """Return the cases of a block that are in the file."""
    return {record.case for record in read(lines) if record.block == block and record.case}


def _run(name: str, seconds: float, lines: Path, *, tiny: bool) -> tuple[int, str, Outcome | None]:
    """Run a process of a block. Return its exit status, what it printed, and what went wrong with it, or None."""
    command = [sys.executable, "-m", "bench.first_card", "--block", name, "--output", str(lines)]
    root = Path(__file__).parents[2]
    try:
        process = subprocess.run(
            [*command, *(["--tiny"] if tiny else [])], cwd=root, capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired as stopped:
        printed = stopped.stdout or b""  # bytes even of text
        printed = printed.decode(errors="replace") if isinstance(printed, bytes) else printed
        return 0, printed, Outcome(note=f"stopped after {seconds:.0f} s")
    if process.returncode in (0, LOST):
        return process.returncode, process.stdout, None
    said = [line for line in process.stderr.splitlines() if line.strip()] or [f"status {process.returncode}"]
    missing = said[-1].startswith("ModuleNotFoundError")
    note = f"{'left out' if missing else 'failed'}: {said[-1][:200]}"
    return process.returncode, process.stdout, Outcome(right=None if missing else False, note=note)


def _write(folder: Path, machine: dict[str, Any], records: list[Record]) -> None:
    result = {"machine": machine, "cases": [asdict(record) for record in records]}
    (folder / "results.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (folder / "results.md").write_text(table(machine, records), encoding="utf-8")
