"""The losses of lists compared with double loops over completions, and with DPO where a list is a pair."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastpref import preference_loss
from fastpref.config.losses import DPO, KTO, PL, LiPO, LossOptions
from fastpref.losses import ListLogps, PairLogps, Totals, dpo_loss, lipo_loss, list_loss, pl_loss

F64 = torch.float64
OPTIONS = (PL(beta=0.3), LiPO(beta=0.3))
BOTH = pytest.mark.parametrize("options", OPTIONS, ids=["pl", "lipo"])
SECOND = 1 / math.log(2) - 1 / math.log(3)  # what the second rank loses of the first rank's discount
Row = Sequence[tuple[float, float]]  # the log-ratio and the score of each completion


def lists_of(rows: Sequence[Row]) -> ListLogps:
    """Return lists with these log-ratios to a reference, and numbers that must not matter where one is absent."""
    width = max(map(len, rows))
    ratios = torch.tensor([[r for r, _ in row] + [77.0] * (width - len(row)) for row in rows], dtype=F64)
    scores = torch.tensor([[s for _, s in row] + [math.nan] * (width - len(row)) for row in rows], dtype=F64)
    reference = torch.linspace(-40, -9, ratios.numel(), dtype=F64).view(ratios.shape)
    return ListLogps((reference + ratios).requires_grad_(), reference, scores)


def log_sigmoid(x: float) -> float:
    return min(x, 0.0) - math.log1p(math.exp(-abs(x)))


def naive_pl(rewards: Sequence[float], scores: Sequence[float]) -> float:
    loss = 0.0
    for r, s in zip(rewards, scores):
        loss += math.log(sum(math.exp(other - r) for other, theirs in zip(rewards, scores) if theirs <= s))
    return loss


def naive_lipo(rewards: Sequence[float], scores: Sequence[float]) -> float:
    low, high = min(scores), max(scores)
    gains = [2 ** ((s - low) / (high - low) if high > low else 0.0) - 1 for s in scores]
    ranks = [
        1 + sum(other > r or (other == r and theirs < s) for other, theirs in zip(rewards, scores))
        for r, s in zip(rewards, scores)
    ]
    loss = 0.0
    for i, j in itertools.permutations(range(len(scores)), 2):
        if scores[i] > scores[j]:
            discount = abs(1 / math.log(1 + ranks[i]) - 1 / math.log(1 + ranks[j]))
            loss -= abs(gains[i] - gains[j]) * discount * log_sigmoid(rewards[i] - rewards[j])
    return loss


def naive(options: LossOptions, rows: Sequence[Row]) -> float:
    formula = naive_pl if isinstance(options, PL) else naive_lipo
    losses = [formula([options.beta * ratio for ratio, _ in row], [score for _, score in row]) for row in rows]
    return sum(losses) / len(rows)


ROWS: dict[str, list[Row]] = {
    "one pair": [[(0.5, 2.0), (-1.5, 1.0)]],
    "four": [[(0.5, 2.0), (-1.5, 1.0), (3.0, 5.0), (2.0, 4.5)]],
    "ties": [[(0.5, 2.0), (-1.5, 2.0), (3.0, 1.0), (2.5, 1.0), (1.0, 7.0)]],
    "all tied": [[(0.5, 2.0), (-1.5, 2.0), (1.0, 2.0)]],
    "at the reference": [[(0.0, 1.0), (0.0, 3.0), (0.0, 2.0)]],
    "unequal numbers": [[(0.5, 2.0), (-1.5, 1.0)], [(1.0, -3.0), (2.0, -1.0), (0.1, -2.0)], [(4.0, 0.0)]],
    "far": [[(900.0, 1.0), (-900.0, 2.0), (0.0, 3.0)]],
}


@BOTH
@pytest.mark.parametrize("name", ROWS)
def test_a_loss_is_its_formula(options: LossOptions, name: str) -> None:
    """In float64, each loss is the double loop over the completions of every row, of any number, ties included."""
    lists = lists_of(ROWS[name])
    output = list_loss(lists, options)
    assert float(output.loss.detach()) == pytest.approx(naive(options, ROWS[name]), rel=1e-12, abs=1e-12)
    (gradient,) = torch.autograd.grad(output.loss, lists.logps)
    assert gradient.isfinite().all()
    assert (gradient[lists.scores.isnan()] == 0).all()


@BOTH
@pytest.mark.parametrize("name", ["four", "ties", "unequal numbers"])
def test_gradients(options: LossOptions, name: str) -> None:
    """The gradient is that of finite differences; LiPO's weights, which depend on ranks only, are constant nearby."""
    lists = lists_of(ROWS[name])
    assert torch.autograd.gradcheck(lambda logps: list_loss(replace(lists, logps=logps), options).loss, lists.logps)


