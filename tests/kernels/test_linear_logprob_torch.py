"""The torch kernel compared with its definition: accuracy, tiling, memory. The interface is tested in test_ops.py."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from fastpref import linear_logprob
from fastpref.kernels.linear_logprob_naive import linear_logprob_naive
from fastpref.kernels.linear_logprob_torch import TILE_COLUMNS, plan_tile
from fastpref.kernels.operators import IMPLEMENTATIONS
from fastpref.memory.allocations import PeakStorage
from tests.support.problems import (
    CASES,
    DTYPES,
    EPS32,
    FEW,
    MODES,
    SHAPES,
    Case,
    Problem,
    answer,
    assert_same,
    check_accuracy,
    error,
    flat,
    huge,
    loss_weights,
    ordinary,
    ours,
    peaked,
    rounding,
)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", CASES)
def test_accuracy(case: str, shape: str, dtype: torch.dtype, mode: str) -> None:
    """Values and gradients are as near to the truth as those of the naive definition, up to rounding."""
    n, width, vocabulary, workspace_mb = SHAPES[shape]
    check_accuracy(ordinary(n, width, vocabulary, CASES[case]).to(dtype), mode, workspace_mb)


@pytest.mark.parametrize("mode", ["frozen", "trainable"])
@pytest.mark.parametrize("rows_a_tile", [1, 3, 16])
@pytest.mark.parametrize("width", [3, 200])
def test_gradients_do_not_depend_on_luck(width: int, rows_a_tile: int, mode: str) -> None:
    """However many rows a tile has, gradients are right up to rounding, without adding the naive definition's error.

    A library may compute a product of few rows as sums over the whole tile, term by term, and a product of many rows
    in blocks; which one it does depends on the processor.
    """
    for seed in range(3):
        problem = ordinary(2 * rows_a_tile, width, TILE_COLUMNS, CASES["bias"], seed=seed)
        budget = TILE_COLUMNS * rows_a_tile * 4 * 2 / 2**20  # two buffers
        results = ours(problem, mode, budget)
        truth = answer(linear_logprob_naive, problem.to(torch.float64), mode)
        for name, grad in results.grads.items():
            exact = truth.grads[name]
            assert error(grad, exact) <= rounding(problem) * float(exact.abs().max()), (name, seed)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", [peaked(18), huge(), flat()], ids=["peaked", "huge", "flat"])
def test_accuracy_at_the_extremes(problem: Problem, dtype: torch.dtype, mode: str) -> None:
    """This holds for near-certain targets, for logits of ±1e4 and for equal logits."""
    check_accuracy(problem.to(dtype), mode, workspace_mb=0.1)


@pytest.mark.parametrize("mode", ["frozen", "trainable"])
@pytest.mark.parametrize("workspace_mb", [0.05, 128])
@pytest.mark.parametrize("target_logit", [18, 40, 60])
def test_certain_targets_keep_relative_accuracy(target_logit: float, workspace_mb: float, mode: str) -> None:
    """For p_y > 0.9999, logp and each row's gradient are right *relative to themselves*, however small they are.

    W_y − Σ p·W and log p_y both cancel there: computed directly in float32, no correct digit is left.
    """
    problem = peaked(target_logit)
    exact, targets = problem.to(torch.float64), problem.targets[:, None]
    # Even in float64 the definition has 1 − p_y only to 2⁻⁵³, so the truth is computed from the other columns.
    z = exact.hidden @ exact.weight.T
    odds = (z - z.gather(1, targets)).exp().scatter(1, targets, 0)  # p_v/p_y, without the target's own
    total = odds.sum(dim=1, keepdim=True)  # (1 − p_y)/p_y
    assert total.max() < 1e-4
    logp = -torch.log1p(total).squeeze(1)
    grad = (total * exact.weight[exact.targets] - odds @ exact.weight) / (1 + total) * loss_weights(problem)[:, None]

    results = ours(problem, mode, workspace_mb)
    tolerance = FEW * EPS32 * (FEW + target_logit)
    assert ((results.values["logp"] - logp).abs() <= tolerance * logp.abs()).all()
    assert ((results.grads["hidden"] - grad).norm(dim=1) <= tolerance * grad.norm(dim=1)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_modes_agree(case: str, dtype: torch.dtype) -> None:
    """Which tensors need a gradient changes neither the values nor the gradient of the hidden states."""
    problem = ordinary(61, 123, 507, CASES[case]).to(dtype)
    frozen, trainable, no_grad = (ours(problem, mode, workspace_mb=0.1) for mode in MODES)
    for name, value in no_grad.values.items():
        assert_same(frozen.values[name], value)
        assert_same(trainable.values[name], value)
    assert_same(frozen.grads["hidden"], trainable.grads["hidden"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_half_inputs_are_computed_in_float32(case: str, dtype: torch.dtype) -> None:
    """Half-precision inputs give the values of the same numbers in float32."""
    problem = ordinary(61, 123, 507, CASES[case]).to(dtype)
    results, wide = ours(problem, "no_grad"), ours(problem.to(torch.float32), "no_grad")
    for name, value in wide.values.items():
        assert_same(results.values[name], value)


@pytest.mark.parametrize("mode", ["frozen", "trainable"])
@pytest.mark.parametrize("workspace_mb", [0.001, 0.05, 128])
def test_every_column_as_target(workspace_mb: float, mode: str) -> None:
    """A target can be anywhere in a tile, including its borders."""
    vocabulary = 101
    problem = replace(ordinary(vocabulary, 5, vocabulary, CASES["all"]), targets=torch.arange(vocabulary))
    check_accuracy(problem, mode, workspace_mb)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["plain", "all"])
def test_workspace_has_no_influence(case: str, dtype: torch.dtype, mode: str) -> None:
    """For any budget, values agree up to float32 rounding, and gradients up to rounding in their dtype."""
    problem = ordinary(61, 123, 507, CASES[case]).to(dtype)
    reference = ours(problem, mode, workspace_mb=128)
    for workspace_mb in (1, 0.2, 0.05):
        results = ours(problem, mode, workspace_mb)
        for name, value in (reference.values | reference.grads).items():
            assert_same((results.values | results.grads)[name], value)


@settings(deadline=None)
@given(
    n=st.integers(1, 20) | st.integers(1, 5000),
    width=st.integers(0, 4) | st.integers(0, 5000),
    vocabulary=st.integers(1, 300_000),
    budget=st.integers(0, 2**12) | st.integers(0, 2**28),
    buffers=st.integers(1, 3),
    weight_copies=st.integers(0, 2),
    dtype=st.sampled_from([*DTYPES, torch.float64]),
)
def test_tile_plan(
    n: int, width: int, vocabulary: int, budget: int, buffers: int, weight_copies: int, dtype: torch.dtype
) -> None:
    """A tile is within the problem and the budget (unless it is a single logit), and one more row would not fit."""
    hidden = torch.empty(n, width, dtype=dtype, device="meta")
    rows, columns = plan_tile(hidden, vocabulary, budget, buffers=buffers, weight_copies=weight_copies)
    size = 8 if dtype == torch.float64 else 4

    def needed(rows: int) -> int:
        return (buffers * rows + weight_copies * width) * columns * size

    assert 1 <= rows <= n
    assert 1 <= columns <= min(vocabulary, TILE_COLUMNS)
    assert needed(rows) <= budget or (rows, columns) == (1, 1)
    assert rows == n or needed(rows + 1) > budget


@pytest.mark.parametrize("workspace_mb", [0.0001, 0.001, 128])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_top1_of_equal_logits_is_the_first(workspace_mb: float, softcap: float | None) -> None:
    """Of equal maxima only the first is the top one, as for argmax, within a tile and across tiles."""
    vocabulary, maxima = 101, (17, 18, 60, 100)
    weight = torch.zeros(vocabulary, 1)
    weight[list(maxima)] = 1.0
    hidden = torch.ones(vocabulary, 1)  # small integers, so that every logit is exact
    results = linear_logprob(
        hidden, weight, torch.arange(vocabulary), softcap=softcap, outputs=("is_top1",), workspace_mb=workspace_mb
    ).is_top1
    assert results is not None
    assert results.nonzero().flatten().tolist() == [maxima[0]] == [int(weight.argmax())]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_hidden_columns(dtype: torch.dtype, mode: str) -> None:
    """With H = 0 every logit is its bias, and gradients are empty or those of the bias."""
    problem = replace(ordinary(7, 1, 11, Case(with_bias=True)), hidden=torch.zeros(7, 0), weight=torch.zeros(11, 0)).to(
        dtype
    )
    results, truth = ours(problem, mode), answer(linear_logprob_naive, problem.to(torch.float64), mode)
    torch.testing.assert_close(results.values["logp"], truth.values["logp"].float())
    for name, grad in truth.grads.items():
        torch.testing.assert_close(results.grads[name], grad.to(dtype))


class PoisonedMemory(TorchDispatchMode):
    """A mode in which new memory contains NaN, as it may outside of tests."""

    EMPTY = (
        torch.ops.aten.empty.memory_format,
        torch.ops.aten.empty_strided.default,
        torch.ops.aten.empty_like.default,
        torch.ops.aten.new_empty.default,
        torch.ops.aten.new_empty_strided.default,
    )

    def __init__(self) -> None:
        super().__init__()
        self.poisoned = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inside = IMPLEMENTATIONS.get(func.name())
        if inside is not None:
            with self:
                return inside(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        if func in self.EMPTY and result.is_floating_point():
            self.poisoned += 1
            result.fill_(math.nan)
        return result


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("workspace_mb", [0.1, 128])
@pytest.mark.parametrize("case", ["plain", "all"])
def test_scratch_is_not_assumed_to_be_zero(case: str, workspace_mb: float, dtype: torch.dtype, mode: str) -> None:
    """The previous contents of the scratch memory have no influence."""
    problem = ordinary(61, 123, 507, CASES[case]).to(dtype)
    reference = ours(problem, mode, workspace_mb)
    with PoisonedMemory() as memory:
        results = ours(problem, mode, workspace_mb)
    assert memory.poisoned
    for name, value in (reference.values | reference.grads).items():
        assert torch.equal((results.values | results.grads)[name], value), name


def extra_memory(vocabulary: int, dtype: torch.dtype, mode: str, workspace_mb: float) -> int:
    """Return the peak bytes of a forward and backward pass, without the inputs and the weight's own gradient."""
    problem = ordinary(64, 64, vocabulary, Case()).to(dtype)
    hidden = problem.hidden.requires_grad_(mode != "no_grad")
    weight = problem.weight.requires_grad_(mode == "trainable")
    with PeakStorage() as memory:
        logp = linear_logprob(hidden, weight, problem.targets, workspace_mb=workspace_mb).logp
        if mode != "no_grad":
            logp.sum().backward()
    return memory.peak - (weight.nbytes if mode == "trainable" else 0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("workspace_mb", "vocabularies"), [(4, (2**15, 2**18)), (0.25, (2**12, 2**15))])
def test_memory_does_not_grow_with_the_vocabulary(
    workspace_mb: float, vocabularies: tuple[int, int], dtype: torch.dtype, mode: str
) -> None:
    """In addition to the workspace there are at most five float32 tensors of the size of `hidden`, whatever V is."""
    small, large = (extra_memory(vocabulary, dtype, mode, workspace_mb) for vocabulary in vocabularies)
    assert abs(large - small) <= 0.02 * small
    assert large <= workspace_mb * 2**20 + 5 * 64 * 64 * 4
