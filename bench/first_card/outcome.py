"""Outcomes of cases; the cases of a block are run in turn and written as one line of JSON each."""

import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
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


LOST = 3  # the exit status of a process that can no longer use its device
_BEGUN = "case: "


def run_cases(block: str, cases: Iterable[Case], file: Path) -> int:
    """Run the cases of a block that the file has no line of, add a line after each, and return the exit status.

    After an illegal access nothing computes on a GPU until the process ends. So it ends, with `LOST`; the next one
    goes on with the next case. Each case is printed before it begins, as `begun` reads it.
    """
    done = sum(record.block == block and record.case != "" for record in read(file))
    for name, case in islice(cases, done, None):
        print(_BEGUN + json.dumps(name), flush=True)
        began = time.perf_counter()
        outcome = _outcome(case)
        with file.open("a", encoding="utf-8") as lines:
            lines.write(Record(block, name, outcome, time.perf_counter() - began).line())
        if outcome.right is False and _lost():
            return LOST
    return 0


def begun(printed: str) -> str:
    """Return the last case that a process printed before it began, or nothing."""
    names = [line for line in printed.splitlines() if line.startswith(_BEGUN)]
    return json.loads(names[-1].removeprefix(_BEGUN)) if names else ""


def _lost() -> bool:
    """Return whether this process can no longer use its GPU."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:  # torch.AcceleratorError
        return True
    return False


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
