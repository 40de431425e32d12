"""The losses against formulas written out pair by pair, and the laws that every one of them obeys."""

import itertools
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from decimal import Decimal, localcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpref.config.losses import CPO, DPO, IPO, KTO, ORPO, SORTING_VARIANTS, LossOptions, SimPO
from fastpref.losses.formulas import (
    LossOutput,
    PairLogps,
    RowLogps,
    Totals,
    WholeStep,
    _log1mexp,
    cpo_loss,
    dpo_loss,
    kto_kl,
    kto_loss,
    length_weights,
    orpo_loss,
    pair_loss,
    simpo_loss,
    wpo_weights,
)
from tests.support.losses import CLOSED, DIVERGENCES, OF_A_DIFFERENCE, PAIR_LOSSES, dpo, smoothing, sorts

EVERY_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
PER_PAIR = [variant for variant in CLOSED if variant != "sft"]
EVERY_LOSS = pytest.mark.parametrize("options", PAIR_LOSSES.values(), ids=PAIR_LOSSES)


# --- Formulas, naively: a function of numbers that returns the terms of a sum. -----------------------------------


def nls(x: float) -> float:
    """−log σ(x)"""
    return max(-x, 0.0) + math.log1p(math.exp(-abs(x)))


def sigmoid(x: float) -> float:
    return math.exp(-nls(x))


def smoothed(x: float, eps: float) -> tuple[float, ...]:
    return (1 - eps) * nls(x), eps * nls(-x)


def divergence(name: str, t: float) -> float:
    """f′(eᵗ) as the paper writes it."""
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
    """One pair, in the names of the papers."""

    c: float  # ratio of the chosen response
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


def _exo(p: Pair) -> tuple[float, ...]:
    q, not_q = sigmoid(p.x), sigmoid(-p.x)
    return -q * nls(p.x), -q * math.log(1 - p.eps), -not_q * nls(-p.x), -not_q * math.log(p.eps)


def _robust(p: Pair) -> tuple[float, ...]:
    return (1 - p.eps) * nls(p.x) / (1 - 2 * p.eps), -p.eps * nls(-p.x) / (1 - 2 * p.eps)


def _discopop(p: Pair) -> tuple[float, ...]:
    m = p.x / p.tau
    return nls(p.x) * sigmoid(-m), math.exp(-p.x - nls(m))  # e^{−x}·σ(m): either factor alone can leave float64


NAIVE: dict[str, Callable[[Pair], tuple[float, ...]]] = {
    "sigmoid": lambda p: smoothed(p.x, p.eps),
    "hinge": lambda p: (1, -p.x) if p.x < 1 else (0.0,),
    "ipo": lambda p: ((p.per_token - 1 / (2 * p.beta)) ** 2,),
    "exo_pair": _exo,
    "nca_pair": lambda p: (nls(p.beta * p.c), nls(-p.beta * p.c) / 2, nls(-p.beta * p.r) / 2),
    "robust": _robust,
    "bco_pair": lambda p: (nls(p.beta * p.c), nls(-p.beta * p.r)),
    "sppo_hard": lambda p: ((p.c - 0.5 / p.beta) ** 2, (p.r + 0.5 / p.beta) ** 2),
    "apo_zero": lambda p: (sigmoid(-p.beta * p.c), sigmoid(p.beta * p.r)),
    "apo_down": lambda p: (sigmoid(p.beta * p.c), sigmoid(-p.beta * (p.c - p.r))),
    "discopop": _discopop,
    "sigmoid_norm": lambda p: (nls(p.beta * p.per_token),),
}


def naive_dpo(variant: str, divergence: str = "reverse_kl", tau: float = 0.05) -> Callable[..., tuple[float, ...]]:
    return lambda c, r, n_c, n_r, beta, eps: NAIVE[variant](Pair(c, r, n_c, n_r, beta, eps, tau, divergence))


def naive_reward(logp: float, alpha: float) -> float:
    return -math.expm1(-alpha * logp) / alpha if alpha else logp


def naive_simpo(c: float, r: float, beta: float, margin: float, eps: float, alpha: float) -> tuple[float, ...]:
    return smoothed(beta * (naive_reward(c, alpha) - naive_reward(r, alpha)) - margin, eps)


def naive_cpo(variant: str) -> Callable[..., tuple[float, ...]]:
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


def naive_kto(desirable: bool) -> Callable[..., tuple[float, ...]]:
    sign = 1 if desirable else -1
    return lambda ratio, kl, beta, weight: (weight * sigmoid(-sign * beta * (ratio - kl)),)


@dataclass
class Truth:
    """A number, and the size that rounding errors in finding it are relative to."""

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


def truth(terms: Callable[..., tuple[float, ...]], *numbers: float) -> Truth:
    """The sum of terms; its scale is their size and what a relative change of each number by 1 does to it."""
    found = terms(*numbers)
    value, step = math.fsum(found), 1e-5
    scale = math.fsum(map(abs, found))
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
    """Random pairs with supervised terms of their own; chosen, rejected and nll are leaves that want gradients."""
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


