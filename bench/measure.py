"""Measure methods of computing a head: errors against float64, time in alternating turns, and peak memory."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bench.methods import METHODS, Method, Unsupported, bare_products, by_tokens, capped
from bench.objectives import Objective
from bench.problems import Problem, Shape, make_problem

BARE = "bare products"
CHECKED_TOKENS = 64  # per sequence: positions are independent of each other
FLOAT64_ROWS = 128  # positions at once


@dataclass(frozen=True)
class Case:
    shape: Shape
    objective: Objective
    passes: str  # "forward", "frozen" or "trained": what is differentiated
    dtype: torch.dtype
    device: str

    @property
    def name(self) -> str:
        return f"{self.shape.model} {self.objective.name} {self.passes}"

    def problem(self) -> Problem:
        return make_problem(self.shape, self.dtype, self.device, trained=self.passes == "trained")


@dataclass
class Row:
    """The results of one method on one case."""

    method: str
    ms: list[float] = field(default_factory=list)
    bytes: int | None = None  # peak memory beyond the problem's tensors
    value_error: float | None = None  # relative to float64
    grad_error: float | None = None
    note: str = ""  # why there is no time, or no comparable one

    def quantile(self, share: float) -> float:
        return float(np.quantile(self.ms, share))

    @property
    def median(self) -> float:
        return statistics.median(self.ms)

    def record(self) -> dict[str, Any]:
        """Return the row as JSON values, with quantiles if it was timed."""
        times = {f"p{share}": self.quantile(share / 100) for share in (20, 50, 80)} if self.ms else {}
        return asdict(self) | times


# --- errors -----------------------------------------------------------------------------------------------------------


def run(method: Method, problem: Problem, objective: Objective, *, backward: bool) -> tuple[Tensor, list[Tensor]]:
    """Run one step. Return the loss, and its gradients for the hidden states and for the weight if it is trained."""
    if not backward:
        with torch.no_grad():
            return method.loss(problem, objective), []
    leaves = [tensor for tensor in (problem.hidden, problem.weight) if tensor.requires_grad]
    value = method.loss(problem, objective)
    return value.detach(), list(torch.autograd.grad(value, leaves))


def float64_logps(problem: Problem, hidden: Tensor) -> Tensor:
    """Return the log-probabilities [2P, T] of the scored positions, computed some rows at a time."""

    def part(rows: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
        logits = capped(rows @ weight.t(), problem.softcap)
        return logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)

    rows, targets = hidden[problem.scored], problem.labels[problem.scored]
    parts = [
        checkpoint(part, some, theirs, problem.weight, use_reentrant=False)
        for some, theirs in zip(rows.split(FLOAT64_ROWS), targets.split(FLOAT64_ROWS), strict=True)
    ]
    logp = torch.cat([part for part in parts if isinstance(part, Tensor)])
    return logp.new_zeros(problem.labels.shape).masked_scatter(problem.scored, logp)


def errors(rows: Sequence[Row], methods: Sequence[Method], case: Case) -> None:
    """Record each method's errors against float64, and mark methods as wrong if their errors exceed a bound.

    The bound is twice the error of all logits in the same dtype, plus one rounding of that dtype or 64 of
    float32, in which the sums over hundreds of tokens are computed.
    """
    shape = case.shape
    few = replace(shape, length=shape.prompt + min(CHECKED_TOKENS, shape.length - shape.prompt))
    problem = replace(case, shape=few).problem()
    truth_of = Method("float64", by_tokens(float64_logps))
    exact, exact_grads = run(truth_of, problem.as_float64(), case.objective, backward=case.passes != "forward")
    for row, method in zip(rows, methods, strict=True):
        if not method.installed:
            row.note = "not installed"
            continue
        try:
            value, grads = run(method, problem, case.objective, backward=case.passes != "forward")
        except Unsupported as reason:
            row.note = str(reason)
            continue
        row.value_error = float((value.double() - exact).abs() / exact.abs())
        pairs = zip(grads, exact_grads, strict=True)
        row.grad_error = max((float((a.double() - b).norm() / b.norm()) for a, b in pairs), default=None)
    torch_itself = next(row for row in rows if row.method == "all logits")
    if torch_itself.value_error is None:
        return
    rounding = max(torch.finfo(case.dtype).eps, 64 * torch.finfo(torch.float32).eps)
    for row in rows:
        for what, error, theirs in (
            ("loss", row.value_error, torch_itself.value_error),
            ("gradient", row.grad_error, torch_itself.grad_error),
        ):
            if error is not None and theirs is not None and not error <= 2 * theirs + rounding:
                row.note = f"wrong: {what} off by {error:.1e}"


# --- memory -----------------------------------------------------------------------------------------------------------


def peak_bytes(step: Callable[[], object], device: str) -> int:
    """Return the peak bytes that torch's allocator held during a step beyond those before it."""
    if device != "cpu":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    assert profiler.profiler is not None
    results = profiler.profiler.kineto_results
    assert results is not None
    memory: Any = [event for event in results.events() if event.name() == "[memory]"]
    moves = sorted((event.start_ns(), event.nbytes()) for event in memory)
    held = peak = 0
    for _, size in moves:
        held += size
        peak = max(peak, held)
    return peak


