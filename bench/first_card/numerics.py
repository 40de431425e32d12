"""Every kernel at the sizes of real heads, against float64, and twice, since equal inputs must give equal bits.

The head computes all rows. Only some of them have a coefficient, so float64 needs no more than these for every
gradient, that of the weight too.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.first_card.outcome import Case, Outcome
from bench.first_card.sizes import Sizes
from bench.problems import Shape
from fastpref.kernels.linear_logprob_naive import linear_logprob_naive
from fastpref.ops import OUTPUTS, TokenLogprobs, linear_logprob

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
COMPARED = 48  # rows
LOGGED = ("entropy", "mean_logit", "is_top1")  # the outputs of a step that is logged


@dataclass(frozen=True)
class Head:
    """A head with everything that it can have."""

    hidden: Tensor  # [N, H], requires grad
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    targets: Tensor  # [N] int64
    coefficients: Tensor  # [N] float32, 0 but for the compared rows
    compared: Tensor  # [COMPARED] int64, rising
    softcap: float | None

    @property
    def leaves(self) -> list[Tensor]:
        return [
            tensor for tensor in (self.hidden, self.weight, self.bias) if tensor is not None and tensor.requires_grad
        ]


def make_head(
    shape: Shape, rows: int, dtype: torch.dtype, device: str, *, trained: bool = False, biased: bool = False
) -> Head:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, device=device, generator=generator)

    hidden, weight = normal(rows, shape.hidden), normal(shape.vocab, shape.hidden) / shape.hidden**0.5
    compared = torch.linspace(0, rows - 1, min(COMPARED, rows), device=device).long()
    coefficients = torch.zeros(rows, device=device)
    coefficients[compared] = torch.linspace(-1, 1.5, len(compared), device=device)
    return Head(
        hidden=hidden.to(dtype).requires_grad_(),
        weight=weight.to(dtype).requires_grad_(trained),
        bias=normal(shape.vocab).to(dtype).requires_grad_(trained) if biased else None,
        targets=torch.randint(shape.vocab, (rows,), device=device, generator=generator),
        coefficients=coefficients,
        compared=compared,
        softcap=shape.softcap,
    )


def compute(head: Head, outputs: tuple[str, ...] = ()) -> tuple[TokenLogprobs, list[Tensor]]:
    """Return the kernels' results for all rows, and the gradients of the leaves."""
    backend = "triton" if triton_runs(head.hidden.device.type) else "torch"
    results = linear_logprob(
        head.hidden, head.weight, head.targets, head.bias, softcap=head.softcap, outputs=outputs, backend=backend
    )
    gradients = torch.autograd.grad((results.logp * head.coefficients).sum(), head.leaves)
    return TokenLogprobs(results.logp.detach(), *results[1:]), list(gradients)


def triton_runs(device: str) -> bool:
    """Return whether Triton's kernels run on a device: on a CPU by its interpreter, if that is asked for."""
    return device == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


def exact(head: Head) -> tuple[TokenLogprobs, list[Tensor]]:
    """Return the results of the compared rows, and the gradients of the leaves for these, in float64."""
    hidden = head.hidden.detach()[head.compared].double().requires_grad_()
    weight = head.weight.detach().double().requires_grad_(head.weight.requires_grad)
    bias = None if head.bias is None else head.bias.detach().double().requires_grad_(head.bias.requires_grad)
    results = linear_logprob_naive(hidden, weight, head.targets[head.compared], bias, softcap=head.softcap)
    leaves = [tensor for tensor in (hidden, weight, bias) if tensor is not None and tensor.requires_grad]
    gradients = torch.autograd.grad((results.logp * head.coefficients[head.compared]).sum(), leaves)
    return TokenLogprobs(results.logp.detach(), *(getattr(results, name).detach() for name in OUTPUTS)), list(gradients)


