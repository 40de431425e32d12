"""The losses as formulas written out pair by pair in exact numbers, and the pairs for which tests compute them."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpref.losses import PairLogps
from tests.support.losses import CLOSED, PAIR_LOSSES
from tests.support.losses import DIVERGENCES as OTHER_DIVERGENCES

EVERY_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
PER_PAIR = [variant for variant in CLOSED if variant != "sft"]
Numbers = tuple[float, float]  # of the chosen and the rejected completion
Terms = Callable[..., tuple[float, ...]]  # the terms of a sum
DIVERGENCES: dict[str, dict[str, Any]] = {"reverse_kl": {}, **OTHER_DIVERGENCES}
EVERY_LOSS = pytest.mark.parametrize("options", PAIR_LOSSES.values(), ids=PAIR_LOSSES)


# --- Naive formulas: each is a function of numbers that returns the terms of a sum. -------------------------------


def nls(x: float) -> float:
    """Return −log σ(x)."""
    return max(-x, 0.0) + math.log1p(math.exp(-abs(x)))


def sigmoid(x: float) -> float:
    return math.exp(-nls(x))


def smoothed(x: float, eps: float) -> tuple[float, ...]:
    return (1 - eps) * nls(x), eps * nls(-x)


def divergence(name: str, t: float) -> float:
    """Return f′(eᵗ) as in the paper."""
    if name == "forward_kl":
        return 1 - math.exp(-t)
    if name == "js":
        return math.log(2 * sigmoid(t))
    if name in ("reverse_kl", "alpha 1"):
        return t
    power = float(name.removeprefix("alpha ")) - 1
    return math.expm1(power * t) / power


@dataclass
class Pair:
    """One pair, with the names of the papers."""

    c: float  # ratio of the chosen completion
    r: float
    n_c: float
    n_r: float
    beta: float
    eps: float
    tau: float
    divergence: str

    @property
    def x(self) -> float:
        return self.beta * (divergence(self.divergence, self.c) - divergence(self.divergence, self.r))

    @property
    def per_token(self) -> float:
        return divergence(self.divergence, self.c) / self.n_c - divergence(self.divergence, self.r) / self.n_r


def naive_exo(p: Pair) -> tuple[float, ...]:
    q, not_q = sigmoid(p.x), sigmoid(-p.x)
    return -q * nls(p.x), -q * math.log(1 - p.eps), -not_q * nls(-p.x), -not_q * math.log(p.eps)


def naive_robust(p: Pair) -> tuple[float, ...]:
    return (1 - p.eps) * nls(p.x) / (1 - 2 * p.eps), -p.eps * nls(-p.x) / (1 - 2 * p.eps)


def naive_discopop(p: Pair) -> tuple[float, ...]:
    m = p.x / p.tau
    return nls(p.x) * sigmoid(-m), math.exp(-p.x - nls(m))  # e^{−x}·σ(m): each factor alone can exceed float64


NAIVE: dict[str, Callable[[Pair], tuple[float, ...]]] = {
    "sigmoid": lambda p: smoothed(p.x, p.eps),
    "hinge": lambda p: (1, -p.x) if p.x < 1 else (0.0,),
    "ipo": lambda p: ((p.per_token - 1 / (2 * p.beta)) ** 2,),
    "exo_pair": naive_exo,
    "nca_pair": lambda p: (nls(p.beta * p.c), nls(-p.beta * p.c) / 2, nls(-p.beta * p.r) / 2),
    "robust": naive_robust,
    "bco_pair": lambda p: (nls(p.beta * p.c), nls(-p.beta * p.r)),
    "sppo_hard": lambda p: ((p.c - 0.5 / p.beta) ** 2, (p.r + 0.5 / p.beta) ** 2),
    "apo_zero": lambda p: (sigmoid(-p.beta * p.c), sigmoid(p.beta * p.r)),
    "apo_down": lambda p: (sigmoid(p.beta * p.c), sigmoid(-p.beta * (p.c - p.r))),
    "discopop": naive_discopop,
    "sigmoid_norm": lambda p: (nls(p.beta * p.per_token),),
}


def naive_dpo(variant: str, divergence: str = "reverse_kl", tau: float = 0.05) -> Terms:
    return lambda c, r, n_c, n_r, beta, eps: NAIVE[variant](Pair(c, r, n_c, n_r, beta, eps, tau, divergence))


def naive_reward(logp: float, alpha: float) -> float:
    return -math.expm1(-alpha * logp) / alpha if alpha else logp


def naive_simpo(c: float, r: float, beta: float, margin: float, eps: float, alpha: float) -> tuple[float, ...]:
    return smoothed(beta * (naive_reward(c, alpha) - naive_reward(r, alpha)) - margin, eps)


def naive_cpo(variant: str) -> Terms:
    def terms(c: float, r: float, n_c: float, n_r: float, beta: float, eps: float, alpha: float) -> tuple[float, ...]:
        if variant == "ipo":
            c, r = c / n_c, r / n_r
        difference = naive_reward(c, alpha) - naive_reward(r, alpha)
        if variant == "ipo":
            return ((difference - 1 / (2 * beta)) ** 2,)
        if variant == "hinge":
            return (1, -beta * difference) if beta * difference < 1 else (0.0,)
        return smoothed(beta * difference, eps)

    return terms


def naive_orpo(c: float, r: float, beta: float) -> tuple[float, ...]:
    return (beta * nls((c - math.log(-math.expm1(c))) - (r - math.log(-math.expm1(r)))),)


def naive_kto(desirable: bool) -> Terms:
    sign = 1 if desirable else -1
    return lambda ratio, kl, beta, weight: (weight * sigmoid(-sign * beta * (ratio - kl)),)


@dataclass
class Truth:
    """A number, and the size to which its rounding errors are relative."""

    value: float
    scale: float

    def __rmul__(self, factor: float) -> "Truth":
        return Truth(factor * self.value, abs(factor) * self.scale)

    def __add__(self, other: "Truth") -> "Truth":
        return Truth(self.value + other.value, self.scale + other.scale)

    def meets(self, result: Tensor, units: float = 4) -> None:
        info = torch.finfo(result.dtype)
        error = abs(float(result.detach().double()) - self.value)
        assert error <= units * info.eps * self.scale + info.tiny, f"{result!r} is not {self.value!r}"


def truth(terms: Terms, *numbers: float) -> Truth:
    """Return the sum of the terms; its scale is their size plus the effect of a relative change of each number by 1."""
    summands, step = terms(*numbers), 1e-5
    value, scale = math.fsum(summands), math.fsum(map(abs, summands))
    for i, number in enumerate(numbers):
        moved = [*numbers[:i], number * (1 + step), *numbers[i + 1 :]]
        scale += abs(math.fsum(terms(*moved)) - value) / step
    return Truth(value, scale)


def mean(truths: Iterable[Truth]) -> Truth:
    truths = list(truths)
    return (1 / len(truths)) * sum(truths, Truth(0.0, 0.0))


# --- Data. -------------------------------------------------------------------------------------------------------


def make_pairs(
    count: int, seed: int = 0, dtype: torch.dtype = torch.float64, *, spread: float = 3.0, weighted: bool = False
) -> PairLogps:
    """Return random pairs with separate supervised terms; chosen, rejected and nll require gradients."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator, dtype=torch.float64)

    lengths = [torch.randint(1, 40, (count,), generator=generator) for _ in range(3)]
    logps = [(-uniform(0.1, 3.0) * length).to(dtype) for length in lengths]
    references = [logp + uniform(-spread, spread).to(dtype) for logp in logps[:2]]
    return PairLogps(
        chosen=logps[0].requires_grad_(),
        rejected=logps[1].requires_grad_(),
        chosen_lengths=lengths[0],
        rejected_lengths=lengths[1],
        ref_chosen=references[0],
        ref_rejected=references[1],
        nll=logps[2].requires_grad_(),
        nll_lengths=lengths[2],
        weights=uniform(0.2, 2.0).to(dtype) if weighted else None,
    )