# --- time -------------------------------------------------------------------------------------------------------------


def timed(step: Callable[[], object], device: str) -> float:
    """Return the milliseconds of a step, on a GPU between two events of its stream, without other time of the host.

    On one thread of a CPU it is the time of the process, which other load disturbs less than the clock on the wall.
    """
    if device == "cpu":
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        start = clock()
        step()
        return (clock() - start) * 1000
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def median_ms(step: Callable[[], object], device: str, repeats: int) -> float:
    """Return the median milliseconds of a step, after one that compiles and warms up."""
    step()
    return statistics.median(timed(step, device) for _ in range(repeats))


class Subject(Protocol):
    """Something that takes steps and can be measured: a method here, or one in another process."""

    def peak_bytes(self) -> int: ...

    def ms(self) -> float: ...


@dataclass(frozen=True)
class Local:
    step: Callable[[], object]
    device: str

    def peak_bytes(self) -> int:
        self.step()  # compile and warm up
        return peak_bytes(self.step, self.device)

    def ms(self) -> float:
        return timed(self.step, self.device)


def subject(method: Method, case: Case, problem: Problem) -> Local:
    backward = case.passes != "forward"
    return Local(lambda: run(method, problem, case.objective, backward=backward), case.device)


def measure(
    case: Case,
    repeats: int,
    methods: Sequence[Method] = METHODS,
    others: Mapping[str, Subject] = MappingProxyType({}),
    *,
    check: bool = True,
) -> list[Row]:
    """Measure all methods on one case, in turn, so that other load on the machine affects all of them.

    The first row is the yardstick, the bare products. A method that is not installed, unsupported, wrong or out of
    memory has a note.
    """
    rows = [Row(method.name, note="" if method.installed else "not installed") for method in methods]
    if check:
        errors(rows, methods, case)
    problem = case.problem()
    bare = bare_products(problem, case.objective, backward=case.passes != "forward")
    subjects: dict[str, Subject] = {BARE: Local(bare, case.device)}
    subjects |= {method.name: subject(method, case, problem) for method in methods if method.installed}
    subjects |= others
    rows = [Row(BARE), *rows, *map(Row, others)]
    take_turns(subjects, [row for row in rows if not row.note or row.value_error is not None], repeats)
    return rows


def take_turns(subjects: Mapping[str, Subject], rows: Sequence[Row], repeats: int) -> None:
    """Measure the memory of each row's subject, then their times in turn, into the rows."""
    ready = list(rows)
    for row in rows:
        try:
            row.bytes = subjects[row.method].peak_bytes()
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if "memory" not in str(error).lower():
                raise
            row.note = "out of memory"
            ready.remove(row)
        except Unsupported as reason:
            row.note = str(reason)
            ready.remove(row)
    for _ in range(repeats):
        for row in ready:
            row.ms.append(subjects[row.method].ms())