def of_ratios(
    ratios: Sequence[tuple[float, float]], dtype: torch.dtype, lengths: Sequence[tuple[int, int]]
) -> PairLogps:
    """Pairs whose policy differs from the reference by these ratios."""
    c, r = torch.tensor(ratios, dtype=dtype).T
    n_c, n_r = torch.tensor(lengths).T
    ref_c, ref_r = torch.full_like(c, -41.3), torch.full_like(r, -27.7)
    return PairLogps((ref_c + c).requires_grad_(), (ref_r + r).requires_grad_(), n_c, n_r, ref_c, ref_r)


def of_averages(
    averages: Sequence[tuple[float, float]], dtype: torch.dtype, lengths: Sequence[tuple[int, int]]
) -> PairLogps:
    """Pairs with these mean log-probabilities and no reference."""
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


def exact_ratios(pairs: PairLogps) -> list[tuple[float, float]]:
    columns = map(exact, (pairs.chosen, pairs.ref_chosen, pairs.rejected, pairs.ref_rejected))
    return [(c - ref_c, r - ref_r) for c, ref_c, r, ref_r in zip(*columns)]


def exact_lengths(pairs: PairLogps) -> list[tuple[float, float]]:
    return list(zip(exact(pairs.chosen_lengths), exact(pairs.rejected_lengths)))


def exact_nll(pairs: PairLogps) -> Truth:
    logps, lengths = pairs.supervised
    value = -math.fsum(exact(logps)) / math.fsum(exact(lengths))
    return Truth(value, abs(value))


# --- 1. The formulas. ---------------------------------------------------------------------------------------------

SMALL_RATIOS = (0.0, 1e-3, -0.5, 2.7, -7.3, 17.0, -19.0)
RATIOS = (*SMALL_RATIOS, 300.0, -300.0)
LENGTHS = ((1, 1), (7, 3), (12, 1000))


@EVERY_DTYPE
@pytest.mark.parametrize("beta", [0.1, 0.7])
@pytest.mark.parametrize(
    ("variant", "smoothing"),
    [
        *((variant, 0.0) for variant in PER_PAIR if variant != "exo_pair"),
        *((variant, eps) for variant in ("sigmoid", "exo_pair", "robust") for eps in (1e-3, 0.3)),
    ],
)
def test_dpo_variant_is_its_formula(variant: Any, smoothing: float, beta: float, dtype: torch.dtype) -> None:
    """Of a single pair, every variant is the formula of its paper, to a few units of rounding."""
    options = DPO(variants=(variant,), beta=beta, label_smoothing=smoothing)
    _meets_formula(options, "reverse_kl", RATIOS, dtype)


@EVERY_DTYPE
@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("variant", PER_PAIR)
def test_f_divergence_is_its_formula(variant: Any, name: str, dtype: torch.dtype) -> None:
    """A divergence replaces the ratio in the variants of a difference, and does nothing to the others."""
    _meets_formula(dpo(variant, beta=0.3, **DIVERGENCES[name]), name, SMALL_RATIOS, dtype)


def _meets_formula(options: DPO, name: str, ratios: Sequence[float], dtype: torch.dtype) -> None:
    variant = options.variants[0]
    formula = naive_dpo(variant, name if variant in OF_A_DIFFERENCE else "reverse_kl", options.discopop_tau)
    table = squared(ratios)
    pairs = of_ratios(table, dtype, [LENGTHS[i % len(LENGTHS)] for i in range(len(table))])
    for i, (ratio, lengths) in enumerate(zip(exact_ratios(pairs), exact_lengths(pairs))):
        loss = dpo_loss(part(pairs, [i]), options).loss
        truth(formula, *ratio, *lengths, options.beta, options.label_smoothing).meets(loss)


@EVERY_DTYPE
@pytest.mark.parametrize("tau", [0.05, 1.0, 2.0])
def test_discopop_temperature(tau: float, dtype: torch.dtype) -> None:
    """discopop blends its two losses at any temperature."""
    _meets_formula(DPO(variants=("discopop",), discopop_tau=tau), "reverse_kl", RATIOS, dtype)


@EVERY_DTYPE
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("variant", SORTING_VARIANTS)
def test_sorted_variant_is_its_formula(variant: Any, smoothing: float, dtype: torch.dtype) -> None:
    """aot pairs the k-th policy with the k-th reference difference, aot_unpaired the k-th ratios."""
    pairs = make_pairs(13, dtype=dtype)
    options = DPO(variants=(variant,), label_smoothing=smoothing, beta=0.4)
    if variant == "aot":
        one = sorted(c - r for c, r in zip(exact(pairs.chosen), exact(pairs.rejected)))
        other = sorted(c - r for c, r in zip(exact(pairs.ref_chosen), exact(pairs.ref_rejected)))
    else:
        one, other = (sorted(ratios) for ratios in zip(*exact_ratios(pairs)))
    expected = mean(truth(naive_dpo("sigmoid"), a, b, 1, 1, 0.4, smoothing) for a, b in zip(one, other))
    expected.meets(dpo_loss(pairs, options).loss)


