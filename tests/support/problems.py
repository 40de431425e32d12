"""Problems for the kernels of the vocabulary walk, their true results, and the bound on a kernel's error.

The truth is the naive definition in float64 on the same values; the yardstick is the naive definition in their own
dtype. An error is a tensor's largest absolute error, and ours may exceed the yardstick's only by rounding:

* A logit is a float32 sum, with an error of some eps32·max|z|. That is the error of logp and of the other outputs,
  and, relative to each probability, the error of the gradients.
* A gradient in a dtype is rounded at most twice, once as g and once when it is scaled by the loss: eps of that dtype,
  relative to the largest entry.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fastpref import linear_logprob
from fastpref.kernels.linear_logprob_naive import linear_logprob_naive
from fastpref.kernels.linear_logprob_torch import TILE_COLUMNS

OUTPUTS = ("entropy", "mean_logit", "log_sum_sq_probs")  # and is_top1, which has no rounding error
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MODES = ("frozen", "trainable", "no_grad")
EPS32 = torch.finfo(torch.float32).eps
FEW = 8  # roundings that may be worse for us than for the yardstick


@dataclass(frozen=True)
class Problem:
    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    targets: Tensor  # [N]
    bias: Tensor | None = None  # [V]
    options: dict[str, float] = field(default_factory=dict)

    def to(self, dtype: torch.dtype) -> "Problem":
        bias = None if self.bias is None else self.bias.to(dtype)
        return replace(self, hidden=self.hidden.to(dtype), weight=self.weight.to(dtype), bias=bias)


@dataclass(frozen=True)
class Answer:
    values: dict[str, Tensor]  # logp and the other outputs, [N]
    grads: dict[str, Tensor]  # of hidden, and of weight and bias if they are trained


@dataclass(frozen=True)
class Case:
    with_bias: bool = False
    options: dict[str, float] = field(default_factory=dict)


CASES = {
    "plain": Case(),
    "bias": Case(with_bias=True),
    "softcap": Case(options={"softcap": 2.5}),
    "logit_scale": Case(options={"logit_scale": 0.0625}),
    "negative_scale": Case(options={"logit_scale": -1.5}),
    "temperature": Case(options={"temperature": 0.7}),
    "all": Case(with_bias=True, options={"softcap": 3.0, "logit_scale": 1.7, "temperature": 0.6}),
}

# N, H, V, workspace in MiB. The small budgets give many tiles of rows and columns, with smaller ones at the ends.
SHAPES = {
    "one_tile": (253, 123, 507, 128),
    "many_tiles": (253, 123, 507, 0.02),
    "one_row_a_tile": (17, 123, 507, 0.002),
    "one_column_a_tile": (3, 5, 11, 1e-6),
    "past_the_widest_tile": (5, 7, TILE_COLUMNS + 3, 128),
    "past_it_by_rows": (5, 7, TILE_COLUMNS + 3, 0.04),
    "one_class": (1, 1, 1, 128),
    "two_classes": (1, 1, 2, 128),
}


def ordinary(n: int, width: int, vocabulary: int, case: Case, seed: int = 0) -> Problem:
    """Return logits of size one to three; the first targets are at the ends of the vocabulary and the widest tile."""
    generator = torch.Generator().manual_seed(n + width + vocabulary + seed)
    targets = torch.randint(vocabulary, (n,), generator=generator)
    borders = [v for v in (0, vocabulary - 1, TILE_COLUMNS - 1, TILE_COLUMNS) if v < vocabulary][:n]
    targets[: len(borders)] = torch.tensor(borders)
    return Problem(
        hidden=torch.randn(n, width, generator=generator),
        weight=torch.randn(vocabulary, width, generator=generator) * (3 / math.sqrt(width)),
        targets=targets,
        bias=torch.randn(vocabulary, generator=generator) if case.with_bias else None,
        options=case.options,
    )


def peaked(target_logit: float) -> Problem:
    """Return rows along their target's weights: z_y is `target_logit`, the others are about a tenth of it."""
    problem = ordinary(61, 123, 507, Case())
    rows = problem.weight[problem.targets]
    return replace(problem, hidden=rows * (target_logit / rows.square().sum(dim=1, keepdim=True)))


