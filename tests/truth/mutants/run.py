"""Runs mutants, each in a process of its own, and says by what each is caught."""

import importlib.util
import json
import os
import re
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from fastpref.kernels import linear_logprob_launch, preference_loss_launch
from tests.truth.mutants.generate import Mutant

LAUNCHERS = {
    "linear_logprob_triton.py": linear_logprob_launch,
    "preference_loss_triton.py": preference_loss_launch,
}
LIMIT = 60  # seconds of processor time for a mutant


@dataclass(frozen=True)
class Verdict:
    """What catches a mutant; nothing, if `by` is empty."""

    by: str = ""  # a fault of the memory, "wrong value", "crash", "endless"; or "refused" by the compiler
    problem: str = ""
    place: str = ""  # file:line that the fault is reported at
    message: str = ""


def run_mutants(
    mutants: list[Mutant], problems: dict[str, Callable[[], None]], jobs: int
) -> Iterator[tuple[Mutant, Verdict]]:
    """Run each mutant on the problems, one after the other until it is caught, `jobs` mutants at a time."""
    waiting, running = list(reversed(mutants)), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            mutant = waiting.pop()
            running[_start(mutant, problems)] = mutant
        reader, process = next(iter(running))
        with os.fdopen(reader, "rb") as pipe:
            answer = pipe.read()
        status = os.waitpid(process, 0)[1]
        mutant = running.pop((reader, process))
        yield mutant, Verdict(**json.loads(answer)) if answer else _of_death(status)


def _start(mutant: Mutant, problems: dict[str, Callable[[], None]]) -> tuple[int, int]:
    reader, writer = os.pipe()
    process = os.fork()
    if process:
        os.close(writer)
        return reader, process
    os.close(reader)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    signal.setitimer(signal.ITIMER_PROF, LIMIT)
    try:
        verdict = _judge(mutant, problems)
        with os.fdopen(writer, "wb") as pipe:
            pipe.write(json.dumps(asdict(verdict)).encode())
    finally:
        os._exit(0)


def _of_death(status: int) -> Verdict:
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number == signal.SIGPROF:
            return Verdict("endless", message=f"not finished after {LIMIT} s")
        return Verdict("crash", message=signal.Signals(number).name)
    return Verdict("crash", message="no answer")


def _judge(mutant: Mutant, problems: dict[str, Callable[[], None]]) -> Verdict:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / mutant.file
        path.write_text(mutant.source, encoding="utf-8")
        _install(_load(path), LAUNCHERS[mutant.file])
        for name, problem in problems.items():
            try:
                problem()
            except Exception as error:
                return _verdict(error, name)
    return Verdict()


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"mutant_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    spec.loader.exec_module(module)
    return module


def _install(mutated: ModuleType, launcher: ModuleType) -> None:
    """Make the launcher use the kernels of the mutated file."""
    for name in list(vars(launcher)):
        if name.endswith("_kernel") and hasattr(mutated, name):
            setattr(launcher, name, getattr(mutated, name))


def _verdict(error: Exception, problem: str) -> Verdict:
    fault: Any = getattr(error, "fault", None)
    message = " ".join(str(error).split())[:300]
    if fault is not None:
        kinds = {"oob_read": "read out of bounds", "oob_write": "write out of bounds", "poison": "undefined operation"}
        file, line = (re.findall(r'"([^"]+)":(\d+):\d+', fault.op) or [(fault.source_file, fault.source_line)])[0]
        place = f"{Path(file).name}:{line}"  # of a function that the kernel calls, if it has one
        return Verdict(str(kinds.get(fault.kind, fault.kind)), problem, place, message)
    if isinstance(error, AssertionError):
        return Verdict("wrong value", problem, message=message)
    return Verdict("refused", problem, message=f"{type(error).__name__}: {message}")
