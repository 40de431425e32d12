"""The weights and margins of examples: what they do to each loss, and which losses refuse them."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from fastpref.config.losses import CPO, DPO, IPO, KTO, ORPO, LossOptions, SimPO
from fastpref.losses import PairLogps, RowLogps, Totals, kto_loss, pair_loss
from tests.support.losses import PAIR_LOSSES
from tests.support.pair_losses import Truth, exact, gradients, leaves, make_pairs, nls, part, smoothed, truth

WEIGHTED = {name: loss for name, loss in PAIR_LOSSES.items() if not loss.no_weights}
WITH_MARGINS = {name: loss for name, loss in PAIR_LOSSES.items() if not loss.no_margins}
EVERY_WEIGHTED = pytest.mark.parametrize("options", WEIGHTED.values(), ids=WEIGHTED)
EVERY_WITH_MARGINS = pytest.mark.parametrize("options", WITH_MARGINS.values(), ids=WITH_MARGINS)
F64 = torch.float64


def totals_of(pairs: PairLogps) -> Totals:
    return Totals(len(pairs.chosen), float(pairs.supervised[1].sum()))


# --- weights ------------------------------------------------------------------------------------------------------


@EVERY_WEIGHTED
def test_a_weight_counts_a_pair_so_often(options: LossOptions) -> None:
    """With the same divisors, weights of 1 change nothing, 2 counts a pair twice, 0 leaves it out, supervised terms
    included; metrics do not depend on weights."""
    pairs = make_pairs(3)
    totals = totals_of(pairs)
    plain = pair_loss(pairs, options, totals)
    ones = pair_loss(replace(pairs, pair_weights=torch.ones(3, dtype=F64)), options, totals)
    assert torch.equal(ones.loss, plain.loss)
    weighted = pair_loss(replace(pairs, pair_weights=torch.tensor([2.0, 0.0, 1.0], dtype=F64)), options, totals)
    repeated = pair_loss(part(pairs, [0, 0, 2]), options, totals)
    torch.testing.assert_close(weighted.loss, repeated.loss)
    torch.testing.assert_close(gradients(weighted.loss, leaves(pairs)), gradients(repeated.loss, leaves(pairs)))
    assert torch.equal(weighted.rewards, plain.rewards)
    assert weighted.extra == plain.extra


def test_a_weight_counts_a_row_of_kto_so_often() -> None:
    """A weight of 2 counts a row twice, and 0 leaves it out, by the KL of all rows."""
    logps, reference = torch.tensor([-1.0, -5.0, -2.5], dtype=F64), torch.tensor([-2.0, -4.0, -3.0], dtype=F64)
    labels, options = torch.tensor([True, False, True]), KTO(desirable_weight=0.7)
    rows = RowLogps(logps, reference, labels)
    weighted = kto_loss(replace(rows, row_weights=torch.tensor([2.0, 1.0, 0.0], dtype=F64)), options, 0.3)
    index = torch.tensor([0, 0, 1])
    repeated = kto_loss(RowLogps(logps[index], reference[index], labels[index]), options, 0.3)
    torch.testing.assert_close(weighted.loss, repeated.loss)
    assert torch.equal(weighted.rewards, kto_loss(rows, options, 0.3).rewards)


def test_weights_multiply_those_of_wpo() -> None:
    """WPO's weights and those of the examples multiply each other in the variants, and only the latter act on sft."""
    pairs = make_pairs(3, weighted=True)
    assert pairs.weights is not None
    weights = torch.tensor([3.0, 0.5, 1.0], dtype=F64)
    both = pair_loss(replace(pairs, pair_weights=weights), DPO()).loss
    torch.testing.assert_close(both, pair_loss(replace(pairs, weights=pairs.weights * weights), DPO()).loss)
    sft = pair_loss(replace(pairs, pair_weights=weights), DPO(variants=("sft",))).loss
    logps, lengths = pairs.supervised
    torch.testing.assert_close(sft, -(logps * weights).sum() / lengths.sum())


# --- margins ------------------------------------------------------------------------------------------------------

