"""Accuracy and memory of real heads on a GPU: `pytest -m gpu` runs them. `python -m bench --profile gpu` times them.

Memory is the allocator's peak minus what was allocated before.
"""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from bench.problems import Shape
from bench.roofline import HEADS
from fastpref import linear_logprob

pytestmark = pytest.mark.gpu
ROWS = 4096  # scored tokens
MIB = 2**20


SHAPES = {shape.model: shape for shape in HEADS}


@dataclass(frozen=True)
class Problem:
    hidden: Tensor  # [N, H], requires grad
    weight: Tensor  # [V, H]
    targets: Tensor  # [N]
    softcap: float | None


def make(shape: Shape, *, trained: bool = False, dtype: torch.dtype = torch.bfloat16) -> Problem:
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(ROWS, shape.hidden, device="cuda", generator=generator).to(dtype)
    weight = torch.randn(shape.vocab, shape.hidden, device="cuda", generator=generator) / shape.hidden**0.5
    targets = torch.randint(shape.vocab, (ROWS,), device="cuda", generator=generator)
    return Problem(hidden.requires_grad_(), weight.to(dtype).requires_grad_(trained), targets, shape.softcap)


def ours(p: Problem) -> Tensor:
    return linear_logprob(p.hidden, p.weight, p.targets, softcap=p.softcap, backend="triton").logp


def step(p: Problem) -> Tensor:
    """Run one forward and backward pass, and return the log-probabilities."""
    p.hidden.grad = p.weight.grad = None
    logp = ours(p)
    (logp * torch.linspace(-1, 1, ROWS, device="cuda")).sum().backward()
    torch.cuda.synchronize()
    return logp.detach()


def truth(p: Problem, rows: slice) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities of some rows, and ∂logp/∂hidden, in float64."""
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
    """Values are right up to float32 rounding, gradients up to that of their dtype, and both repeat bit for bit."""
    p = make(SHAPES[shape], trained=trained, dtype=dtype)
    first = step(p)
    rows = slice(100, 132)
    logp, grad = truth(p, rows)
    torch.testing.assert_close(first[rows].double(), logp, rtol=1e-5, atol=1e-4)
    assert p.hidden.grad is not None
    error = (p.hidden.grad[rows].double() - grad).norm() / grad.norm()
    assert error <= 4 * torch.finfo(dtype).eps + 1e-5
    kept = p.hidden.grad.clone()
    assert torch.equal(first, step(p))
    assert torch.equal(kept, p.hidden.grad)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("shape", SHAPES)
def test_memory(shape: str, trained: bool) -> None:
    """In addition to the workspace, a step takes a few tensors of hidden's size, and a trained head's own gradient."""
    p = make(SHAPES[shape], trained=trained)
    step(p)
    p.hidden.grad = p.weight.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(p)
    own = p.weight.nbytes if trained else 0
    slices = 4 * 8192 * p.weight.shape[1] if trained else 0  # a slice of the weight's gradient in float32
    assert torch.cuda.max_memory_allocated() - before <= 128 * MIB + own + slices + 6 * p.hidden.nbytes
