"""The interface of `linear_logprob`: dtypes, gradients, autocast and refusals. Accuracy is tested with each kernel."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpref import linear_logprob
from fastpref.kernels import linear_logprob_torch
from fastpref.kernels.linear_logprob_naive import linear_logprob_naive
from fastpref.ops import OUTPUTS

N, H, V = 7, 5, 11
FLOATS = ("entropy", "mean_logit", "log_sum_sq_probs")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OPTIONS = {"plain": {}, "softcap": {"softcap": 1.5}, "all": {"softcap": 2.0, "logit_scale": 1.3, "temperature": 0.8}}
MANY_TILES = 0.0003  # MiB


def inputs(dtype: torch.dtype = torch.float32, n: int = N, needed: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return hidden, weight, bias and targets by argument name; those in `needed` require a gradient."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "hidden": torch.randn(n, H, generator=generator),
        "weight": torch.randn(V, H, generator=generator),
        "bias": torch.randn(V, generator=generator),
    }
    leaves = {name: value.to(dtype).requires_grad_(name in needed) for name, value in tensors.items()}
    return leaves | {"targets": torch.randint(V, (n,), generator=generator)}


ALL = ("hidden", "weight", "bias")
SUBSETS = [(), ("hidden",), ("weight",), ("bias",), ("hidden", "bias"), ("weight", "bias"), ALL]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("needed", SUBSETS[1:], ids="+".join)
@pytest.mark.parametrize("workspace_mb", [MANY_TILES, 128])
def test_gradcheck(workspace_mb: float, needed: tuple[str, ...], options: str) -> None:
    """In float64 the gradients are the derivatives, whichever of hidden, weight and bias need one."""
    tensors = inputs(torch.float64, n=3)
    leaves = tuple(tensors[name].requires_grad_() for name in needed)

    def logp(*leaves: Tensor) -> Tensor:
        result = linear_logprob(**tensors | dict(zip(needed, leaves)), **OPTIONS[options], workspace_mb=workspace_mb)
        return result.logp

    assert torch.autograd.gradcheck(logp, leaves)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("needed", SUBSETS, ids="+".join)
@pytest.mark.parametrize("n", [0, 1, N])
def test_dtypes(n: int, needed: tuple[str, ...], dtype: torch.dtype) -> None:
    """Results are float32 (float64 for float64 inputs), and gradients have the dtype and shape of their tensor."""
    tensors = inputs(dtype, n, needed)
    result = linear_logprob(**tensors, outputs=OUTPUTS)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert result.logp.requires_grad == bool(needed)
    for name, value in result._asdict().items():
        assert value.dtype == (torch.bool if name == "is_top1" else wide), name
        assert value.shape == (n,), name
        assert name == "logp" or not value.requires_grad, name
    if needed:
        result.logp.sum().backward()
    for name in ALL:
        grad = tensors[name].grad
        assert (grad is not None) == (name in needed), name
        if grad is not None:
            assert grad.dtype == dtype
            assert grad.shape == tensors[name].shape
            assert n or not grad.any()


@pytest.mark.parametrize("n", [0, N])
@pytest.mark.parametrize("needed", SUBSETS, ids="+".join)
@pytest.mark.parametrize("outputs", [(), *((name,) for name in OUTPUTS), OUTPUTS], ids="+".join)
def test_only_the_outputs_asked_for(outputs: tuple[str, ...], needed: tuple[str, ...], n: int) -> None:
    """An output that is not requested is None, and requesting one changes no other."""
    result = linear_logprob(**inputs(n=n, needed=needed), outputs=outputs)
    whole = linear_logprob(**inputs(n=n, needed=needed), outputs=OUTPUTS)
    torch.testing.assert_close(result.logp, whole.logp)
    for name in OUTPUTS:
        found, other = getattr(result, name), getattr(whole, name)
        assert (found is not None) == (name in outputs)
        if found is not None:
            torch.testing.assert_close(found, other)


@pytest.mark.parametrize("needed", SUBSETS[1:], ids="+".join)
def test_no_grad(needed: tuple[str, ...]) -> None:
    """Under `torch.no_grad` the result has no graph and the same values."""
    with_graph = linear_logprob(**inputs(needed=needed)).logp
    with torch.no_grad():
        without = linear_logprob(**inputs(needed=needed)).logp
    assert not without.requires_grad
    torch.testing.assert_close(without, with_graph.detach())


@pytest.mark.parametrize("needed", SUBSETS[1:], ids="+".join)
def test_backward_twice_through_a_kept_graph(needed: tuple[str, ...]) -> None:
    """A kept graph gives the same gradients again."""
    tensors = inputs(needed=needed)
    leaves = [tensors[name] for name in needed]
    loss = linear_logprob(**tensors).logp.sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    again = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, again))


def strided(value: Tensor) -> Tensor:
    """Return the same values at every other place of a larger tensor."""
    larger = value.new_zeros([2 * size for size in value.shape])
    place = larger[tuple(slice(None, None, 2) for _ in value.shape)]
    return place.copy_(value)


LAYOUTS = {
    "strided": strided,
    "transposed": lambda value: value.mT.contiguous().mT if value.dim() == 2 else value,
    "expanded": lambda value: value[:1].expand(value.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["hidden", "weight", "bias", "targets"])
@pytest.mark.parametrize("needed", SUBSETS, ids="+".join)
@pytest.mark.parametrize("workspace_mb", [MANY_TILES, 128])
def test_any_memory_layout(workspace_mb: float, needed: tuple[str, ...], name: str, layout: str) -> None:
    """A tensor that is not contiguous gives the values and gradients of its contiguous copy."""
    tensors = inputs()
    tensors[name] = LAYOUTS[layout](tensors[name])

    def run(tensors: dict[str, Any]) -> tuple[Tensor, ...]:
        leaves = {key: value.detach().requires_grad_(key in needed) for key, value in tensors.items()}
        logp = linear_logprob(**leaves, workspace_mb=workspace_mb).logp
        return (logp, *torch.autograd.grad(logp.sum(), [leaves[key] for key in needed])) if needed else (logp,)

    contiguous = {key: value.contiguous() for key, value in tensors.items()}
    for found, other in zip(run(tensors), run(contiguous)):
        torch.testing.assert_close(found, other)


def test_inputs_are_not_written_to() -> None:
    """No input changes, although the tiles are modified in place."""
    tensors = inputs(needed=ALL)
    before = {name: value.detach().clone() for name, value in tensors.items()}
    linear_logprob(**tensors, **OPTIONS["all"], outputs=OUTPUTS).logp.sum().backward()
    assert all(torch.equal(tensors[name], value) for name, value in before.items())


AUTOCAST = {
    "half hidden": (torch.bfloat16, torch.float32, torch.float32),
    "half weight": (torch.float32, torch.bfloat16, torch.bfloat16),
    "half bias": (torch.float32, torch.float32, torch.bfloat16),
    "two halves": (torch.float16, torch.bfloat16, torch.float32),
    "all float32": (torch.float32, torch.float32, torch.float32),
}


def rounded(tensors: dict[str, Any], needed: tuple[str, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return float64 leaves of the values that autocast multiplies; a bias is added as it is."""
    kept = {name: tensors[name].detach() if name == "bias" else tensors[name].detach().to(dtype) for name in ALL}
    return {name: value.double().requires_grad_(name in needed) for name, value in kept.items()}


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("needed", SUBSETS, ids="+".join)
@pytest.mark.parametrize("dtypes", AUTOCAST)
@pytest.mark.parametrize("workspace_mb", [MANY_TILES, 128])
def test_autocast(workspace_mb: float, dtypes: str, needed: tuple[str, ...], autocast: torch.dtype) -> None:
    """Under autocast dtypes may differ; operands are rounded to its dtype, logits and sums are float32, and gradients
    have the dtype of their tensor: that of a float32 weight or bias is accurate to float32."""
    tensors = inputs()
    for name, dtype in zip(ALL, AUTOCAST[dtypes]):
        tensors[name] = tensors[name].to(dtype).requires_grad_(name in needed)
    exact = rounded(tensors, needed, autocast)
    truth = linear_logprob_naive(**exact, targets=tensors["targets"], **OPTIONS["all"])
    with torch.autocast("cpu", dtype=autocast):
        result = linear_logprob(**tensors, **OPTIONS["all"], outputs=OUTPUTS, workspace_mb=workspace_mb)
        if needed:
            result.logp.sum().backward()
            truth.logp.sum().backward()
    for name in ("logp", *FLOATS):
        torch.testing.assert_close(getattr(result, name), getattr(truth, name).float())
    for name in needed:
        grad, wanted = tensors[name].grad, exact[name].grad
        assert grad is not None
        assert wanted is not None
        assert grad.dtype == tensors[name].dtype
        coarsest = torch.finfo(autocast).eps if name == "hidden" else torch.finfo(torch.float32).eps * 8
        allowed = max(coarsest, torch.finfo(grad.dtype).eps) * wanted.abs().max()
        assert (grad.double() - wanted).abs().max() <= allowed


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_no_less_accurate_than_a_linear_layer(autocast: torch.dtype) -> None:
    """Under autocast, log-probabilities are as near the truth as those of torch's own linear layer."""
    generator = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(size, 64, generator=generator) for size in (31, 211))
    targets = torch.arange(31)
    truth = linear_logprob_naive(hidden.double(), weight.double() / 4, targets).logp
    with torch.autocast("cpu", dtype=autocast):
        ours = linear_logprob(hidden, weight / 4, targets).logp
        theirs = linear_logprob_naive(hidden, weight / 4, targets).logp
    errors = [(logp.double() - truth).abs().max() for logp in (ours, theirs)]
    assert errors[0] <= errors[1]
    assert errors[0] > torch.finfo(autocast).eps / 100  # it has rounded its operands