MARGINS = (0.0, 0.8, -0.3, 12.0)
FORMULAS: dict[str, tuple[LossOptions, Callable[[float, float, float], tuple[float, ...]]]] = {
    # of the difference of rewards and the margin, the formula; the third number is the label smoothing
    "sigmoid": (DPO(beta=0.3), lambda x, m, _: (nls(x - m),)),
    "sigmoid, smoothed": (DPO(beta=0.3, label_smoothing=0.1), lambda x, m, eps: smoothed(x - m, eps)),
    "hinge": (DPO(beta=0.3, variants=("hinge",)), lambda x, m, _: (1 + m, -x) if x < 1 + m else (0.0,)),
    "robust": (
        DPO(beta=0.3, variants=("robust",), label_smoothing=0.1),
        lambda x, m, eps: ((1 - eps) * nls(x - m) / (1 - 2 * eps), -eps * nls(m - x) / (1 - 2 * eps)),
    ),
    "simpo": (SimPO(beta=1.5, gamma=99.0), lambda x, m, _: (nls(x - m),)),
    "cpo": (CPO(beta=0.3, sft_weight=0.0), lambda x, m, _: (nls(x - m),)),
    "cpo hinge": (CPO(beta=0.3, variant="hinge", sft_weight=0.0), lambda x, m, _: (1 + m, -x) if x < 1 + m else (0.0,)),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_a_margin_is_subtracted_from_the_difference_of_rewards(name: str) -> None:
    """ODPO's offset: the difference of the rewards that are logged must exceed the margin; SimPO's γ is replaced."""
    options, formula = FORMULAS[name]
    pairs = make_pairs(len(MARGINS))
    for i, margin in enumerate(MARGINS):
        one = replace(part(pairs, [i]), margins=torch.tensor([margin], dtype=F64))
        output = pair_loss(one, options)
        difference = float(output.chosen_rewards - output.rejected_rewards)
        smoothing = getattr(options, "label_smoothing", 0.0)
        truth(formula, difference, margin, smoothing).meets(output.loss, units=64)


@EVERY_WITH_MARGINS
def test_a_loss_with_its_own_margin_as_margins_is_itself(options: LossOptions) -> None:
    """Margins that all equal the loss's own, 0 or SimPO's γ, change nothing; others change the loss."""
    pairs = make_pairs(5)
    plain = pair_loss(pairs, options).loss
    same = pair_loss(replace(pairs, margins=torch.full((5,), options.margin, dtype=F64)), options).loss
    assert torch.equal(same, plain)
    other = pair_loss(replace(pairs, margins=torch.full((5,), options.margin + 0.3, dtype=F64)), options).loss
    assert not torch.isclose(other, plain)


def test_margins_leave_the_supervised_term_alone() -> None:
    """In a sum of sigmoid and sft, a margin changes the first term only."""
    pairs = replace(make_pairs(5), margins=torch.linspace(-1, 1, 5, dtype=F64))
    both = pair_loss(pairs, DPO(variants=("sigmoid", "sft"))).loss
    sft = pair_loss(replace(pairs, margins=None), DPO(variants=("sft",))).loss
    torch.testing.assert_close(both, pair_loss(pairs, DPO()).loss + sft)


# --- what is refused ----------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[LossOptions, str, str]] = {
    "weights, aot": (DPO(variants=("sigmoid", "aot")), "weights", "aot sort"),
    "margins, ipo": (IPO(), "margins", "variant ipo"),
    "margins, orpo": (ORPO(), "margins", "odds"),
    "margins, cpo ipo": (CPO(variant="ipo"), "margins", "variant ipo"),
    "margins, sft alone": (DPO(variants=("sft",)), "margins", "variant sft"),
    **{
        f"margins, {variant}": (DPO(variants=("sigmoid", variant)), "margins", f"variant {variant}")
        for variant in (
            "ipo", "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down", "discopop",
            "sigmoid_norm",
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_loss_has_no_place_for_is_refused(name: str) -> None:
    """A weight or margin that a loss would not use raises an error that names the loss and the reason."""
    options, what, reason = REFUSED[name]
    given: dict[str, Any] = {"weights": "pair_weights", "margins": "margins"}
    pairs = replace(make_pairs(2), **{given[what]: torch.ones(2, dtype=F64)})
    with pytest.raises(ValueError, match=f"takes no .*{what}: .*{reason}"):
        pair_loss(pairs, options)


def test_exo_pair_is_the_divergence_of_the_shifted_logit() -> None:
    """exo_pair with a margin is the KL of σ(βΔ − m) from (1 − ε, ε): least where βΔ − m = log((1 − ε)/ε)."""
    options, margin = DPO(beta=0.5, variants=("exo_pair",), label_smoothing=0.1), 0.7
    least = (margin + float(torch.tensor(9.0).log())) / 0.5
    chosen = torch.tensor([least], dtype=F64, requires_grad=True)
    zero, one = torch.zeros(1, dtype=F64), torch.ones(1)
    pairs = PairLogps(chosen, zero, one, one, zero, zero, margins=torch.tensor([margin], dtype=F64))
    loss = pair_loss(pairs, options).loss
    (grad,) = torch.autograd.grad(loss, chosen)
    Truth(0.0, 1.0).meets(loss)
    assert abs(float(grad)) < 1e-6
    assert exact(chosen)[0] > 0
