"""Measure the savings of the fused preference-loss kernels against the same losses in torch operations.

Both take the same token log-probabilities and give the loss and its gradient for every token; the head is left out. On
a GPU both run in turn, timed between CUDA events, and their peak memory is measured. A CPU runs no Triton kernels, so
only torch is timed on it, which says nothing about a GPU. Two quantities need no GPU and are counted on fake tensors,
which have shapes and no values: the operations of a step, and the most bytes that its tensors take at once.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastpref
from bench.measure import Local, Row
from fastpref.kernels.operators import IMPLEMENTATIONS
from fastpref.losses import CPO, DPO, IPO, KTO, ORPO, LossOptions, SimPO, Totals
from fastpref.memory.allocations import PeakStorage

TORCH, FUSED = "torch", "triton"  # backends of `preference_loss`
LOSSES: dict[str, LossOptions] = {
    "dpo": DPO(),
    "dpo, bco_pair, sft": DPO(variants=("sigmoid", "bco_pair", "sft"), weights=(0.8, 0.2, 1.0)),
    "ipo": IPO(),
    "kto": KTO(),
    "orpo": ORPO(),
    "simpo": SimPO(),
    "cpo": CPO(),
}
IDLE = ("empty", "new_empty", "empty_like", "detach_")  # operations that launch nothing, as views do
Step = Callable[[], tuple[Tensor, Tensor]]  # returns the loss, and its gradient [N] for every token


@dataclass(frozen=True)
class LossCase:
    """A loss of P pairs, or for KTO of 2P rows, with completions of equal length."""

    name: str  # one of LOSSES
    pairs: int  # P
    length: int  # tokens per completion
    device: str

    def step(self, backend: str, dtype: torch.dtype = torch.float32) -> Step:
        loss, sequences = LOSSES[self.name], 2 * self.pairs
        generator = torch.Generator().manual_seed(0)
        logp, noise = torch.rand(2, sequences * self.length, generator=generator).to(self.device, dtype) * -2
        segments = torch.arange(sequences, device=self.device).repeat_interleave(self.length)
        lengths = torch.full((sequences,), self.length, device=self.device)
        options: dict[str, Any] = {"reference": logp + 0.1 * noise} if loss.uses_reference else {}
        options["totals"] = Totals(self.pairs, self.pairs * self.length)  # as in a training step
        if isinstance(loss, KTO):
            options["totals"] = Totals(sequences)
            options["labels"] = torch.arange(sequences, device=self.device) < self.pairs

        def step() -> tuple[Tensor, Tensor]:
            leaf = logp.detach().requires_grad_()
            value = fastpref.preference_loss(leaf, segments, lengths, loss, backend=backend, **options).loss
            return value.detach(), torch.autograd.grad(value, leaf)[0]

        return step


class Operations(TorchDispatchMode):
    """Counts the torch operations that compute something, each at least one kernel launch on a GPU."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        inside = IMPLEMENTATIONS.get(str(func.name()))
        if inside is not None:
            with self:
                return inside(*args, **(kwargs or {}))
        self.count += func.namespace == "aten" and not func.is_view and func._opname not in IDLE
        return func(*args, **(kwargs or {}))


@contextmanager
def pretending(counter: Operations) -> Iterator[None]:
    """Use fake tensors, without values, allow any backend, and count kernel launches instead of running them."""
    from fastpref.kernels import preference_loss_launch
    from fastpref.losses import token_loss

    def launch(*_: Any, **__: Any) -> None:
        counter.count += 1

    uncached = preference_loss_launch._on_device.__wrapped__  # so that no fake tensor is cached
    with (
        patch.object(token_loss, "takes_triton", lambda backend, *_: backend == FUSED),
        patch.multiple(preference_loss_launch, launch=launch, _on_device=uncached),
        FakeTensorMode(),
    ):
        yield


def count(case: LossCase, backend: str) -> tuple[int, int]:
    """Return the operations of a step, and the most bytes that its tensors take at once beyond the inputs."""
    counter, memory = Operations(), PeakStorage()
    with pretending(counter):
        step = replace(case, device="cpu").step(backend)
        with counter:
            step()
        with memory:
            step()
    return counter.count, memory.peak


def measure_loss(case: LossCase, repeats: int) -> dict[str, Any]:
    """Return JSON values for both backends on a case: operations, peak bytes and, where they run, ms of each turn."""
    gpu = case.device != "cpu"
    truth = case.step(TORCH, torch.float64)()
    rows, counts = {backend: Row(backend) for backend in (TORCH, FUSED)}, {}
    subjects = {backend: Local(case.step(backend), case.device) for backend in (rows if gpu else [TORCH])}
    if not gpu:
        rows[FUSED].note = "needs a GPU"
    for backend, row in rows.items():
        counts[backend], row.bytes = count(case, backend)
    for backend, subject in subjects.items():
        value, grad = case.step(backend)()
        rows[backend].value_error = float((value - truth[0]).abs() / truth[0].abs())
        rows[backend].grad_error = float((grad - truth[1]).norm() / truth[1].norm())
        if gpu:
            rows[backend].bytes = subject.peak_bytes()
    for _ in range(repeats):
        for backend, subject in subjects.items():
            rows[backend].ms.append(subject.ms())
    return {
        "loss": case.name,
        "pairs": case.pairs,
        "length": case.length,
        "rows": [row.record() | {"operations": counts[row.method]} for row in rows.values()],
    }


def losses_table(records: list[dict[str, Any]]) -> list[str]:
    """Return the records as a Markdown table, in which × torch is the ratio of the medians, and of the peaks."""
    lines = [
        "Token log-probabilities are given, and the head is left out. An operation is a call of torch that computes "
        "something, on a GPU one kernel launch or more, or a launch of a fused kernel. Without a GPU the peak is that "
        "of all tensor storages, counted.",
        "",
        "| loss | pairs × tokens | computed by | operations | ms p50 | × torch | peak KiB | × torch | gradient error |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for record in records:
        base = record["rows"][0]
        for row in record["rows"]:
            time = f"{row['p50']:.3f} | {row['p50'] / base['p50']:.2f}" if row["ms"] else f"{row['note']} | "
            error = "" if row["grad_error"] is None else f"{row['grad_error']:.0e}"
            lines.append(
                f"| {record['loss']} | {record['pairs']:,} × {record['length']:,} | {row['method']} | "
                f"{row['operations']} | {time} | {row['bytes'] / 2**10:.0f} | {row['bytes'] / base['bytes']:.2f} | "
                f"{error} |"
            )
    return lines