@EVERY_DTYPE
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("variants", "weights"),
    [
        (("sigmoid",), (2.0,)),
        (("sft",), None),
        (("sigmoid", "sft"), (1.0, 0.2)),
        (("hinge", "bco_pair", "apo_zero"), None),
        (("sppo_hard", "sft", "robust", "nca_pair"), (0.1, 0.5, -0.3, 0.0)),
    ],
)
def test_dpo_adds_variants_up(variants: Any, weights: Any, weighted: bool, dtype: torch.dtype) -> None:
    """The loss is Σ weight · mean(variant), the pairs weighted in every variant but sft, the mean of all its tokens."""
    pairs = make_pairs(9, dtype=dtype, weighted=weighted)
    options = DPO(variants=variants, weights=weights, beta=0.2, label_smoothing=smoothing(variants))
    of_pairs = exact(pairs.weights) if weighted else [1.0] * 9
    expected = Truth(0.0, 0.0)
    for variant, weight in zip(variants, weights or [1.0] * len(variants)):
        if variant == "sft":
            expected += weight * exact_nll(pairs)
            continue
        rows = zip(of_pairs, exact_ratios(pairs), exact_lengths(pairs))
        numbers = (options.beta, options.label_smoothing)
        expected += weight * mean(w * truth(naive_dpo(variant), *ratio, *n, *numbers) for w, ratio, n in rows)
    expected.meets(dpo_loss(pairs, options).loss)


AVERAGES = squared((-1e-6, -0.01, -0.7, -2.5, -11.0, -40.0))


@EVERY_DTYPE
@pytest.mark.parametrize("beta", [0.0, 0.1, 1.0])
def test_orpo_is_its_formula(beta: float, dtype: torch.dtype) -> None:
    """ORPO is the chosen responses' mean negative log-likelihood less β·logσ of the log odds ratio."""
    pairs = of_averages(AVERAGES, dtype, [(1, 1)] * len(AVERAGES))
    for i, averages in enumerate(zip(exact(pairs.chosen), exact(pairs.rejected))):
        one = part(pairs, [i])
        output = orpo_loss(one, ORPO(beta=beta))
        (exact_nll(one) + truth(naive_orpo, *averages, beta)).meets(output.loss)
        log_ratio = truth(naive_orpo, *averages, 1.0)
        (-1 * log_ratio).meets(output.extra["log_odds_ratio"][0])


@EVERY_DTYPE
@pytest.mark.parametrize(
    "options",
    [
        SimPO(),
        SimPO(beta=1.3, gamma=0.0),
        SimPO(beta=2.5, gamma=1.4, label_smoothing=0.1),
        SimPO(beta=2.5, gamma_beta_ratio=0.3, label_smoothing=1e-3),
        SimPO(beta=0.5, sft_weight=0.4),
        SimPO(alpha=0.25, sft_weight=2.0),
        SimPO(alpha=1e-3, gamma=-0.5),
        SimPO(alpha=-0.5, gamma_beta_ratio=0.0),
    ],
    ids=repr,
)
def test_simpo_is_its_formula(options: SimPO, dtype: torch.dtype) -> None:
    """SimPO is smoothed −logσ of β times the difference of mean log-probabilities less the margin, plus the NLL."""
    ratio = 0.5 if options.gamma_beta_ratio is None else options.gamma_beta_ratio
    margin = options.beta * ratio if options.gamma is None else options.gamma
    pairs = of_averages(AVERAGES, dtype, [LENGTHS[i % len(LENGTHS)] for i in range(len(AVERAGES))])
    rows = zip(exact(pairs.chosen), exact(pairs.rejected), exact_lengths(pairs))
    for i, (c, r, (n_c, n_r)) in enumerate(rows):
        one = part(pairs, [i])
        numbers = (c / n_c, r / n_r, options.beta, margin, options.label_smoothing, options.alpha)
        expected = truth(naive_simpo, *numbers) + options.sft_weight * exact_nll(one)
        expected.meets(simpo_loss(one, options).loss)


@EVERY_DTYPE
@pytest.mark.parametrize(
    "options",
    [
        CPO(),
        CPO(beta=0.5, label_smoothing=0.1, sft_weight=0.0),
        CPO(beta=0.02, label_smoothing=0.4, sft_weight=0.5),
        CPO(variant="hinge", sft_weight=0.0),
        CPO(variant="hinge", beta=0.01, alpha=0.02),
        CPO(variant="ipo"),
        CPO(variant="ipo", beta=0.6, alpha=0.25),
        CPO(alpha=0.01),
        CPO(alpha=-0.1),
    ],
    ids=repr,
)
def test_cpo_is_its_formula(options: CPO, dtype: torch.dtype) -> None:
    """CPO is a loss of β times the difference of log-probabilities (ipo: per token), plus the NLL."""
    table = squared((-1e-3, -0.7, -12.0, -55.0, -150.0))
    lengths = torch.tensor([LENGTHS[i % len(LENGTHS)] for i in range(len(table))])
    logps = torch.tensor(table, dtype=dtype)
    pairs = PairLogps(logps[:, 0], logps[:, 1], lengths[:, 0], lengths[:, 1])
    rows = zip(exact(pairs.chosen), exact(pairs.rejected), exact_lengths(pairs))
    for i, (c, r, n) in enumerate(rows):
        one = part(pairs, [i])
        numbers = (c, r, *n, options.beta, options.label_smoothing, options.alpha)
        expected = truth(naive_cpo(options.variant), *numbers) + options.sft_weight * exact_nll(one)
        expected.meets(cpo_loss(one, options).loss)