def huge() -> Problem:
    """Return logits of ±1e4 and of all sizes between."""
    problem = ordinary(61, 123, 507, Case())
    largest = (problem.hidden @ problem.weight.T).abs().max()
    return replace(problem, weight=problem.weight * (1e4 / largest))


def flat() -> Problem:
    problem = ordinary(61, 123, 507, Case())
    return replace(problem, weight=torch.zeros_like(problem.weight))


def loss_weights(problem: Problem) -> Tensor:
    """Return unequal coefficients of the rows' logp, of both signs, as a preference loss has."""
    return torch.linspace(-1, 1.5, len(problem.targets))


def answer(function: Any, problem: Problem, mode: str, device: str = "cpu", **keywords: Any) -> Answer:
    """Run `function` on new leaves, differentiate the weighted sum of logp, and return the results on the CPU."""
    leaves = {"hidden": problem.hidden, "weight": problem.weight}
    if problem.bias is not None:
        leaves["bias"] = problem.bias
    needed = {"frozen": ("hidden",), "trainable": tuple(leaves), "no_grad": ()}[mode]
    leaves = {name: leaf.to(device, copy=True).requires_grad_(name in needed) for name, leaf in leaves.items()}
    result = function(targets=problem.targets.to(device), **leaves, **problem.options, **keywords)
    if needed:
        (result.logp * loss_weights(problem).to(result.logp)).sum().backward()
    values = {name: value.detach().cpu() for name, value in result._asdict().items() if value is not None}
    return Answer(values, {name: leaf.grad.cpu() for name, leaf in leaves.items() if leaf.grad is not None})


def ours(problem: Problem, mode: str, workspace_mb: float = 128, backend: str = "torch") -> Answer:
    outputs = (*OUTPUTS, "is_top1")
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"  # or Triton's interpreter
    return answer(linear_logprob, problem, mode, device, outputs=outputs, workspace_mb=workspace_mb, backend=backend)


def largest_logit(problem: Problem) -> float:
    exact = problem.to(torch.float64)
    raw = torch.nn.functional.linear(exact.hidden, exact.weight, exact.bias)
    scale = problem.options.get("logit_scale", 1.0) / problem.options.get("temperature", 1.0)
    return float((raw * scale).abs().max())


def rounding(problem: Problem) -> float:
    """Return the possible error of a float32 logit of this problem, and the relative error of a probability."""
    return EPS32 * (FEW + largest_logit(problem))


def error(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth).abs().max())


def assert_same(result: Tensor, other: Tensor) -> None:
    """Assert that two results of our kernels are equal up to rounding."""
    rounding = 0.0 if other.dtype == torch.bool else torch.finfo(other.dtype).eps
    torch.testing.assert_close(result, other, rtol=2 * FEW * rounding, atol=FEW * FEW * EPS32)


def check_accuracy(problem: Problem, mode: str, workspace_mb: float = 128, backend: str = "torch") -> None:
    result = ours(problem, mode, workspace_mb, backend)
    truth = answer(linear_logprob_naive, problem.to(torch.float64), mode)
    yardstick = answer(linear_logprob_naive, problem, mode)
    off = rounding(problem)

    for name in ("logp", *OUTPUTS):
        bound = error(yardstick.values[name], truth.values[name]) + FEW * off
        assert error(result.values[name], truth.values[name]) <= bound, name
    assert torch.equal(result.values["is_top1"], truth.values["is_top1"])
    assert result.grads.keys() == truth.grads.keys()
    # The gradient of a trained head computes its logits again, in tiles of another shape. Libraries sum those in
    # another order, so a probability has the errors of both logits; the yardstick has the same logits twice.
    passes = 2 if mode == "trainable" else 1
    for name, grad in result.grads.items():
        exact = truth.grads[name]
        margin = (torch.finfo(grad.dtype).eps + passes * off) * float(exact.abs().max())
        assert error(grad, exact) <= error(yardstick.grads[name], exact) + margin, name
