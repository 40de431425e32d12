"""Time and memory of the frozen head: token log-probabilities and the gradient of the hidden states.

    python bench/head.py --rows 1024 --hidden 1024 --vocab 49152

All methods run in turn on the same rows, so that whatever else the machine does meets all of them. The yardstick is
the two matrix products that any of them has to make, and nothing else. Nothing is reported unless every method agrees
with float64. Liger has no operation for this: its chunked losses return whole losses, its fused cross-entropy means.
"""

import importlib.util
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

import fastpref
from fastpref.kernels.linear_logprob_naive import linear_logprob_naive
from fastpref.memory import PeakStorage

TILE = 8192  # columns of the bare products' tile
TRL_CHUNK = 32768  # trl's own default
CHECKED_ROWS = 32
ROUNDINGS = 32  # of the logits in the dtype under test, allowed in what is checked


@dataclass(frozen=True)
class Problem:
    hidden: Tensor  # [N, H], requires grad
    weight: Tensor  # [V, H], frozen
    targets: Tensor  # [N]
    loss_weights: Tensor  # [N], the loss is Σ loss_weights·logp


@dataclass(frozen=True)
class Result:
    grad: Tensor  # [N, H]
    logp: Tensor | None = None  # [N]


@dataclass(frozen=True)
class Method:
    name: str
    prepare: Callable[[Problem], Callable[[], Result]]  # allocates what lives longer than a step; returns the step
    truth: Callable[[Problem], Result]
    package: str = "torch"


def bare_products(problem: Problem) -> Callable[[], Result]:
    """H·Wᵀ and (H·Wᵀ)·W by tiles of the vocabulary, without a softmax between them."""
    hidden, weight = problem.hidden.detach(), problem.weight
    buffer = hidden.new_empty(hidden.shape[0], min(TILE, weight.shape[0]))
    out = torch.empty_like(hidden)

    def step() -> Result:
        out.zero_()
        for start in range(0, weight.shape[0], TILE):
            w = weight[start : start + TILE]
            tile = buffer[:, : w.shape[0]]
            torch.addmm(tile, hidden, w.t(), beta=0, out=tile)
            out.addmm_(tile, w)
        return Result(out)

    return step


def differentiated(logps: Callable[[Problem], Tensor]) -> Callable[[Problem], Callable[[], Result]]:
    """The step of a method that gives log-probabilities: those, and the gradient of the loss."""

    def prepare(problem: Problem) -> Callable[[], Result]:
        def step() -> Result:
            logp = logps(problem)
            (grad,) = torch.autograd.grad((logp * problem.loss_weights).sum(), problem.hidden)
            return Result(grad, logp.detach())

        return step

    return prepare


def ours(problem: Problem) -> Tensor:
    return fastpref.linear_logprob(problem.hidden, problem.weight, problem.targets).logp


def trl(problem: Problem) -> Tensor:
    from trl.kernels import ChunkedLogProbFunction

    outputs = ChunkedLogProbFunction.apply(
        problem.hidden, problem.weight, None, problem.targets, 1.0, TRL_CHUNK, None, 1.0, ()
    )
    return outputs[0]


def full_logits(problem: Problem) -> Tensor:
    logits = problem.hidden @ problem.weight.t()
    return logits.log_softmax(-1).gather(-1, problem.targets[:, None]).squeeze(-1)


def true_products(problem: Problem) -> Result:
    hidden, weight = problem.hidden.detach().double(), problem.weight.double()
    return Result(hidden @ weight.t() @ weight)


def true_logprobs(problem: Problem) -> Result:
    hidden = problem.hidden.detach().double().requires_grad_()
    logp = linear_logprob_naive(hidden, problem.weight.double(), problem.targets).logp
    (grad,) = torch.autograd.grad((logp * problem.loss_weights.double()).sum(), hidden)
    return Result(grad, logp.detach())


METHODS = (
    Method("two bare products", bare_products, true_products),
    Method("fastpref", differentiated(ours), true_logprobs),
    Method("trl", differentiated(trl), true_logprobs, package="trl"),
    Method("full logits", differentiated(full_logits), true_logprobs),
)


def make_problem(rows: int, hidden: int, vocab: int, dtype: torch.dtype, device: str) -> Problem:
    """Logits of order one, as at an untrained head, and coefficients of both signs, as of a preference loss."""
    generator = torch.Generator().manual_seed(0)
    return Problem(
        hidden=torch.randn(rows, hidden, generator=generator).to(device, dtype).requires_grad_(),
        weight=(torch.randn(vocab, hidden, generator=generator) / hidden**0.5).to(device, dtype),
        targets=torch.randint(vocab, (rows,), generator=generator).to(device),
        loss_weights=torch.linspace(-1, 1.5, rows).to(device),
    )