@EVERY_DTYPE
@pytest.mark.parametrize("kl", [0.0, 0.37, 25.0])
@pytest.mark.parametrize(
    "options",
    [
        KTO(),
        KTO(beta=0.7, desirable_weight=1.33, undesirable_weight=0.7),
        KTO(desirable_weight=0.0),
        KTO(undesirable_weight=0.0),
        KTO(kl="none", desirable_weight=1.1),
    ],
    ids=repr,
)
def test_kto_is_its_formula(options: KTO, kl: float, dtype: torch.dtype) -> None:
    """KTO is w·(1 − σ(±β(ratio − KL))), and without KL the baseline is 0 whatever is passed."""
    table = [(ratio, label) for label in (True, False) for ratio in RATIOS]
    ref = torch.full((len(table),), -31.7, dtype=dtype)
    logps = ref + torch.tensor([ratio for ratio, _ in table], dtype=dtype)
    labels = torch.tensor([label for _, label in table])
    baseline = torch.tensor(kl, dtype=dtype)
    at = float(baseline) if options.kl == "batch" else 0.0
    truths = []
    for i, (logp, reference, label) in enumerate(zip(exact(logps), exact(ref), labels.tolist())):
        weight = options.desirable_weight if label else options.undesirable_weight
        truths.append(truth(naive_kto(label), logp - reference, at, options.beta, weight))
        truths[-1].meets(kto_loss(RowLogps(logps[[i]], ref[[i]], labels[[i]]), options, baseline).loss)
    whole = kto_loss(RowLogps(logps, ref, labels), options, baseline)
    mean(truths).meets(whole.loss)
    assert len(whole.chosen_rewards) == len(whole.rejected_rewards) == len(RATIOS)


@pytest.mark.parametrize(("differences", "expected"), [([1.0, 2.0, -0.5], 2.5 / 3), ([-1.0, -2.0], 0.0), ([3.0], 3.0)])
def test_kto_kl_is_a_mean_no_less_than_zero(differences: list[float], expected: float) -> None:
    """KTO's baseline is max(0, mean(logp − ref)) of the mismatched pairs."""
    ref = torch.full((len(differences),), -8.0)
    torch.testing.assert_close(kto_kl(ref + torch.tensor(differences), ref), torch.tensor(expected))


# --- 2. Gradients. ------------------------------------------------------------------------------------------------


