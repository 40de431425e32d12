"""Outcomes of cases; the cases of a block are run in turn and written as one line of JSON each."""

import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch


@dataclass(frozen=True)
class Outcome:
    """The result of a case."""

    numbers: dict[str, float] = field(default_factory=dict)  # by a name with its unit
    right: bool | None = None  # whether the numbers are as they must be; None if nothing was compared
    note: str = ""


Case = tuple[str, Callable[[], Outcome]]


@dataclass(frozen=True)
class Record:
    """A line of the file."""

    block: str
    case: str
    outcome: Outcome
    seconds: float = 0.0  # with compilation and preparation

    def line(self) -> str:
        return json.dumps(asdict(self)) + "\n"

    @classmethod
    def read(cls, line: str) -> "Record":
        values = json.loads(line)
        return cls(**values | {"outcome": Outcome(**values["outcome"])})


def run_cases(block: str, cases: Iterable[Case], file: Path) -> None:
    """Run cases in turn, and add a line to the file after each."""
    for name, case in cases:
        began = time.perf_counter()
        outcome = _outcome(case)
        with file.open("a", encoding="utf-8") as lines:
            lines.write(Record(block, name, outcome, time.perf_counter() - began).line())


def _outcome(case: Callable[[], Outcome]) -> Outcome:
    try:
        return case()
    except ModuleNotFoundError as error:
        return Outcome(note=f"left out: {error.name} is not installed")
    except torch.OutOfMemoryError:
        return Outcome(note="out of memory")
    except Exception as error:  # compilers and drivers fail in many ways, and the next case may work
        lines = [line for line in str(error).splitlines() if line.strip()] or [""]
        return Outcome(right=False, note=f"{type(error).__name__}: {lines[0].strip()[:200]}")


def read(file: Path) -> Iterator[Record]:
    """Yield the records of a file, whose last line may have been cut off."""
    if not file.exists():
        return
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            yield Record.read(line)
        except ValueError:
            return