def some_rows(problem: Problem) -> tuple[Problem, Tensor]:
    """Evenly spaced rows of the problem, and their numbers. A row's results depend on no other row."""
    rows = problem.targets.shape[0]
    chosen = torch.linspace(0, rows - 1, min(rows, CHECKED_ROWS), device=problem.targets.device).long()
    hidden, targets, loss_weights = problem.hidden[chosen], problem.targets[chosen], problem.loss_weights[chosen]
    return Problem(hidden, problem.weight, targets, loss_weights), chosen


def relative_error(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm())


def is_right(method: Method, problem: Problem) -> bool:
    """Whether a step over all rows, which also warms the machine up, is right on some of them."""
    result = method.prepare(problem)()
    part, chosen = some_rows(problem)
    truth = method.truth(part)
    bound = ROUNDINGS * torch.finfo(problem.hidden.dtype).eps
    errors = [relative_error(result.grad[chosen], truth.grad)]
    if result.logp is not None and truth.logp is not None:
        errors.append(relative_error(result.logp[chosen], truth.logp))
    return all(error <= bound for error in errors)


def peak_mib(method: Method, problem: Problem) -> float:
    """What a step needs beside the problem. Untimed: counting slows every operation."""
    with PeakStorage() as memory:
        method.prepare(problem)()
    return memory.peak / 2**20


def timed(step: Callable[[], Result], device: str) -> float:
    """Milliseconds of one step."""
    if device != "cpu":
        torch.accelerator.synchronize()
    start = time.perf_counter()
    step()
    if device != "cpu":
        torch.accelerator.synchronize()
    return (time.perf_counter() - start) * 1000


def in_turn(methods: list[Method], problem: Problem, repeats: int, device: str) -> dict[str, list[float]]:
    """Milliseconds of every repeat by method: all once, then all again."""
    steps = {method.name: method.prepare(problem) for method in methods}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            times[name].append(timed(step, device))
    return times


def describe(times: list[float], bare: float, mib: float) -> tuple[str, ...]:
    """The cells of a row: median, spread, ratio to the bare products' median, and peak memory."""
    low, high = (float(x) for x in torch.quantile(torch.tensor(times), torch.tensor([0.2, 0.8])))
    median = statistics.median(times)
    return f"{median:.1f}", f"{low:.1f} to {high:.1f}", f"{median / bare:.2f}", f"{mib:.1f}"


def machine(device: str) -> str:
    """The processor, the threads and the versions the numbers belong to."""
    if device == "cpu":
        info = Path("/proc/cpuinfo")
        lines = info.read_text().splitlines() if info.exists() else []
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        name = names[0] if names else platform.processor() or platform.machine()
    else:
        name = torch.cuda.get_device_name(device)
    packages = [f"{package} {version(package)}" for package in ("torch", "trl") if is_installed(package)]
    return ", ".join([name, f"{torch.get_num_threads()} threads", *packages])


def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def main(
    rows: Annotated[int, typer.Option(help="N, scored tokens", min=1)] = 1024,
    hidden: Annotated[int, typer.Option(help="H, width of the hidden states", min=1)] = 1024,
    vocab: Annotated[int, typer.Option(help="V, rows of the head", min=1)] = 49152,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16")] = "float32",
    repeats: Annotated[int, typer.Option(help="timed steps of each method", min=1)] = 5,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
) -> None:
    """Compare ways of computing a frozen head's token log-probabilities and their gradient."""
    console = Console()
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in dtypes:
        raise typer.BadParameter(f"dtype is {dtype!r}, known are {', '.join(dtypes)}")
    problem = make_problem(rows, hidden, vocab, dtypes[dtype], device)
    methods = [method for method in METHODS if is_installed(method.package)]
    wrong = [method.name for method in methods if not is_right(method, problem)]
    if wrong:
        console.print(f"Not timed, for these are not right: {', '.join(wrong)}")
        raise typer.Exit(1)
    memory = {method.name: peak_mib(method, problem) for method in methods}
    times = in_turn(methods, problem, repeats, device)
    bare = statistics.median(times[METHODS[0].name])

    title = f"Frozen head, forward and backward: N {rows}, H {hidden}, V {vocab}, {dtype}, {repeats} repeats"
    table = Table(title=title)
    table.add_column("method", no_wrap=True)
    for heading in ("median ms", "p20 to p80", "× bare", "extra MiB"):
        table.add_column(heading, justify="right", no_wrap=True)
    for method in METHODS:
        if method in methods:
            table.add_row(method.name, *describe(times[method.name], bare, memory[method.name]))
        else:
            table.add_row(method.name, "not installed", "", "", "")
    console.print(table)
    console.print(machine(device))


if __name__ == "__main__":
    typer.run(main)