@BOTH
def test_a_policy_that_equals_its_reference_learns(options: LossOptions) -> None:
    """Where all rewards are 0, as before the first step, the best completion becomes likelier and the worst less."""
    lists = lists_of(ROWS["at the reference"])
    (gradient,) = torch.autograd.grad(list_loss(lists, options).loss, lists.logps)
    assert gradient[0, 1] < 0 < gradient[0, 0]


number = st.floats(-20, 20, allow_nan=False)
entry = st.tuples(number, st.integers(0, 4).map(float))


@BOTH
@settings(max_examples=60, deadline=None)
@given(row=st.lists(entry, min_size=1, max_size=6, unique_by=lambda pair: pair[0]), data=st.data())
def test_the_order_of_the_completions_changes_nothing(options: LossOptions, row: Row, data: st.DataObject) -> None:
    """A row's completions in another order give the same loss, rank metric, and gradient by completion."""
    order = data.draw(st.permutations(range(len(row))))
    lists = lists_of([row])
    other = ListLogps(*(values[:, order] for values in (lists.logps, lists.ref_logps, lists.scores)))
    one, two = list_loss(lists, options), list_loss(other, options)
    torch.testing.assert_close(one.loss, two.loss)
    torch.testing.assert_close(one.extra, two.extra)
    gradients = [torch.autograd.grad(output.loss, lists.logps)[0] for output in (one, two)]
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-12, rtol=1e-9)


@settings(max_examples=60, deadline=None)
@given(pairs=st.lists(st.tuples(number, number, st.booleans()), min_size=1, max_size=5))
def test_lists_of_two_are_dpo(pairs: list[tuple[float, float, bool]]) -> None:
    """With two completions of different scores, PL is DPO's sigmoid loss in loss, gradient and rewards, and LiPO is
    DPO times the discount that the second rank loses."""
    rows = [[(c, 1.0), (r, 0.5)] if chosen_first else [(r, 0.5), (c, 1.0)] for c, r, chosen_first in pairs]
    lists, ones = lists_of(rows), torch.ones(len(rows), dtype=F64)
    best = torch.tensor([0 if first else 1 for _, _, first in pairs])
    row = torch.arange(len(rows))
    sides = [(values[row, best], values[row, 1 - best]) for values in (lists.logps, lists.ref_logps)]
    dpo = dpo_loss(PairLogps(*sides[0], ones, ones, *sides[1]), DPO(beta=0.3))
    for output, factor in ((pl_loss(lists, PL(beta=0.3)), 1.0), (lipo_loss(lists, LiPO(beta=0.3)), SECOND)):
        torch.testing.assert_close(output.loss, factor * dpo.loss)
        gradients = [torch.autograd.grad(loss, lists.logps, retain_graph=True)[0] for loss in (output.loss, dpo.loss)]
        torch.testing.assert_close(gradients[0], factor * gradients[1])
        torch.testing.assert_close(output.rewards, dpo.rewards)
        torch.testing.assert_close(output.sums, dpo.sums)


@BOTH
def test_parts_and_weights_add_up(options: LossOptions) -> None:
    """Rows of a step in several parts give the step's loss, and a weight of 2 counts a row twice."""
    rows = ROWS["unequal numbers"] + ROWS["ties"]
    weights = torch.tensor([1.0, 2.0, 1.0, 0.0], dtype=F64)
    whole = list_loss(replace(lists_of(rows), row_weights=weights), options)
    parts = [[rows[1]], [rows[0], rows[1]], [rows[2]]]
    losses = [list_loss(lists_of(part), options, Totals(len(rows))).loss for part in parts]
    torch.testing.assert_close(whole.loss, torch.stack(losses).sum())


