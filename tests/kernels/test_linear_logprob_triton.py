"""The Triton kernels compared with their definition, in Triton's interpreter, or on a GPU if there is one."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpref import linear_logprob
from fastpref.kernels import linear_logprob_launch as launch
from fastpref.kernels import tiles
from fastpref.kernels.head_weight import DenseWeight
from fastpref.kernels.linear_logprob_torch import LogitTransform
from tests.support.problems import (
    CASES,
    DTYPES,
    MODES,
    Problem,
    assert_same,
    check_accuracy,
    flat,
    huge,
    loss_weights,
    ordinary,
    ours,
    peaked,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# N, H, V, workspace in MiB, around the interpreter's tile of 32×32×32.
SHAPES = {
    "many_tiles": (35, 45, 211, 0.004),
    "one_tile": (3, 7, 29, 128),
    "one_row": (1, 33, 100, 128),
    "one_class": (1, 1, 1, 128),
    "past_a_stored_tile": (5, 17, 2100, 0.004),
    "past_a_group_of_row_blocks": (530, 5, 75, 128),
}


@pytest.fixture
def product(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use a fused tile, or the tiles of a GPU, such as Turing, for which the library computes the products."""
    if request.param == "of the library":
        tile = tiles.Tile(16, 32, 16, 4, 1, fused=False)
        monkeypatch.setattr(launch, "choose_tiles", lambda hidden: tiles.Tiles(tile, tile, tile))


PRODUCTS = ("fused", "of the library")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("case", "shape"), [("plain", "many_tiles"), *(("all", shape) for shape in SHAPES)])
@pytest.mark.parametrize("product", PRODUCTS, indirect=True)
def test_accuracy(product: None, case: str, shape: str, dtype: torch.dtype, mode: str) -> None:
    """Values and gradients are as near to the truth as those of the naive definition, up to rounding."""
    n, width, vocabulary, workspace_mb = SHAPES[shape]
    check_accuracy(ordinary(n, width, vocabulary, CASES[case]).to(dtype), mode, workspace_mb, "triton")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", [peaked(18), huge(), flat()], ids=["peaked", "huge", "flat"])
@pytest.mark.parametrize("product", PRODUCTS, indirect=True)
def test_accuracy_at_the_extremes(product: None, problem: Problem, dtype: torch.dtype, mode: str) -> None:
    """This holds for near-certain targets, for logits of ±1e4 and for equal logits."""
    check_accuracy(problem.to(dtype), mode, 0.1, "triton")


@pytest.mark.parametrize("case", CASES)
def test_backends_agree(case: str) -> None:
    """Triton and torch give the same values and gradients, up to rounding."""
    problem = ordinary(61, 40, 150, CASES[case])
    for mode in MODES:
        expected, results = ours(problem, mode), ours(problem, mode, backend="triton")
        for name, value in (expected.values | expected.grads).items():
            assert_same((results.values | results.grads)[name], value)


def walk(hidden: Tensor, weight: Tensor, targets: Tensor, lazy: float = launch.LAZY, budget: int = 1):
    """Run the kernel once with a gradient, in the narrowest stored tiles that the budget allows."""
    hidden, weight, targets = (tensor.to(DEVICE) for tensor in (hidden, weight, targets))
    options: Any = {"outputs": ("entropy", "log_sum_sq_probs"), "budget": budget, "with_grad": True, "lazy": lazy}
    return launch.walk_vocabulary(hidden, DenseWeight(weight), targets, None, LogitTransform(), **options)


@pytest.mark.parametrize("lazy", [0.0, launch.LAZY])
def test_a_moving_offset_changes_nothing(lazy: float) -> None:
    """If maxima rise by 60 nats from tile to tile, the offset moves repeatedly, and results agree for any laziness."""
    torch.manual_seed(0)
    n, width, vocabulary = 9, 16, 2300
    hidden = torch.rand(n, width) + 0.1
    weight = torch.rand(vocabulary, width) * 0.1 + torch.linspace(0, 20, vocabulary)[:, None]
    targets = torch.linspace(0, vocabulary - 1, n).long()
    exact = (hidden.double() @ weight.double().T).log_softmax(-1)
    results = walk(hidden, weight, targets, lazy)
    torch.testing.assert_close(
        results.logp.double().cpu(), exact.gather(1, targets[:, None])[:, 0], rtol=2e-6, atol=3e-5
    )
    probs = exact.exp()
    grad = weight.double()[targets] - probs @ weight.double()
    assert results.grad is not None
    torch.testing.assert_close(results.grad.cpu(), grad.float(), rtol=1e-4, atol=2e-4)
    assert results.entropy is not None
    torch.testing.assert_close(results.entropy.double().cpu(), -(probs * exact).sum(-1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_results_repeat_bit_for_bit(mode: str) -> None:
    """Without atomics, the same input gives the same bits."""
    problem = ordinary(40, 33, 300, CASES["all"]).to(torch.bfloat16)
    first, second = (ours(problem, mode, 0.01, "triton") for _ in range(2))
    for name, value in (first.values | first.grads).items():
        assert torch.equal(value, (second.values | second.grads)[name]), name


def test_outputs_are_written_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results do not depend on new memory: filled with NaN, it gives the same bits."""
    problem = ordinary(35, 33, 70, CASES["all"]).to(torch.bfloat16)
    expected = {mode: ours(problem, mode, 0.01, "triton") for mode in MODES}
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))
    for mode in MODES:
        results = ours(problem, mode, 0.01, "triton")
        for name, value in (expected[mode].values | expected[mode].grads).items():
            assert torch.equal((results.values | results.grads)[name], value), name


def test_a_view_and_a_wider_weight_are_read_right() -> None:
    """Row strides are respected, and so are float32 weights with half-precision hidden states (autocast)."""
    wide = ordinary(20, 64, 90, CASES["plain"])
    targets = wide.targets.to(DEVICE)
    narrow = replace(wide, hidden=wide.hidden[:, :40], weight=wide.weight[:, :40])
    plain = replace(narrow, hidden=narrow.hidden.contiguous(), weight=narrow.weight.contiguous())
    results = linear_logprob(wide.hidden.to(DEVICE)[:, :40], wide.weight.to(DEVICE)[:, :40], targets, backend="triton")
    assert_same(results.logp.cpu(), ours(plain, "no_grad").values["logp"])
    hidden = wide.hidden.bfloat16().to(DEVICE).requires_grad_()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        mixed = linear_logprob(hidden, wide.weight.bfloat16().float().to(DEVICE), targets, backend="triton")
    (mixed.logp * loss_weights(wide).to(DEVICE)).sum().backward()
    expected = ours(wide.to(torch.bfloat16), "frozen")
    torch.testing.assert_close(mixed.logp.detach().cpu(), expected.values["logp"], rtol=1e-5, atol=1e-4)
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad.cpu(), expected.grads["hidden"], rtol=0.05, atol=0.05)


def test_no_rows() -> None:
    """N = 0 gives empty results, and gradients of zero."""
    hidden, weight = torch.zeros(0, 8, device=DEVICE, requires_grad=True), torch.randn(20, 8, device=DEVICE)
    targets = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    linear_logprob(hidden, weight, targets, backend="triton").logp.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.shape == (0, 8)