@EVERY_LOSS
def test_gradients_are_differences(options: LossOptions) -> None:
    """In float64 the gradients are those that differences of the loss give, also where pairs are weighted."""
    pairs = make_pairs(5, seed=1, spread=2.0, weighted=not sorts(options))

    def loss(chosen: Tensor, rejected: Tensor, nll: Tensor) -> Tensor:
        return pair_loss(replace(pairs, chosen=chosen, rejected=rejected, nll=nll), options).loss

    assert torch.autograd.gradcheck(loss, leaves(pairs), atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize(
    "options", [KTO(), KTO(kl="none", desirable_weight=0.0), KTO(beta=1.0, undesirable_weight=2.0)]
)
def test_kto_gradients_are_differences(options: KTO) -> None:
    """In float64 the gradients of KTO are those that differences of the loss give."""
    pairs = make_pairs(6)
    assert pairs.ref_chosen is not None
    reference, labels = pairs.ref_chosen, torch.tensor([True, False, True, True, False, False])

    def loss(logps: Tensor) -> Tensor:
        return kto_loss(RowLogps(logps, reference, labels), options, kl=0.8).loss

    assert torch.autograd.gradcheck(loss, (pairs.chosen,), atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("x", [-1e-12, -1e-3, -0.69, -0.7, -3.0, -30.0])
def test_log1mexp_gradient(x: float) -> None:
    """d log(1 − eˣ)/dx = −eˣ/(1 − eˣ), on both sides of the branch point."""
    leaf = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    (gradient,) = gradients(_log1mexp(leaf), [leaf])
    assert float(gradient) == pytest.approx(math.exp(x) / math.expm1(x), rel=1e-12)


# --- 3. Extremes. -------------------------------------------------------------------------------------------------

EXTREME_LENGTHS = squared((1, 1000))


def assert_finite(output: LossOutput, inputs: Sequence[Tensor]) -> None:
    assert output.loss.isfinite(), output.loss
    for tensor in (*gradients(output.loss, inputs), output.chosen_rewards, output.rejected_rewards):
        assert tensor.isfinite().all(), tensor
    for total, count in output.extra.values():
        assert total.isfinite()
        assert count > 0


@pytest.mark.parametrize("size", [1e4, 79.0])
@pytest.mark.parametrize("name", [name for name, options in PAIR_LOSSES.items() if options.uses_reference])
def test_far_from_the_reference_all_is_finite(name: str, size: float) -> None:
    """At ratios of ±1e4, and where exponentials are about to overflow, float32 losses and gradients are finite."""
    options = PAIR_LOSSES[name]
    table = list(itertools.product(squared((size, -size)), EXTREME_LENGTHS))
    pairs = of_ratios([ratios for ratios, _ in table], torch.float32, [lengths for _, lengths in table])
    assert_finite(pair_loss(pairs, options), leaves(pairs))


@EVERY_LOSS
def test_certain_and_impossible_responses_are_finite(options: LossOptions) -> None:
    """At mean log-probabilities of 0, −1e-7 and −1e4, float32 losses and gradients are finite."""
    averages = squared((0.0, -1e-7, -1e-38, -1e4))
    table = list(itertools.product(averages, EXTREME_LENGTHS))
    pairs = of_averages([pair for pair, _ in table], torch.float32, [lengths for _, lengths in table])
    if options.uses_reference:
        pairs = replace(pairs, ref_chosen=torch.zeros(len(table)), ref_rejected=torch.zeros(len(table)))
    assert_finite(pair_loss(pairs, options), leaves(pairs))


@pytest.mark.parametrize("kl", [0.0, 1e4])
@pytest.mark.parametrize("beta", [0.1, 5.0])
def test_kto_far_from_the_reference_is_finite(beta: float, kl: float) -> None:
    """At ratios of ±1e4 float32 KTO and its gradients are finite, with either label."""
    logps = torch.tensor([1e4, 1e4, -1e4, -1e4], requires_grad=True)
    rows = RowLogps(logps, torch.zeros(4), torch.tensor([True, False, True, False]))
    assert_finite(kto_loss(rows, KTO(beta=beta), kl), [logps])


# --- 4. Parts of a step. ------------------------------------------------------------------------------------------


def random_cut(count: int, seed: int) -> list[Tensor]:
    """All of range(count), shuffled, in parts of unequal size."""
    rng = random.Random(seed)
    order = rng.sample(range(count), count)
    marks = [0, *sorted(rng.sample(range(1, count), rng.randint(1, 4))), count]
    return [torch.tensor(order[start:stop]) for start, stop in itertools.pairwise(marks)]


@EVERY_LOSS
@pytest.mark.parametrize("seed", range(4))
def test_parts_add_up_to_the_step(options: LossOptions, seed: int) -> None:
    """However a step is cut, the parts' losses and gradients sum to those of the whole, and their metrics do too."""
    pairs = make_pairs(11, seed=seed, weighted=not sorts(options))
    assert pairs.nll_lengths is not None
    totals = Totals(11, float(pairs.nll_lengths.sum()))
    whole = pair_loss(pairs, options)
    loss, chosen_rewards = torch.zeros((), dtype=torch.float64), torch.empty(11, dtype=torch.float64).fill_(math.nan)
    extra = {name: torch.zeros(2, dtype=torch.float64) for name in whole.extra}
    for index in random_cut(11, seed):
        output = pair_loss(part(pairs, index), options, totals, WholeStep(pairs.detach(), index))
        loss = loss + output.loss
        chosen_rewards[index] = output.chosen_rewards
        for name, metric in output.extra.items():
            extra[name] += torch.stack(metric)
    torch.testing.assert_close(loss, whole.loss, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(gradients(loss, leaves(pairs)), gradients(whole.loss, leaves(pairs)), rtol=1e-12, atol=0)
    torch.testing.assert_close(chosen_rewards, whole.chosen_rewards)
    for name, metric in whole.extra.items():
        torch.testing.assert_close(extra[name], torch.stack(metric))


@pytest.mark.parametrize("variant", SORTING_VARIANTS)
@pytest.mark.parametrize("seed", range(3))
def test_parts_add_up_where_pairs_tie(variant: Any, seed: int) -> None:
    """Equal differences, such as those of a policy that is still its reference, are paired alike in every part."""
    pairs = make_pairs(8, seed=seed)
    ties = torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0, -2.0, 0.0, -2.0], dtype=torch.float64)
    pairs = replace(pairs, ref_chosen=pairs.chosen.detach() - ties, ref_rejected=pairs.rejected.detach() + ties.flip(0))
    whole = dpo_loss(pairs, DPO(variants=(variant,)))
    loss = torch.zeros((), dtype=torch.float64)
    for index in random_cut(8, seed):
        step = WholeStep(pairs.detach(), index)
        loss = loss + dpo_loss(part(pairs, index), DPO(variants=(variant,)), Totals(8), step).loss
    torch.testing.assert_close(loss, whole.loss)
    torch.testing.assert_close(gradients(loss, leaves(pairs)), gradients(whole.loss, leaves(pairs)))


@pytest.mark.parametrize("seed", range(4))
def test_parts_of_kto_add_up_to_the_step(seed: int) -> None:
    """However a step of rows is cut, also into parts of one label, losses and gradients sum to those of the whole."""
    pairs = make_pairs(10, seed=seed)
    assert pairs.ref_chosen is not None
    labels = torch.tensor([True] * 3 + [False] * 7)
    options = KTO(desirable_weight=1.5)
    whole = kto_loss(RowLogps(pairs.chosen, pairs.ref_chosen, labels), options, 0.6)
    loss = torch.zeros((), dtype=torch.float64)
    for index in random_cut(10, seed):
        rows = RowLogps(pairs.chosen[index], pairs.ref_chosen[index], labels[index])
        loss = loss + kto_loss(rows, options, 0.6, Totals(10)).loss
    torch.testing.assert_close(loss, whole.loss)
    torch.testing.assert_close(gradients(loss, [pairs.chosen]), gradients(whole.loss, [pairs.chosen]))


# --- 5. Known values. ---------------------------------------------------------------------------------------------

LN2 = math.log(2)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (DPO(), LN2),
        (DPO(label_smoothing=0.3), LN2),
        (DPO(beta=7.0, variants=("hinge",)), 1.0),
        (DPO(beta=0.2, variants=("ipo",)), (1 / 0.4) ** 2),
        (IPO(beta=0.05), 100.0),
        (DPO(variants=("exo_pair",), label_smoothing=0.5 - 1e-9), 0.0),
        (DPO(variants=("nca_pair",)), 2 * LN2),
        (DPO(variants=("robust",), label_smoothing=0.2), LN2),
        (DPO(variants=("bco_pair",)), 2 * LN2),
        (DPO(beta=0.25, variants=("sppo_hard",)), 8.0),
        (DPO(variants=("aot",)), LN2),
        (DPO(variants=("aot_unpaired",)), LN2),
        (DPO(variants=("apo_zero",)), 1.0),
        (DPO(variants=("apo_down",)), 1.0),
        (DPO(variants=("discopop",)), 0.5 * LN2 + 0.5),
        (DPO(variants=("sigmoid_norm",)), LN2),
        (DPO(variants=("sigmoid", "hinge"), weights=(3.0, 0.5)), 3 * LN2 + 0.5),
        *((DPO(f_divergence=f), LN2) for f in ("forward_kl", "js", "alpha")),
    ],
    ids=repr,
)
def test_value_where_the_policy_is_the_reference(options: LossOptions, expected: float) -> None:
    """At ratio 0, where training starts, every loss has the value its formula has at 0."""
    lengths = torch.tensor([3, 5, 9])
    logps = torch.tensor([-1.0, -2.5, -40.0])
    pairs = PairLogps(logps, logps.flip(0), lengths, lengths, logps, logps.flip(0))
    assert pair_loss(pairs, options).loss.item() == pytest.approx(expected, rel=3e-7, abs=1e-7)


