"""The losses compared with formulas written out pair by pair: values, gradients, extremes."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpref.config.losses import CPO, DPO, KTO, ORPO, SORTING_VARIANTS, LossOptions, SimPO
from fastpref.losses import (
    PairLogps,
    PreferenceLoss,
    RowLogps,
    cpo_loss,
    dpo_loss,
    kto_kl,
    kto_loss,
    orpo_loss,
    pair_loss,
    simpo_loss,
)
from fastpref.losses.pairs import _log1mexp
from tests.support.losses import OF_A_DIFFERENCE, PAIR_LOSSES, dpo, smoothing, sorts
from tests.support.pair_losses import (
    DIVERGENCES,
    EVERY_DTYPE,
    EVERY_LOSS,
    PER_PAIR,
    Truth,
    exact,
    exact_lengths,
    exact_nll,
    exact_ratios,
    gradients,
    leaves,
    make_pairs,
    mean,
    naive_cpo,
    naive_dpo,
    naive_kto,
    naive_orpo,
    naive_simpo,
    of_averages,
    of_ratios,
    part,
    squared,
    truth,
)

# --- 1. The formulas. ---------------------------------------------------------------------------------------------

SMALL_RATIOS = (0.0, 1e-3, -0.5, 2.7, -7.3, 17.0, -19.0)
RATIOS = (*SMALL_RATIOS, 300.0, -300.0)
LENGTHS = ((1, 1), (7, 3), (12, 1000))


VARIANTS: list[tuple[Any, float]] = [
    *((variant, 0.0) for variant in PER_PAIR if variant != "exo_pair"),
    *((variant, eps) for variant in ("sigmoid", "exo_pair", "robust") for eps in (1e-3, 0.3)),
]
DPO_CASES = [
    *(("reverse_kl", DPO(variants=(v,), beta=b, label_smoothing=eps)) for v, eps in VARIANTS for b in (0.1, 0.7)),
    *(("reverse_kl", DPO(variants=("discopop",), discopop_tau=tau)) for tau in (0.05, 1.0, 2.0)),
    *((name, dpo(v, beta=0.3, **DIVERGENCES[name])) for name in DIVERGENCES if name != "reverse_kl" for v in PER_PAIR),
]


@EVERY_DTYPE
@pytest.mark.parametrize(("name", "options"), DPO_CASES, ids=repr)
def test_dpo_is_its_formula(name: str, options: DPO, dtype: torch.dtype) -> None:
    """For a single pair, every variant equals the formula of its paper, up to a few units of rounding.

    A divergence replaces the ratio in the variants of a difference, and does not change the others.
    """
    variant = options.variants[0]
    formula = naive_dpo(variant, name if variant in OF_A_DIFFERENCE else "reverse_kl", options.discopop_tau)
    table = squared(RATIOS if name == "reverse_kl" else SMALL_RATIOS)
    pairs = of_ratios(table, dtype, [LENGTHS[i % len(LENGTHS)] for i in range(len(table))])
    for i, (ratio, lengths) in enumerate(zip(exact_ratios(pairs), exact_lengths(pairs))):
        loss = dpo_loss(part(pairs, [i]), options).loss
        truth(formula, *ratio, *lengths, options.beta, options.label_smoothing).meets(loss)


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
    """The loss is Σ weight · mean(variant); pairs are weighted in every variant except sft, a mean over all tokens."""
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
    """ORPO is the chosen completions' mean negative log-likelihood minus β·logσ of the log odds ratio."""
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
    """SimPO is smoothed −logσ of (β times the difference of mean log-probabilities minus the margin), plus the NLL."""
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
    """CPO is a loss of β times the difference of log-probabilities (for ipo, per token), plus the NLL."""
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
    """KTO is w·(1 − σ(±β(ratio − KL))); without KL the baseline is 0 whatever is passed."""
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
    """In float64 the gradients equal finite differences of the loss, also with weighted pairs."""
    pairs = make_pairs(5, seed=1, spread=2.0, weighted=not sorts(options))

    def loss(chosen: Tensor, rejected: Tensor, nll: Tensor) -> Tensor:
        return pair_loss(replace(pairs, chosen=chosen, rejected=rejected, nll=nll), options).loss

    assert torch.autograd.gradcheck(loss, leaves(pairs), atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize(
    "options", [KTO(), KTO(kl="none", desirable_weight=0.0), KTO(beta=1.0, undesirable_weight=2.0)]
)
def test_kto_gradients_are_differences(options: KTO) -> None:
    """In float64 the gradients of KTO equal finite differences of the loss."""
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


def assert_finite(output: PreferenceLoss, inputs: Sequence[Tensor]) -> None:
    assert output.loss.isfinite(), output.loss
    for tensor in (*gradients(output.loss, inputs), output.chosen_rewards, output.rejected_rewards):
        assert tensor.isfinite().all(), tensor
    for total, count in output.extra.values():
        assert total.isfinite()
        assert count > 0


@pytest.mark.parametrize("size", [1e4, 79.0])
@pytest.mark.parametrize("name", [name for name, options in PAIR_LOSSES.items() if options.uses_reference])
def test_far_from_the_reference_all_is_finite(name: str, size: float) -> None:
    """At ratios of ±1e4, and near the overflow of exponentials, float32 losses and gradients are finite."""
    options = PAIR_LOSSES[name]
    table = list(itertools.product(squared((size, -size)), EXTREME_LENGTHS))
    pairs = of_ratios([ratios for ratios, _ in table], torch.float32, [lengths for _, lengths in table])
    assert_finite(pair_loss(pairs, options), leaves(pairs))


@EVERY_LOSS
def test_certain_and_impossible_completions_are_finite(options: LossOptions) -> None:
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
