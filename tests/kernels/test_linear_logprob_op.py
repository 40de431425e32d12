"""The operators of `linear_logprob` in torch's tracers, and the positions of hidden states."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastpref import linear_logprob
from fastpref.kernels import linear_logprob_op as op
from fastpref.ops import LoraWeight
from tests.support.problems import CASES, MODES, ordinary

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("torch", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
M, H, V = 23, 40, 90
# with repeated, missing, first and last rows, and unordered
POSITIONS = torch.tensor([3, 0, 22, 3, 3, 7, 21, 20, 0])


def leaves(mode: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    problem = ordinary(M, H, V, CASES["bias"]).to(dtype)
    tensors: dict[str, Any] = {"hidden": problem.hidden, "weight": problem.weight, "bias": problem.bias}
    needed = {"frozen": ("hidden",), "trainable": tuple(tensors), "no_grad": ()}[mode]
    tensors = {name: t.detach().clone().to(DEVICE).requires_grad_(name in needed) for name, t in tensors.items()}
    return tensors | {"targets": problem.targets.to(DEVICE)}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_positions_are_a_gather(backend: str, dtype: torch.dtype, mode: str) -> None:
    """Values and gradients are those of hidden states that were gathered before; rows at no position get zeros."""
    found = {}
    for name in ("positions", "gathered"):
        given: dict[str, Any] = leaves(mode, dtype)
        positions = POSITIONS.to(DEVICE)
        hidden = given.pop("hidden")
        given["targets"] = given["targets"][: len(POSITIONS)]
        if name == "positions":
            result = linear_logprob(hidden, **given, positions=positions, backend=backend)
        else:
            keywords: Any = {"hidden": hidden.float()[positions].to(dtype), "backend": backend}
            result = linear_logprob(**given, **keywords)
        if mode != "no_grad":
            (result.logp * torch.linspace(-1, 2, len(positions), device=DEVICE)).sum().backward()
        grads = [leaf.grad for leaf in (hidden, given["weight"], given["bias"]) if leaf.grad is not None]
        found[name] = (result.logp.detach(), *grads)
    for ours, theirs in zip(found["positions"], found["gathered"], strict=True):
        assert ours.dtype == theirs.dtype
        # Here, repeated positions are added up before rounding, and there after it.
        rounding = len(POSITIONS) * torch.finfo(theirs.dtype).eps * float(theirs.abs().max())
        assert float((ours.double() - theirs.double()).abs().max()) <= rounding
    if mode != "no_grad":
        unused = [row for row in range(M) if row not in POSITIONS]
        assert not found["positions"][1][unused].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_positions(backend: str) -> None:
    """Without targets there are no values, and every gradient is zero."""
    given: dict[str, Any] = leaves("trainable")
    nothing = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    given |= {"targets": nothing, "positions": nothing}
    linear_logprob(**given, backend=backend).logp.sum().backward()
    for name in ("hidden", "weight", "bias"):
        assert torch.equal(given[name].grad, torch.zeros_like(given[name])), name


def test_wrong_positions_are_refused() -> None:
    """The message names the argument, the value and the valid rows."""
    given = leaves("no_grad")
    for positions, message in (
        (torch.full((M,), M), "positions holds 23, hidden has rows 0 to 22"),
        (torch.full((M,), -1), "positions holds -1"),
        (torch.zeros(M - 1, dtype=torch.int64), "positions has 22 entries, targets has 23"),
    ):
        if DEVICE == "cpu" or "entries" in message:
            with pytest.raises(ValueError, match=message):
                linear_logprob(**given, positions=positions.to(DEVICE))


def arguments(mode: str, backend: str) -> tuple[Any, ...]:
    given = leaves(mode)
    positions = POSITIONS.to(DEVICE)
    tensors = (given["hidden"], [given["weight"]], given["targets"][: len(positions)], given["bias"], positions)
    return *tensors, "dense", 2.0, 1.1, 0.9, "entropy,is_top1", 2**14, backend, mode == "frozen"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
def test_the_operator_keeps_torchs_rules(mode: str, backend: str) -> None:
    """torch's own check accepts the schema, fake shapes, autograd registration and a trace with symbolic shapes."""
    torch.library.opcheck(op.linear_logprob, arguments(mode, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_backward_operators_keep_torchs_rules(backend: str) -> None:
    """torch's own check also accepts the two operators of the backward pass."""
    hidden, head, targets, bias, positions, *settings = arguments("no_grad", backend)
    result = op.OperatorOutput._make(op.linear_logprob(hidden, head, targets, bias, positions, *settings))
    grad = torch.linspace(-1, 1, len(targets), device=DEVICE)
    *of_logits, _, budget, _, _ = settings
    tensors = (grad, hidden, head, targets, bias, positions, result.statistics)
    for wanted in ((True, True, True), (False, False, True)):
        torch.library.opcheck(op.recompute, (*tensors, *of_logits, budget, backend, *wanted))
    torch.library.opcheck(op.scale, (hidden[: len(targets)], grad, positions, M, torch.bfloat16, backend))
    torch.library.opcheck(op.scale, (hidden, torch.ones(M, device=DEVICE), None, M, torch.float32, backend))


def call(hidden: Tensor, weight: Any, targets: Tensor, bias: Tensor | None) -> Any:
    result = linear_logprob(hidden * 2, weight, targets, bias, outputs=("entropy",), softcap=3.0)
    return (result.logp * 0.5).sum(), result.entropy


@pytest.mark.parametrize("mode", MODES)
def test_compiled_whole(mode: str) -> None:
    """`torch.compile(fullgraph=True)` gives the same values and gradients, for any number of rows."""
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for rows in (M, M - 4, 5):
        found = []
        for function in (call, compiled):
            given = leaves(mode)
            loss, entropy = function(given["hidden"][:rows], given["weight"], given["targets"][:rows], given["bias"])
            if mode != "no_grad":
                loss.backward()
            found.append((loss.detach(), entropy, *[t.grad for t in given.values() if t.grad is not None]))
        for eager, traced in zip(*found, strict=True):
            assert torch.equal(eager, traced)


def test_compiled_with_lora() -> None:
    """A head with LoRA can be compiled too."""
    torch._dynamo.reset()

    def run(function: Any) -> list[Tensor]:
        given = leaves("frozen")
        generator = torch.Generator().manual_seed(1)
        a, b = (torch.randn(s, generator=generator).to(DEVICE).requires_grad_() for s in ((2, H), (V, 2)))
        loss, _ = function(given["hidden"], LoraWeight(given["weight"], a, b, 0.5), given["targets"], None)
        loss.backward()
        assert a.grad is not None
        assert b.grad is not None
        return [loss.detach(), a.grad, b.grad, given["hidden"].grad]

    for eager, traced in zip(run(call), run(torch.compile(call, fullgraph=True, backend="aot_eager")), strict=True):
        assert torch.equal(eager, traced)


@pytest.mark.parametrize("mode", MODES)
def test_traced_without_memory(mode: str) -> None:
    """Under FakeTensorMode, results and gradients have the real shapes and dtypes."""
    real = leaves(mode, torch.bfloat16)
    loss, entropy = call(real["hidden"], real["weight"], real["targets"], real["bias"])
    if mode != "no_grad":
        loss.backward()
    fake = FakeTensorMode()
    given: dict[str, Any] = {
        name: fake.from_tensor(t.detach().requires_grad_(t.requires_grad)) for name, t in real.items()
    }
    with fake:
        traced, traced_entropy = call(given["hidden"], given["weight"], given["targets"], given["bias"])
        if mode != "no_grad":
            traced.backward()
    assert (traced.shape, traced.dtype) == (loss.shape, loss.dtype)
    assert (traced_entropy.shape, traced_entropy.dtype) == (entropy.shape, entropy.dtype)
    for name, tensor in real.items():
        if tensor.grad is not None:
            assert given[name].grad is not None, name
            assert (given[name].grad.shape, given[name].grad.dtype) == (tensor.grad.shape, tensor.grad.dtype), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_scattered_sums_repeat_bit_for_bit(backend: str) -> None:
    """Rows that share a position are summed in a fixed order."""
    grad = torch.randn(500, 33, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    positions = (torch.arange(500) * 7 % 5).to(DEVICE)
    coefficient = torch.linspace(-1, 1, 500, device=DEVICE)
    first, second = (op.scale(grad, coefficient, positions, 6, torch.float32, backend) for _ in range(2))
    assert torch.equal(first, second)
    exact = torch.zeros(6, 33, dtype=torch.float64, device=DEVICE)
    exact.index_add_(0, positions, grad.double() * coefficient.double()[:, None])
    torch.testing.assert_close(first.double(), exact, rtol=1e-5, atol=1e-5)