@pytest.mark.parametrize("kl", ["batch", "none"])
def test_kto_where_the_policy_is_the_reference(kl: Any) -> None:
    """At ratio 0 and KL 0, KTO is half the mean weight."""
    logps = torch.tensor([-1.0, -2.0, -3.0, -4.0])
    rows = RowLogps(logps, logps, torch.tensor([True, True, True, False]))
    options = KTO(desirable_weight=1.5, undesirable_weight=0.5, kl=kl)
    assert kto_loss(rows, options).loss.item() == pytest.approx(0.5 * (3 * 1.5 + 0.5) / 4)


def test_simpo_and_cpo_and_orpo_of_equal_responses() -> None:
    """Of two equally likely responses SimPO is −logσ(−γ), CPO ln 2 + NLL, ORPO NLL + β·ln 2."""
    pairs = of_averages([(-0.5, -0.5), (-2.0, -2.0)], torch.float32, [(4, 4), (6, 6)])
    nll = (0.5 * 4 + 2.0 * 6) / 10
    assert simpo_loss(pairs, SimPO(gamma=1.25)).loss.item() == pytest.approx(nls(-1.25))
    assert simpo_loss(pairs).loss.item() == pytest.approx(nls(-0.5 * 2.0))
    assert cpo_loss(pairs).loss.item() == pytest.approx(LN2 + nll)
    assert orpo_loss(pairs, ORPO(beta=0.25)).loss.item() == pytest.approx(nll + 0.25 * LN2)


def test_ipo_by_its_own_name() -> None:
    """`ipo` is `dpo` with the variant ipo, to the last bit."""
    pairs = make_pairs(6, dtype=torch.float32)
    one, other = pair_loss(pairs, IPO(beta=0.3)), dpo_loss(pairs, DPO(beta=0.3, variants=("ipo",)))
    assert torch.equal(one.loss, other.loss)
    assert torch.equal(one.chosen_rewards, other.chosen_rewards)
    assert all(map(torch.equal, gradients(one.loss, leaves(pairs)), gradients(other.loss, leaves(pairs))))


def test_rpo_is_dpo_plus_supervision() -> None:
    """["sigmoid", "sft"] with weights [1, α] is DPO + α·NLL, in value and in gradient."""
    pairs = make_pairs(6)
    logps, lengths = pairs.supervised
    rpo = dpo_loss(pairs, DPO(variants=("sigmoid", "sft"), weights=(1.0, 0.7))).loss
    added = dpo_loss(pairs).loss - 0.7 * logps.sum() / lengths.sum()
    torch.testing.assert_close(rpo, added)
    torch.testing.assert_close(gradients(rpo, leaves(pairs)), gradients(added, leaves(pairs)))


def test_supervised_terms_default_to_the_chosen_response() -> None:
    """Without logps of their own, supervised terms score the chosen responses' tokens."""
    pairs = make_pairs(6)
    given = replace(pairs, nll=pairs.chosen, nll_lengths=pairs.chosen_lengths)
    default = replace(pairs, nll=None, nll_lengths=None)
    for options in (DPO(variants=("sft",)), ORPO(), CPO(), SimPO(sft_weight=1.0)):
        assert torch.equal(pair_loss(given, options).loss, pair_loss(default, options).loss)