def check_head(head: Head, outputs: tuple[str, ...] = ()) -> Outcome:
    """Compare a head's results and gradients with float64, and with those of a second time, bit for bit.

    Values may be off by float32's rounding, gradients by four roundings of their dtype, and a top-1 by none whose
    logits differ by more than float32's rounding.
    """
    (results, gradients), (again, gradients_again) = compute(head, outputs), compute(head, outputs)
    truth, true_gradients = exact(head)
    own = results.take(head.compared)
    numbers = {"error of logp": float((own.logp - truth.logp).abs().max())}
    bounds = [_within(own.logp, truth.logp)]
    for name in outputs:
        value, true = getattr(own, name), getattr(truth, name)
        if value.dtype == torch.bool:
            numbers[f"different {name}"] = float((value != true).sum())
            bounds.append(bool(numbers[f"different {name}"] <= 1))  # of equal logits in float32
            continue
        numbers[f"error of {name}"] = float((value - true).abs().max())
        bounds.append(_within(value, true))
    gradients[0] = gradients[0][head.compared]
    names = ["hidden", "weight", "bias"]
    for name, gradient, true in zip(names, gradients, true_gradients, strict=False):
        size = true.norm()
        error = float(true.sub_(gradient).norm() / size)  # in place: a large weight in float64 is there once
        numbers[f"relative error of ∂{name}"] = error
        bounds.append(error <= 4 * torch.finfo(gradient.dtype).eps + 1e-5)
    gradients_again[0] = gradients_again[0][head.compared]
    same = all(
        a is b is None or torch.equal(a, b)  # pyright: ignore[reportArgumentType]
        for a, b in zip([*results, *gradients], [*again, *gradients_again], strict=True)
    )
    return Outcome(numbers, right=all(bounds) and same, note="" if same else "a second time gave other bits")


def _within(value: Tensor, true: Tensor) -> bool:
    """Return whether float32 values are within its rounding of sums over a vocabulary."""
    return bool(((value.double() - true).abs() <= 1e-4 + 1e-5 * true.abs()).all())


def cases(sizes: Sizes) -> Iterator[Case]:
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        for shape in sizes.heads:
            for trained in (False, True):
                kind = "trained" if trained else "frozen"
                yield f"{shape.model}, {kind}, {name}", lambda a=(shape, dtype, trained): _plain(sizes, *a)
            yield f"{shape.model}, logged, {name}", lambda a=(shape, dtype): _logged(sizes, *a)
            yield f"{shape.model}, every output, {name}", lambda a=(shape, dtype): _full(sizes, *a)
        if dtype == torch.bfloat16:
            yield from _loss_cases(sizes)


def _plain(sizes: Sizes, shape: Shape, dtype: torch.dtype, trained: bool) -> Outcome:
    return check_head(make_head(shape, sizes.checked_rows, dtype, sizes.device, trained=trained))


def _logged(sizes: Sizes, shape: Shape, dtype: torch.dtype) -> Outcome:
    return check_head(make_head(shape, sizes.checked_rows, dtype, sizes.device), LOGGED)


def _full(sizes: Sizes, shape: Shape, dtype: torch.dtype) -> Outcome:
    return check_head(make_head(shape, sizes.checked_rows, dtype, sizes.device, trained=True, biased=True), OUTPUTS)


def _loss_cases(sizes: Sizes) -> Iterator[Case]:
    try:
        from bench.losses import LOSSES
    except ModuleNotFoundError as error:
        note = f"left out: {error.name} is not installed"
        yield "preference losses", lambda: Outcome(note=note)
        return
    for name in LOSSES:
        yield f"loss: {name}", lambda name=name: _loss(sizes, name)


def _loss(sizes: Sizes, name: str) -> Outcome:
    """Compare the fused kernel of a loss with float64, and with twice the error of the same loss in torch's float32."""
    from bench.losses import FUSED, TORCH, LossCase

    case = LossCase(name, pairs=16, length=40, device=sizes.device)
    value, gradient = (tensor.double() for tensor in case.step(TORCH, torch.float64)())
    errors = {}
    for backend in (FUSED if triton_runs(sizes.device) else TORCH, TORCH):
        own_value, own_gradient = case.step(backend)()
        errors[backend] = (
            float((own_value - value).abs() / value.abs()),
            float((own_gradient - gradient).norm() / gradient.norm()),
        )
    (of_value, of_gradient), of_torch = next(iter(errors.values())), errors[TORCH]
    margin = 16 * torch.finfo(torch.float32).eps
    right = of_value <= 2 * of_torch[0] + margin and of_gradient <= 2 * of_torch[1] + margin
    return Outcome({"relative error": of_value, "relative error of the gradient": of_gradient}, right=right)