def test_scores_count_by_their_place_between_the_row_s_extremes() -> None:
    """LiPO does not change if a row's scores are moved and scaled; PL takes only their order."""
    row = [(0.5, 1.0), (-1.0, 4.0), (2.0, 2.0)]
    moved, squared = [(r, 10 + 3 * s) for r, s in row], [(r, s**2) for r, s in row]
    plain, of_moved, of_squared = (lists_of([one]) for one in (row, moved, squared))
    torch.testing.assert_close(lipo_loss(plain).loss, lipo_loss(of_moved).loss)
    assert not torch.isclose(lipo_loss(plain).loss, lipo_loss(of_squared).loss)
    assert torch.equal(pl_loss(plain).loss, pl_loss(of_squared).loss)


@pytest.mark.parametrize(
    ("row", "tau"),
    [
        ([(3.0, 3.0), (2.0, 2.0), (1.0, 1.0)], 1.0),
        ([(1.0, 3.0), (2.0, 2.0), (3.0, 1.0)], -1.0),
        ([(3.0, 3.0), (1.0, 2.0), (2.0, 1.0)], 1 / 3),
        ([(3.0, 2.0), (1.0, 2.0), (2.0, 1.0)], 0.0),  # the tie of scores is no pair
        ([(0.0, 3.0), (0.0, 2.0)], 0.0),
    ],
)
def test_what_is_logged(row: Row, tau: float) -> None:
    """Kendall's τ counts the pairs of different scores; sums and rewards are those of the best and the worst."""
    lists = lists_of([row, [(5.0, 1.0), (4.0, 1.0)]])  # the second row has no τ
    output = pl_loss(lists, PL(beta=0.5))
    total, count = output.extra["rewards/kendall_tau"]
    assert (float(total), int(count)) == (pytest.approx(tau), 1)
    best, worst = max(row, key=lambda one: one[1]), min(row, key=lambda one: one[1])
    assert output.rewards[::2].tolist() == pytest.approx([0.5 * best[0], 0.5 * worst[0]])
    assert output.sequences is not None
    assert output.sums.tolist() == pytest.approx(lists.logps.T.flatten()[output.sequences].tolist())
    tensors = [output.sums, output.rewards, total]
    assert not any(tensor.requires_grad for tensor in tensors)


@BOTH
def test_tokens_of_lists(options: LossOptions) -> None:
    """`preference_loss` adds up the tokens of sequence k·R + r as completion k of row r, empty where one is absent."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([3, 1, 2, 5, 4, 0])  # two rows of three completions; the last of the second is absent
    scores = torch.tensor([[1.0, 2.0, 0.5], [3.0, 2.0, math.nan]])
    segments = torch.repeat_interleave(torch.arange(6), lengths)
    logp, reference = (-torch.rand(15, generator=generator, dtype=F64) for _ in range(2))
    logp.requires_grad_()
    weights = torch.tensor([0.5, 2.0])
    output = preference_loss(
        logp, segments, lengths, options, reference=reference, scores=scores, weights=weights, totals=Totals(3)
    )

    def sums(values: Tensor) -> Tensor:
        return torch.stack([torch.stack([values[segments == 2 * k + r].sum() for k in range(3)]) for r in range(2)])

    lists = ListLogps(sums(logp), sums(reference), scores.double(), weights.double())
    expected = list_loss(lists, options, Totals(3))
    torch.testing.assert_close(output.loss, expected.loss)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logp)[0] for loss in (output.loss, expected.loss)))


def test_other_losses_are_refused() -> None:
    """A loss of pairs or of single completions is none of lists."""
    for options in (DPO(), KTO()):
        with pytest.raises(TypeError, match=type(options).__name__):
            list_loss(lists_of(ROWS["four"]), options)