def of_ratios(ratios: Sequence[Numbers], dtype: torch.dtype, lengths: Sequence[tuple[int, int]]) -> PairLogps:
    """Return pairs whose policy differs from the reference by these ratios."""
    c, r = torch.tensor(ratios, dtype=dtype).T
    n_c, n_r = torch.tensor(lengths).T
    ref_c, ref_r = torch.full_like(c, -41.3), torch.full_like(r, -27.7)
    return PairLogps((ref_c + c).requires_grad_(), (ref_r + r).requires_grad_(), n_c, n_r, ref_c, ref_r)


def of_averages(averages: Sequence[Numbers], dtype: torch.dtype, lengths: Sequence[tuple[int, int]]) -> PairLogps:
    """Return pairs with these mean log-probabilities and no reference."""
    c, r = torch.tensor(averages, dtype=dtype).T
    n_c, n_r = torch.tensor(lengths).T
    return PairLogps((c * n_c).requires_grad_(), (r * n_r).requires_grad_(), n_c, n_r)


def squared(values: Sequence[Any]) -> list[tuple[Any, Any]]:
    return [(one, other) for one in values for other in values]


def part(pairs: PairLogps, index: Any) -> PairLogps:
    values = {f.name: getattr(pairs, f.name) for f in fields(pairs)}
    return replace(pairs, **{name: t[index] for name, t in values.items() if t is not None})


def leaves(pairs: PairLogps) -> tuple[Tensor, ...]:
    return tuple(t for t in (pairs.chosen, pairs.rejected, pairs.nll) if t is not None)


def gradients(loss: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)


def exact(tensor: Tensor | None) -> list[float]:
    assert tensor is not None
    return tensor.detach().double().tolist()


def exact_ratios(pairs: PairLogps) -> list[Numbers]:
    columns = map(exact, (pairs.chosen, pairs.ref_chosen, pairs.rejected, pairs.ref_rejected))
    return [(c - ref_c, r - ref_r) for c, ref_c, r, ref_r in zip(*columns)]


def exact_lengths(pairs: PairLogps) -> list[Numbers]:
    return list(zip(exact(pairs.chosen_lengths), exact(pairs.rejected_lengths)))


def exact_nll(pairs: PairLogps) -> Truth:
    logps, lengths = pairs.supervised
    value = -math.fsum(exact(logps)) / math.fsum(exact(lengths))
    return Truth(value, abs(value))