@pytest.mark.parametrize(
    ("options", "reward"),
    [
        (DPO(beta=0.3, f_divergence="forward_kl"), lambda p: 0.3 * (p.chosen - p.ref_chosen)),
        (IPO(beta=0.3), lambda p: 0.3 * (p.chosen - p.ref_chosen)),
        (ORPO(beta=0.3), lambda p: 0.3 * p.chosen / p.chosen_lengths),
        (SimPO(beta=3.0), lambda p: 3.0 * p.chosen / p.chosen_lengths),
        (CPO(beta=0.3), lambda p: 0.3 * p.chosen),
        (CPO(beta=0.3, variant="ipo"), lambda p: 0.3 * p.chosen / p.chosen_lengths),
    ],
    ids=lambda value: "" if callable(value) else repr(value),
)
def test_rewards(options: LossOptions, reward: Callable[[PairLogps], Tensor]) -> None:
    """Rewards are β·ratio, for ORPO and SimPO β·mean log-probability, for CPO β·log-probability."""
    pairs = make_pairs(5)
    mirrored = replace(
        pairs,
        chosen=pairs.rejected,
        chosen_lengths=pairs.rejected_lengths,
        ref_chosen=pairs.ref_rejected,
    )
    output = pair_loss(pairs, options)
    torch.testing.assert_close(output.chosen_rewards, reward(pairs).detach())
    torch.testing.assert_close(output.rejected_rewards, reward(mirrored).detach())


# --- 6. Options. --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "values", "word"),
    [
        (DPO, {"label_smoothing": 0.1, "variants": ["ipo"]}, "label_smoothing"),
        (DPO, {"label_smoothing": 0.5}, "label_smoothing"),
        (DPO, {"label_smoothing": -0.1}, "label_smoothing"),
        (DPO, {"variants": ["exo_pair"]}, "exo_pair"),
        (DPO, {"variants": ["sigmoid", "hinge"], "weights": [1.0]}, "weights"),
        (DPO, {"weights": []}, "weights"),
        (DPO, {"variants": []}, "variants"),
        (DPO, {"variants": ["sigmoid", "sigmoid"]}, "twice"),
        (DPO, {"variants": ["sigmoyd"]}, "sigmoid"),
        (DPO, {"variants": ["aot"], "weighting": True}, "aot"),
        (DPO, {"variants": ["sigmoid", "aot_unpaired"], "weighting": True}, "weighting"),
        (DPO, {"beta": 0.0}, "beta"),
        (DPO, {"beta": -0.1}, "beta"),
        (DPO, {"beta": math.inf}, "beta"),
        (DPO, {"beta": "0.1"}, "beta"),
        (DPO, {"betta": 0.1}, "betta"),
        (DPO, {"f_divergence": "hellinger"}, "f_divergence"),
        (DPO, {"length_alpha": 1.5}, "length_alpha"),
        (DPO, {"length_alpha": -0.5}, "length_alpha"),
        (DPO, {"discopop_tau": 0.0}, "discopop_tau"),
        (DPO, {"weights": [math.nan]}, "weights"),
        (DPO, {"type": "ipo"}, "type"),
        (IPO, {"beta": -1.0}, "beta"),
        (IPO, {"label_smoothing": 0.1}, "label_smoothing"),
        (KTO, {"beta": -1.0}, "beta"),
        (KTO, {"desirable_weight": -0.1}, "desirable_weight"),
        (KTO, {"undesirable_weight": -0.1}, "undesirable_weight"),
        (KTO, {"kl": "row"}, "kl"),
        (ORPO, {"beta": -0.1}, "beta"),
        (ORPO, {"nll_on": "prompt"}, "nll_on"),
        (SimPO, {"gamma": 1.0, "gamma_beta_ratio": 0.5}, "gamma_beta_ratio"),
        (SimPO, {"label_smoothing": 0.6}, "label_smoothing"),
        (SimPO, {"sft_weight": -1.0}, "sft_weight"),
        (SimPO, {"beta": -2.0}, "beta"),
        (CPO, {"variant": "ipo", "label_smoothing": 0.1}, "label_smoothing"),
        (CPO, {"variant": "hinge", "label_smoothing": 0.1}, "label_smoothing"),
        (CPO, {"variant": "simpo"}, "variant"),
        (CPO, {"sft_weight": -1.0}, "sft_weight"),
        (CPO, {"beta": 0.0}, "beta"),
        (CPO, {"gamma": 1.0}, "gamma"),
    ],
)
def test_bad_options_are_refused(kind: type, values: dict[str, Any], word: str) -> None:
    """An option that is wrong, unknown or at odds with another is refused by name."""
    with pytest.raises(ValueError, match=word):
        kind(**values)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (DPO, {"beta": 1, "variants": ["sigmoid", "sft"], "weights": [1, 0.5]}),
        (DPO, {"variants": ["exo_pair", "aot"], "label_smoothing": 1e-3}),
        (DPO, {"variants": ["hinge"], "weighting": True}),
        (KTO, {"desirable_weight": 0, "undesirable_weight": 0.0}),
        (ORPO, {"beta": 0.0}),
        (SimPO, {"gamma": 0.0}),
        (CPO, {"sft_weight": 0.0, "label_smoothing": 0.49}),
    ],
)
def test_good_options_are_taken(kind: type, values: dict[str, Any]) -> None:
    """Lists and whole numbers, as TOML and JSON have them, and values at the edge of what is legal are taken."""
    options = kind(**values)
    assert all(getattr(options, name) == (tuple(v) if isinstance(v, list) else v) for name, v in values.items())


