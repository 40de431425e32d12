"""For a card: accuracy of real heads, memory, and speed beside other libraries. `pytest -m gpu` runs them.

Every library is held to the truth before it is timed; pytest-benchmark prints the comparison, nothing is asserted of
time. Memory is what the allocator had at its peak, over what was there before.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpref import linear_logprob, preference_loss
from fastpref.losses import DPO

pytestmark = pytest.mark.gpu
ROWS = 4096  # scored tokens
MIB = 2**20


@dataclass(frozen=True)
class HeadShape:
    width: int
    vocabulary: int
    softcap: float | None = None


SHAPES = {
    "Llama-3-8B": HeadShape(4096, 128256),
    "Qwen2.5-7B": HeadShape(3584, 152064),
    "Gemma-2-2B": HeadShape(2304, 256000, softcap=30.0),
}


@dataclass(frozen=True)
class Problem:
    hidden: Tensor  # [N, H] requires grad
    weight: Tensor  # [V, H]
    targets: Tensor  # [N]
    softcap: float | None


def make(shape: HeadShape, *, trained: bool = False, dtype: torch.dtype = torch.bfloat16) -> Problem:
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(ROWS, shape.width, device="cuda", generator=generator).to(dtype)
    weight = torch.randn(shape.vocabulary, shape.width, device="cuda", generator=generator) / shape.width**0.5
    targets = torch.randint(shape.vocabulary, (ROWS,), device="cuda", generator=generator)
    return Problem(hidden.requires_grad_(), weight.to(dtype).requires_grad_(trained), targets, shape.softcap)


def ours(p: Problem) -> Tensor:
    return linear_logprob(p.hidden, p.weight, p.targets, softcap=p.softcap, backend="triton").logp


def trl(p: Problem) -> Tensor:
    from trl.kernels import ChunkedLogProbFunction

    # trl's own default of 32,768 columns a chunk
    return ChunkedLogProbFunction.apply(p.hidden, p.weight, None, p.targets, 1.0, 32768, p.softcap, 1.0, ())[0]


def cut_cross_entropy(p: Problem) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(p.hidden, p.weight, p.targets, softcap=p.softcap, reduction="none")


def full_logits(p: Problem) -> Tensor:
    logits = (p.hidden @ p.weight.T).float()
    if p.softcap is not None:
        logits = p.softcap * torch.tanh(logits / p.softcap)
    return logits.log_softmax(-1).gather(1, p.targets[:, None])[:, 0]


METHODS: dict[str, Callable[[Problem], Tensor]] = {
    "fastpref": ours, "trl": trl, "cut-cross-entropy": cut_cross_entropy, "full logits": full_logits,
}  # fmt: skip


def step(method: Callable[[Problem], Tensor], p: Problem) -> Tensor:
    """Forward and backward; the log-probabilities."""
    p.hidden.grad = p.weight.grad = None
    logp = method(p)
    (logp * torch.linspace(-1, 1, ROWS, device="cuda")).sum().backward()
    torch.cuda.synchronize()
    return logp.detach()


def truth(p: Problem, rows: slice) -> tuple[Tensor, Tensor]:
    """Log-probabilities, and ∂logp/∂hidden, of some rows in float64."""
    hidden = p.hidden[rows].detach().double().requires_grad_()
    logits = hidden @ p.weight.detach().double().T
    if p.softcap is not None:
        logits = p.softcap * torch.tanh(logits / p.softcap)
    logp = logits.log_softmax(-1).gather(1, p.targets[rows, None])[:, 0]
    (grad,) = torch.autograd.grad((logp * torch.linspace(-1, 1, ROWS, device="cuda")[rows]).sum(), hidden)
    return logp.detach(), grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("shape", SHAPES)
def test_real_heads(shape: str, trained: bool, dtype: torch.dtype) -> None:
    """Values to float32 rounding, gradients to that of their dtype, and the same bits again."""
    p = make(SHAPES[shape], trained=trained, dtype=dtype)
    first = step(ours, p)
    rows = slice(100, 132)
    logp, grad = truth(p, rows)
    torch.testing.assert_close(first[rows].double(), logp, rtol=1e-5, atol=1e-4)
    assert p.hidden.grad is not None
    error = (p.hidden.grad[rows].double() - grad).norm() / grad.norm()
    assert error <= 4 * torch.finfo(dtype).eps + 1e-5
    kept = p.hidden.grad.clone()
    assert torch.equal(first, step(ours, p))
    assert torch.equal(kept, p.hidden.grad)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("shape", SHAPES)
def test_memory(shape: str, trained: bool) -> None:
    """Beside the workspace: a few tensors of hidden's size, and a trained head's own gradient."""
    p = make(SHAPES[shape], trained=trained)
    step(ours, p)
    p.hidden.grad = p.weight.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(ours, p)
    own = p.weight.nbytes if trained else 0
    slices = 4 * 8192 * p.weight.shape[1] if trained else 0  # a slice of the weight's gradient in float32
    assert torch.cuda.max_memory_allocated() - before <= 128 * MIB + own + slices + 6 * p.hidden.nbytes


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("shape", SHAPES)
def test_speed_of_log_probabilities(benchmark: Any, shape: str, trained: bool, method: str) -> None:
    """Forward and backward, in one group a shape; what is not right is not timed."""
    benchmark.group = f"{shape}, {'trained' if trained else 'frozen'} head, {ROWS} rows, bfloat16"
    p = make(SHAPES[shape], trained=trained)
    rows = slice(100, 132)
    found = step(METHODS[method], p)[rows].double()
    torch.testing.assert_close(found, truth(p, rows)[0], rtol=0.02, atol=0.05)
    p.hidden.grad = p.weight.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(METHODS[method], p)
    benchmark.extra_info["extra MiB"] = (torch.cuda.max_memory_allocated() - before) // MIB
    benchmark.pedantic(step, (METHODS[method], p), rounds=10, warmup_rounds=2)


PAIRS, LENGTH = 8, 256


def dpo_ours(p: Problem, reference: Tensor) -> Tensor:
    segments = torch.arange(2 * PAIRS, device="cuda").repeat_interleave(LENGTH)
    lengths = torch.full((2 * PAIRS,), LENGTH, device="cuda")
    with torch.no_grad():
        ref = linear_logprob(reference, p.weight, p.targets, softcap=p.softcap).logp
    logp = linear_logprob(p.hidden, p.weight, p.targets, softcap=p.softcap).logp
    return preference_loss(logp, segments, lengths, DPO(), reference=ref).loss


def dpo_liger(p: Problem, reference: Tensor) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    loss = LigerFusedLinearDPOLoss(beta=0.1)
    shape = (2 * PAIRS, LENGTH, p.hidden.shape[1])
    return loss(
        p.weight,
        p.hidden.view(shape),
        p.targets.view(shape[:2]),
        ref_input=reference.view(shape),
        ref_weight=p.weight,
    )[0]


DPO_METHODS = {"fastpref": dpo_ours, "liger": dpo_liger}


@pytest.mark.parametrize("method", DPO_METHODS)
@pytest.mark.parametrize("shape", ["Llama-3-8B", "Qwen2.5-7B"])  # Liger's loss has no softcap
def test_speed_of_dpo(benchmark: Any, shape: str, method: str) -> None:
    """From hidden states of policy and reference to the loss and the policy's gradient, head frozen."""
    benchmark.group = f"DPO, {shape}, {PAIRS} pairs of {LENGTH} tokens, bfloat16"
    assert 2 * PAIRS * LENGTH == ROWS
    p = make(SHAPES[shape])
    reference = (p.hidden + 0.1 * torch.randn_like(p.hidden)).detach()
    values = [float(one(p, reference).detach()) for one in DPO_METHODS.values()]
    assert values[0] == pytest.approx(values[1], rel=0.02)

    def run() -> None:
        p.hidden.grad = None
        DPO_METHODS[method](p, reference).backward()
        torch.cuda.synchronize()

    benchmark.pedantic(run, rounds=10, warmup_rounds=2)
