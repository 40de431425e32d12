"""The laws of every loss: parts add up, known values, options, and where no gradient flows."""

import itertools
import math
import random
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal, localcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpref.config.losses import CPO, DPO, IPO, KTO, ORPO, SORTING_VARIANTS, LossOptions, SimPO
from fastpref.losses import (
    PairLogps,
    RowLogps,
    Totals,
    WholeStep,
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
from fastpref.losses.pairs import _log1mexp
from tests.support.losses import sorts
from tests.support.pair_losses import (
    EVERY_DTYPE,
    EVERY_LOSS,
    Truth,
    exact,
    gradients,
    leaves,
    make_pairs,
    nls,
    of_averages,
    part,
    truth,
)

# --- 4. Parts of a step. ------------------------------------------------------------------------------------------


def random_cut(count: int, seed: int) -> list[Tensor]:
    """Return the indices of range(count), shuffled, in parts of unequal size."""
    rng = random.Random(seed)
    order = rng.sample(range(count), count)
    marks = [0, *sorted(rng.sample(range(1, count), rng.randint(1, 4))), count]
    return [torch.tensor(order[start:stop]) for start, stop in itertools.pairwise(marks)]


@EVERY_LOSS
@pytest.mark.parametrize("seed", range(4))
def test_parts_add_up_to_the_step(options: LossOptions, seed: int) -> None:
    """However a step is cut, losses, gradients and metrics of the parts sum to those of the whole step."""
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
    """Equal differences, such as those of a policy that equals its reference, are paired the same way in every part."""
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
    """However a step of KTO is cut, also into parts with one label, losses and gradients sum to those of the whole."""
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
    """At ratio 0, where training starts, every loss has its formula's value at 0."""
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


def test_simpo_and_cpo_and_orpo_of_equal_completions() -> None:
    """For two equally likely completions, SimPO is −logσ(−γ), CPO ln 2 + NLL, and ORPO NLL + β·ln 2."""
    pairs = of_averages([(-0.5, -0.5), (-2.0, -2.0)], torch.float32, [(4, 4), (6, 6)])
    nll = (0.5 * 4 + 2.0 * 6) / 10
    assert simpo_loss(pairs, SimPO(gamma=1.25)).loss.item() == pytest.approx(nls(-1.25))
    assert simpo_loss(pairs).loss.item() == pytest.approx(nls(-0.5 * 2.0))
    assert cpo_loss(pairs).loss.item() == pytest.approx(LN2 + nll)
    assert orpo_loss(pairs, ORPO(beta=0.25)).loss.item() == pytest.approx(nll + 0.25 * LN2)


def test_ipo_by_its_own_name() -> None:
    """`ipo` is bit-identical to `dpo` with the variant ipo."""
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


def test_supervised_terms_default_to_the_chosen_completion() -> None:
    """Without log-probabilities of their own, supervised terms score the chosen completions' tokens."""
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
    """Rewards are β·ratio; for ORPO and SimPO β·mean log-probability, and for CPO β·log-probability."""
    pairs = make_pairs(5)
    mirrored = replace(
        pairs, chosen=pairs.rejected, chosen_lengths=pairs.rejected_lengths, ref_chosen=pairs.ref_rejected
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
    """An option that is wrong, unknown or in conflict with another is refused by name."""
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
    """Lists and whole numbers, as in TOML and JSON, and values at the limits of their ranges are accepted."""
    options = kind(**values)
    assert all(getattr(options, name) == (tuple(v) if isinstance(v, list) else v) for name, v in values.items())


def test_what_cannot_be_computed_is_refused() -> None:
    """A loss with a reference needs the reference's log-probabilities, and KTO has no loss of pairs."""
    pairs = make_pairs(2)
    for options in (DPO(), IPO(), DPO(variants=("sft",))):
        with pytest.raises(ValueError, match="ref_chosen"):
            pair_loss(replace(pairs, ref_chosen=None), options)
    with pytest.raises(TypeError, match="KTO"):
        pair_loss(pairs, KTO())


# --- 7. Where no gradient flows. ----------------------------------------------------------------------------------


@EVERY_LOSS
def test_only_the_policy_gets_a_gradient(options: LossOptions) -> None:
    """Rewards and metrics have no gradient, and neither reference log-probabilities nor weights get one."""
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
    """KTO's KL has no gradient, neither in its estimate nor through the loss."""
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
    """log(1 − eˣ) is right up to a few units of rounding from −1e-29 to −80."""
    sizes = [10.0**power for power in range(-29, 1)] + [0.5, 0.69, math.log(2), 0.7, 2.0, 5.0, 17.0, 40.0, 80.0]
    x = -torch.tensor(sizes, dtype=dtype)
    for at, results in zip(exact(x), _log1mexp(x)):
        with localcontext(prec=80):
            value = float((1 - Decimal(at).exp()).ln())
        condition = abs(at * math.exp(at) / math.expm1(at))
        Truth(value, abs(value) + condition).meets(results, units=2)


@EVERY_DTYPE
def test_log1mexp_of_zero_is_finite(dtype: torch.dtype) -> None:
    """A certain completion has finite odds with a finite gradient, no better than those of a nearly certain one."""
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
    """Tokens within the shorter completion's length have weight 1, later ones alpha."""
    weights = length_weights(torch.tensor([0, 1, 2, 0, 1]), torch.tensor([2, 2, 2, 1, 1]), alpha)
    assert torch.equal(weights, torch.tensor(expected, dtype=torch.float32))


@EVERY_DTYPE
def test_wpo_weights(dtype: torch.dtype) -> None:
    """A pair's weight is the product of its completions' likelihoods per token, and has no gradient."""
    chosen = torch.tensor([0.0, -0.3, -2.0, 0.4, -30.0], dtype=dtype, requires_grad=True)
    rejected = torch.tensor([0.0, -1.1, -5.0, 0.2, -30.0], dtype=dtype)
    weights = wpo_weights(chosen, rejected)
    assert not weights.requires_grad
    for c, r, weight in zip(exact(chosen), exact(rejected), weights):
        truth(lambda c, r: (math.exp(c + r),), c, r).meets(weight)