def test_what_cannot_be_computed_is_refused() -> None:
    """A loss against a reference needs its log-probabilities, and KTO has no loss of pairs."""
    pairs = make_pairs(2)
    for options in (DPO(), IPO(), DPO(variants=("sft",))):
        with pytest.raises(ValueError, match="ref_chosen"):
            pair_loss(replace(pairs, ref_chosen=None), options)
    with pytest.raises(TypeError, match="KTO"):
        pair_loss(pairs, KTO())


# --- 7. Where no gradient goes. -----------------------------------------------------------------------------------


@EVERY_LOSS
def test_only_the_policy_gets_a_gradient(options: LossOptions) -> None:
    """Rewards and metrics carry no gradient, and reference log-probabilities without one are left alone."""
    sources = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    pairs = make_pairs(4)
    pairs = replace(pairs, weights=None if sorts(options) else wpo_weights(sources, sources))
    assert pairs.ref_chosen is not None
    assert pairs.ref_rejected is not None
    output = pair_loss(pairs, options)
    output.loss.backward()
    assert any(leaf.grad is not None for leaf in leaves(pairs))
    assert sources.grad is None
    assert pairs.ref_chosen.grad is None
    assert pairs.ref_rejected.grad is None
    tensors = [output.chosen_rewards, output.rejected_rewards, *itertools.chain(*output.extra.values())]
    assert not any(tensor.requires_grad for tensor in tensors)


def test_kto_baseline_gets_no_gradient() -> None:
    """KTO's KL carries no gradient, neither out of its estimate nor through the loss."""
    logps = torch.tensor([-1.0, -2.0], requires_grad=True)
    estimate = kto_kl(logps, torch.tensor([-3.0, -3.0]))
    assert float(estimate) == 1.5
    assert not estimate.requires_grad
    kl = torch.tensor(0.5, requires_grad=True)
    output = kto_loss(RowLogps(logps, torch.zeros(2), torch.tensor([True, False])), kl=kl)
    output.loss.backward()
    assert logps.grad is not None
    assert kl.grad is None
    assert not output.chosen_rewards.requires_grad
    assert not output.rejected_rewards.requires_grad


# --- 8. The pieces. -----------------------------------------------------------------------------------------------


@EVERY_DTYPE
def test_log1mexp_is_exact_at_both_ends(dtype: torch.dtype) -> None:
    """log(1 − eˣ) is right to a few units of rounding from −1e-29 to −80."""
    sizes = [10.0**power for power in range(-29, 1)] + [0.5, 0.69, math.log(2), 0.7, 2.0, 5.0, 17.0, 40.0, 80.0]
    x = -torch.tensor(sizes, dtype=dtype)
    for at, found in zip(exact(x), _log1mexp(x)):
        with localcontext(prec=80):
            value = float((1 - Decimal(at).exp()).ln())
        condition = abs(at * math.exp(at) / math.expm1(at))
        Truth(value, abs(value) + condition).meets(found, units=2)


@EVERY_DTYPE
def test_log1mexp_of_zero_is_finite(dtype: torch.dtype) -> None:
    """A certain response has finite odds, with a finite gradient, no better than those of a nearly certain one."""
    x = torch.tensor([0.0, -1e-35, -1e-20], dtype=dtype, requires_grad=True)
    values = _log1mexp(x)
    (gradient,) = gradients(values.sum(), [x])
    assert values.isfinite().all()
    assert gradient.isfinite().all()
    assert values[0] == values[1] < values[2]


@pytest.mark.parametrize(
    ("alpha", "expected"), [(1.0, [1, 1, 1, 1, 1]), (0.0, [1, 1, 0, 1, 0]), (0.3, [1, 1, 0.3, 1, 0.3])]
)
def test_length_weights(alpha: float, expected: list[float]) -> None:
    """Tokens within the shorter response's length weigh 1, later ones alpha."""
    weights = length_weights(torch.tensor([0, 1, 2, 0, 1]), torch.tensor([2, 2, 2, 1, 1]), alpha)
    assert torch.equal(weights, torch.tensor(expected, dtype=torch.float32))


@EVERY_DTYPE
def test_wpo_weights(dtype: torch.dtype) -> None:
    """A pair weighs the product of its responses' likelihoods per token, and nothing flows back."""
    chosen = torch.tensor([0.0, -0.3, -2.0, 0.4, -30.0], dtype=dtype, requires_grad=True)
    rejected = torch.tensor([0.0, -1.1, -5.0, 0.2, -30.0], dtype=dtype)
    weights = wpo_weights(chosen, rejected)
    assert not weights.requires_grad
    for c, r, weight in zip(exact(chosen), exact(rejected), weights):
        truth(lambda c, r: (math.exp(c + r),), c, r).meets(weight)