@pytest.mark.parametrize("needed", SUBSETS, ids="+".join)
def test_autocast_multiplies_in_its_dtype(needed: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """With everything in float32, as in full fine-tuning, the kernels get rows and slices of autocast's dtype."""
    seen: list[tuple[str, torch.dtype, torch.dtype, torch.dtype]] = []

    def watched(name: str, function: Any) -> Any:
        def call(*args: Any, **keywords: Any) -> Any:
            hidden, weight = args[:2] if name == "walk_vocabulary" else args[1:3]
            seen.append((name, hidden.dtype, weight.dtype, weight.rows(0, 3).dtype))
            return function(*args, **keywords)

        return call

    for name in ("walk_vocabulary", "recompute_gradients"):
        monkeypatch.setattr(linear_logprob_torch, name, watched(name, getattr(linear_logprob_torch, name)))
    tensors = inputs(needed=needed)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logp = linear_logprob(**tensors).logp
    if needed:
        logp.sum().backward()
    passes = ["walk_vocabulary", *(["recompute_gradients"] if {"weight", "bias"} & set(needed) else [])]
    assert seen == [(name, *[torch.bfloat16] * 3) for name in passes]
    assert {tensors[name].grad.dtype for name in needed} <= {torch.float32}


def test_float64_is_not_narrowed_by_autocast() -> None:
    """As in torch, autocast leaves float64 alone."""
    tensors = inputs(torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logp = linear_logprob(**tensors).logp
    torch.testing.assert_close(logp, linear_logprob_naive(**tensors).logp)


def test_a_gradient_is_not_differentiable_again() -> None:
    """A second derivative is refused instead of being silently zero."""
    tensors = inputs(needed=("hidden",))
    loss = linear_logprob(**tensors).logp.square().sum()
    (grad,) = torch.autograd.grad(loss, tensors["hidden"], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()


def ones(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.ones(shape, dtype=dtype, device=device)


# A wrong argument, the error, and what its message must contain: the argument's name and both values.
WRONG: list[tuple[dict[str, Any], type[Exception], list[str]]] = [
    ({"hidden": [[1.0]]}, TypeError, ["hidden", "torch.Tensor", "list"]),
    ({"weight": None}, TypeError, ["weight", "torch.Tensor", "NoneType"]),
    ({"targets": [1]}, TypeError, ["targets", "torch.Tensor", "list"]),
    ({"bias": 0.0}, TypeError, ["bias", "torch.Tensor", "float"]),
    ({"weight": ones(V, H, device="meta")}, ValueError, ["weight", "meta", "cpu"]),
    ({"targets": ones(N, dtype=torch.int64, device="meta")}, ValueError, ["targets", "meta", "cpu"]),
    ({"bias": ones(V, device="meta")}, ValueError, ["bias", "meta", "cpu"]),
    ({"hidden": ones(H)}, ValueError, ["hidden", "2 dimensions", "(5,)"]),
    ({"hidden": ones(1, N, H)}, ValueError, ["hidden", "2 dimensions", "(1, 7, 5)"]),
    ({"weight": ones(V)}, ValueError, ["weight", "2 dimensions", "(11,)"]),
    ({"targets": ones(N, 1, dtype=torch.int64)}, ValueError, ["targets", "1 dimension,", "(7, 1)"]),
    ({"bias": ones(1, V)}, ValueError, ["bias", "1 dimension,", "(1, 11)"]),
    ({"targets": ones(N, dtype=torch.int32)}, TypeError, ["targets", "int64", "int32"]),
    ({"targets": ones(N)}, TypeError, ["targets", "int64", "float32"]),
    ({"hidden": ones(N, H, dtype=torch.int64)}, TypeError, ["hidden", "float16", "int64"]),
    ({"hidden": ones(N, H, dtype=torch.complex64)}, TypeError, ["hidden", "float16", "complex64"]),
    ({"weight": ones(V, H, dtype=torch.int8)}, TypeError, ["weight", "float16", "int8"]),
    ({"bias": ones(V, dtype=torch.bool)}, TypeError, ["bias", "float16", "bool"]),
    ({"hidden": ones(N, H, dtype=torch.bfloat16)}, TypeError, ["weight", "float32", "hidden", "bfloat16"]),
    ({"weight": ones(V, H, dtype=torch.float16)}, TypeError, ["weight", "float16", "hidden", "float32"]),
    ({"bias": ones(V, dtype=torch.float64)}, TypeError, ["bias", "float64", "hidden", "float32"]),
    ({"weight": ones(V, H + 1)}, ValueError, ["weight", "6", "hidden", "5"]),
    ({"weight": ones(0, H)}, ValueError, ["weight", "at least one row", "(0, 5)"]),
    ({"targets": ones(N + 1, dtype=torch.int64)}, ValueError, ["targets", "8", "hidden", "7"]),
    ({"bias": ones(V - 1)}, ValueError, ["bias", "10", "weight", "11"]),
    ({"targets": torch.tensor([0, 1, -1, 2, 3, 4, 5])}, ValueError, ["targets", "-1", "0 to 10"]),
    ({"targets": torch.tensor([0, 1, 2, 3, 4, 5, V])}, ValueError, ["targets", "11", "0 to 10"]),
    ({"targets": torch.full((N,), -100)}, ValueError, ["targets", "-100", "0 to 10"]),
    ({"softcap": "30"}, TypeError, ["softcap", "number", "'30'"]),
    ({"softcap": 0}, ValueError, ["softcap", "above 0", "0"]),
    ({"softcap": -30.0}, ValueError, ["softcap", "above 0", "-30.0"]),
    ({"softcap": math.inf}, ValueError, ["softcap", "above 0", "inf"]),
    ({"logit_scale": None}, TypeError, ["logit_scale", "number", "None"]),
    ({"logit_scale": math.nan}, ValueError, ["logit_scale", "finite", "nan"]),
    ({"logit_scale": -math.inf}, ValueError, ["logit_scale", "finite", "-inf"]),
    ({"temperature": True}, TypeError, ["temperature", "number", "True"]),
    ({"temperature": ones(1)}, TypeError, ["temperature", "number", "tensor([1.])"]),
    ({"temperature": 0.0}, ValueError, ["temperature", "above 0", "0.0"]),
    ({"temperature": math.nan}, ValueError, ["temperature", "above 0", "nan"]),
    ({"workspace_mb": "128"}, TypeError, ["workspace_mb", "number", "'128'"]),
    ({"workspace_mb": -1}, ValueError, ["workspace_mb", "above 0", "-1"]),
    ({"workspace_mb": math.inf}, ValueError, ["workspace_mb", "above 0", "inf"]),
    ({"outputs": "entropy"}, TypeError, ["outputs", "tuple", "'entropy'"]),
    ({"outputs": None}, TypeError, ["outputs", "tuple", "None"]),
    ({"outputs": ("entropy", "variance")}, ValueError, ["outputs", "'variance'", *OUTPUTS]),
    ({"outputs": (3,)}, ValueError, ["outputs", "3", *OUTPUTS]),
    ({"backend": "numpy"}, ValueError, ["backend", "'numpy'", "auto", "torch"]),
    ({"backend": None}, ValueError, ["backend", "None", "auto", "torch"]),
]


@pytest.mark.parametrize(("wrong", "error", "message"), WRONG)
def test_wrong_arguments_are_refused(wrong: dict[str, Any], error: type[Exception], message: list[str]) -> None:
    """The message names a wrong argument, what is expected and its value."""
    with pytest.raises(error) as caught:
        linear_logprob(**inputs() | wrong)
    text = str(caught.value)
    assert text.startswith("linear_logprob: ")
    assert [part for part in message if part not in text] == []
