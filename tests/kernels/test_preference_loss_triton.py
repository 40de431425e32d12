"""The preference-loss kernels compared with `fastpref.losses`, in Triton's interpreter, or on a GPU if there is one.

The truth is `fastpref.losses` in float64, differentiated by autograd, on the same float32 tokens; the yardstick is
`fastpref.losses` in float32. An error may exceed the yardstick's by some float32 roundings: those of the result, and
those of its inputs, mainly of token sums. The effect of the latter is measured by moving each group of inputs by one
rounding.
"""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from fastpref.config.losses import CPO, DPO, KTO, LossOptions
from fastpref.kernels import elementary_triton as elementary
from fastpref.kernels import preference_loss_launch as launch
from fastpref.kernels.launch import launch as launch_kernel
from fastpref.kernels.preference_loss_spec import LossSpec
from fastpref.kernels.preference_loss_variants import VARIANTS
from fastpref.losses import Totals
from tests.support.losses import CLOSED
from tests.support.losses import CLOSED_LOSSES as LOSSES
from tests.support.token_batches import Batch, Order, flat, of_values, ordinary, run, with_extras

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EVERY_LOSS = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
SHORT = ((1, 1), (7, 12), (31, 5), (4, 4))
# One loss for each structure that is compiled in: variants, score, means, weights of tokens and pairs, prompts, rows.
STRUCTURES = (
    "dpo sigmoid", "dpo most variants", "dpo other order", "dpo length", "dpo wpo", "dpo all at once",
    "dpo ipo alpha 2", "ipo", "orpo", "orpo, prompts", "simpo, all options", "cpo hinge", "cpo ipo, alpha", "kto",
)  # fmt: skip
EVERY_STRUCTURE = pytest.mark.parametrize("loss", [LOSSES[name] for name in STRUCTURES], ids=STRUCTURES)
EPS32, EPS64 = torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps
TINY = torch.finfo(torch.float32).tiny
FEW = 8  # roundings that may be worse for the kernels than for the yardstick


def ours(batch: Batch, loss: LossOptions, **keywords) -> dict[str, Tensor]:
    return flat(run(batch, loss, "triton", device=DEVICE, **keywords))


def exact(batch: Batch, loss: LossOptions) -> dict[str, Tensor]:
    return flat(run(batch, loss, dtype=torch.float64))


def moved(batch: Batch, loss: LossOptions) -> list[Batch]:
    """Return copies of the batch, in each of which the policy's, the reference's or Σp²'s tokens of one side are
    moved by one float32 rounding."""
    results, names = [], ["logp"]
    if loss.uses_reference:
        names.append("reference")
    if isinstance(loss, DPO) and loss.weighting:
        names.append("log_sum_sq_probs")
    for name in names:
        values = getattr(batch, name).double()
        for first in range(0, len(batch.lengths), batch.pairs):
            tokens = batch.of(range(first, first + batch.pairs))
            results.append(replace(batch, **{name: torch.where(tokens, values * (1 + EPS32), values)}))
    return results


def terms(batch: Batch, loss: LossOptions) -> dict[str, Tensor]:
    """Return the sizes of the terms of the loss and of the gradient: 1 for a pair's loss and for its derivative by
    β·difference, every token's part, and every variant of a sum."""
    tokens = (exact(batch, loss)["grad"] * batch.logp).abs().sum()
    largest = 1.0 if batch.weights is None else float(batch.weights.max())
    results = {"loss": 1 + tokens, "grad": torch.full_like(batch.logp, largest * loss.beta / batch.pairs)}
    if isinstance(loss, DPO) and len(loss.variants) > 1:
        weights = loss.weights or (1.0,) * len(loss.variants)
        for variant, weight in zip(loss.variants, weights, strict=True):
            one = replace(loss, variants=(variant,), weights=(weight,))
            part = exact(replace(batch, margins=None) if one.no_margins else batch, one)
            results = {name: results[name] + part[name].abs() for name in results}
    return results


def bounds(batch: Batch, loss: LossOptions) -> dict[str, tuple[Tensor, Tensor]]:
    """Return for each name the truth, and how far a result may be from it."""
    truth, yardstick = exact(batch, loss), flat(run(batch, loss))
    others, added = [exact(other, loss) for other in moved(batch, loss)], terms(batch, loss)
    results = {}
    for name, value in truth.items():
        value = value.double()
        inputs = torch.stack([(other[name].double() - value).abs() for other in others]).sum(0)
        allowed = FEW * (EPS32 * (value.abs() + added.get(name, 0.0)) + inputs) + TINY
        # autograd computes the derivative of expm1 as its value plus 1, and so loses what is below a rounding of 1
        allowed = allowed + EPS64 * value.abs().sum()
        error = (yardstick[name].double() - value).abs()
        results[name] = (value, error + allowed)
    return results


def check(results: dict[str, Tensor], allowed: dict[str, tuple[Tensor, Tensor]]) -> None:
    assert results.keys() == allowed.keys()
    for name, (truth, bound) in allowed.items():
        value = results[name].double()
        assert value.shape == truth.shape, name
        assert value.isfinite().all(), name
        excess = (value - truth).abs() - bound
        assert (excess <= 0).all(), f"{name}: {float(excess.max()):.3g} over its bound"


# --- accuracy ---------------------------------------------------------------------------------------------------------


@EVERY_LOSS
def test_accuracy(loss: LossOptions) -> None:
    """For every loss, each field and token gradient is as near to the truth as torch in float32, up to rounding."""
    batch = ordinary(loss)
    check(ours(batch, loss), bounds(batch, loss))


@EVERY_LOSS
def test_accuracy_with_weights_and_margins(loss: LossOptions) -> None:
    """Weights of examples and, where a loss takes them, margins give results as accurate, and other ones."""
    batch = with_extras(ordinary(loss), loss)
    results = ours(batch, loss)
    check(results, bounds(batch, loss))
    assert not torch.equal(results["loss"], ours(ordinary(loss), loss)["loss"])


@pytest.mark.parametrize("order", ["padded", "shuffled"])
@pytest.mark.parametrize("name", ["dpo all at once", "dpo length", "orpo, prompts", "simpo, all options", "kto"])
def test_sequences_lie_in_any_order(name: str, order: Order) -> None:
    """Results are as accurate if the tokens of the sequences are padded or in any order."""
    loss = LOSSES[name]
    batch = ordinary(loss, order=order)
    assert not torch.equal(batch.segments, ordinary(loss).segments)
    check(ours(batch, loss), bounds(batch, loss))


@EVERY_LOSS
def test_the_rule_is_sharp(loss: LossOptions) -> None:
    """The bounds are small compared with the values: a β that is wrong by 1e-3 exceeds them."""
    batch = ordinary(loss, SHORT)
    allowed = bounds(batch, loss)
    for name in ("loss", "grad"):
        truth, bound = allowed[name]
        assert truth.abs().max() > 0
        assert bound.max() <= 5e-4 * truth.abs().max(), name
    assert loss.beta >= 0
    other = replace(loss, beta=loss.beta * 1.001 + 1e-3 * (loss.beta == 0))
    if not (isinstance(loss, DPO) and loss.variants == ("sft",)):  # sft uses β only for its rewards
        with pytest.raises(AssertionError, match=r"^(loss|grad): .* over its bound"):
            check(ours(batch, other), allowed)


@EVERY_STRUCTURE
@pytest.mark.parametrize("lengths", [((1, 1),), ((512, 513),), ((257, 1),)], ids=str)
def test_one_pair(loss: LossOptions, lengths: tuple[tuple[int, int], ...]) -> None:
    """Results are accurate for a single pair: of one token, of more than a block, and of unequal lengths."""
    batch = ordinary(loss, lengths, seed=3)
    check(ours(batch, loss), bounds(batch, loss))


@EVERY_LOSS
def test_equal_completions(loss: LossOptions) -> None:
    """Results are accurate for equal completions and, with a reference, for a policy that equals it."""
    value = 0.0 if loss.uses_reference else -0.625
    batch = of_values(loss, [(value, value)] * 3, [(1, 1), (4, 4), (31, 31)])
    check(ours(batch, loss), bounds(batch, loss))


RATIOS = (1e4, -1e4, 79.0, -79.0, 1e-6, -1e-6)
AVERAGES = (0.0, -1e-7, -1e-20, -0.6931, -0.6932, -30.0, -1e4)


@EVERY_LOSS
def test_accuracy_at_the_extremes(loss: LossOptions) -> None:
    """Results are accurate for log-ratios of ±1e4, of ±79 (near the overflow of exponentials) and of ±1e-6, and for
    mean log-probabilities from certain to impossible: all of them at once, and some pairs alone, so that no loss
    hides another."""
    values = RATIOS if loss.uses_reference else AVERAGES
    pairs = list(itertools.product(values, values))
    batch = of_values(loss, pairs, [(1, 1), (3, 3), (1, 1)] * (len(pairs) // 3) + [(3, 3)] * (len(pairs) % 3))
    check(ours(batch, loss), bounds(batch, loss))
    for pair in zip(values, [values[-1], *values]):
        alone = of_values(loss, [pair], [(31, 1)])
        check(ours(alone, loss), bounds(alone, loss))


@pytest.mark.parametrize("side", [0.999, 1.001])
@pytest.mark.parametrize("loss", [DPO(variants=("hinge",)), CPO(variant="hinge", sft_weight=0.0)], ids=["dpo", "cpo"])
def test_beside_the_kink_of_the_hinge(loss: LossOptions, side: float) -> None:
    """If β·difference is just below 1, the gradient is whole; just above 1, it is zero."""
    values = (side / 0.1, 0.0) if loss.uses_reference else (-1.0, -1.0 - side / 0.1)
    batch = of_values(loss, [values], [(1, 1)])
    results = ours(batch, loss)
    check(results, bounds(batch, loss))
    torch.testing.assert_close(results["grad"].abs(), torch.full((2,), 0.1 if side < 1 else 0.0))


@pytest.mark.parametrize("kl", [0.0, 0.7, 1e4])
def test_kto_leaves_mismatched_rows_alone(kl: float) -> None:
    """Mismatched rows do not change KTO, and their tokens' coefficients are 0."""
    loss = KTO()
    both = ordinary(loss, order="tree")
    rows = both.of(range(both.pairs))
    of_rows = {name: getattr(both, name)[rows] for name in ("logp", "reference", "segments")}
    alone = replace(both, lengths=both.lengths[: both.pairs], **of_rows)
    results, expected = ours(both, loss, kl=kl), ours(alone, loss, kl=kl)
    assert torch.equal(results["grad"][rows], expected.pop("grad"))
    assert torch.equal(results.pop("grad")[~rows], torch.zeros(int((~rows).sum())))
    assert results.keys() == expected.keys()
    assert all(torch.equal(results[name], expected[name]) for name in results)
    torch.testing.assert_close(results["loss"], flat(run(both, loss, kl=kl))["loss"])


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast:RuntimeWarning")
@EVERY_LOSS
def test_nan_reaches_the_loss(loss: LossOptions) -> None:
    """A NaN among the tokens makes the loss NaN, so that the trainer detects it."""
    batch = ordinary(loss, [(3, 2), (4, 5)])
    logp = batch.logp.clone()
    logp[batch.of([0])] = float("nan")
    broken = replace(batch, logp=logp)
    assert flat(run(broken, loss))["loss"].isnan()
    assert ours(broken, loss)["loss"].isnan()


# --- how it is computed -----------------------------------------------------------------------------------------------


@EVERY_STRUCTURE
def test_parts_add_up_to_the_step(loss: LossOptions) -> None:
    """However a step is cut, its parts' losses sum to that of the whole, and their gradients are its gradients."""
    whole = with_extras(ordinary(loss, order="shuffled"), loss)
    expected = ours(whole, loss)
    scored = int(whole.lengths[: whole.pairs].sum() + whole.lengths[2 * whole.pairs :].sum())
    loss_so_far, grad = torch.zeros(()), torch.full_like(whole.logp, float("nan"))
    for pairs in ([4], [1, 0], [2, 5, 3]):
        part, tokens = cut(whole, pairs)
        results = ours(part, loss, totals=Totals(whole.pairs, scored))
        loss_so_far += results["loss"]
        grad[tokens] = results["grad"]
    torch.testing.assert_close(loss_so_far, expected["loss"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad, expected["grad"], rtol=1e-6, atol=0)


def cut(batch: Batch, pairs: list[int]) -> tuple[Batch, Tensor]:
    """Return a batch of some pairs, and a mask of their tokens in the whole batch."""
    sequences = [first + pair for first in range(0, len(batch.lengths), batch.pairs) for pair in pairs]
    tokens = batch.of(sequences)
    number = torch.full_like(batch.lengths, -1)
    number[sequences] = torch.arange(len(sequences))
    of_tokens = {name: getattr(batch, name)[tokens] for name in ("logp", "reference", "log_sum_sq_probs")}
    segments, lengths = number[batch.segments[tokens]], batch.lengths[sequences]
    extras = {"weights": batch.weights, "margins": batch.margins}
    of_pairs = {name: values[pairs] for name, values in extras.items() if values is not None}
    return Batch(segments=segments, lengths=lengths, labels=batch.labels[pairs], **of_tokens, **of_pairs), tokens


@EVERY_STRUCTURE
def test_results_repeat_and_are_written_whole(loss: LossOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results repeat bit for bit, also if new memory is full of NaN."""
    batch = ordinary(loss)
    first, second = ours(batch, loss), ours(batch, loss)
    allocated, empty = [], Tensor.new_empty

    def full_of_nan(self: Tensor, *shape, **keywords) -> Tensor:
        allocated.append(shape)
        return empty(self, *shape, **keywords).fill_(float("nan") if self.is_floating_point() else -1)

    monkeypatch.setattr(Tensor, "new_empty", full_of_nan)
    third = ours(batch, loss)
    assert len(allocated) >= 3
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
        assert torch.equal(value, third[name]), name


def test_what_is_not_float32_or_not_contiguous() -> None:
    """Strided tokens, and a reference of another dtype, give the results of contiguous float32 ones."""
    loss = DPO(weighting=True)
    batch = ordinary(loss)
    values = {name: getattr(batch, name) for name in ("logp", "reference", "log_sum_sq_probs")}
    strided = replace(batch, **{name: torch.stack([value, value], 1)[:, 0] for name, value in values.items()})
    assert not strided.logp.is_contiguous()
    expected = ours(batch, loss)
    for other in (strided, replace(batch, reference=batch.reference.double())):
        results = ours(other, loss)
        assert all(torch.equal(results[name], expected[name]) for name in expected)


# --- elementary functions ---------------------------------------------------------------------------------------------


@triton.jit
def _map_kernel(p_x, p_y, n, FUNCTION: tl.constexpr):
    i = tl.program_id(0) * 256 + tl.arange(0, 256)
    x = tl.load(p_x + i, mask=i < n, other=0.0)
    if FUNCTION == 0:
        y = elementary.exp(x)
    elif FUNCTION == 1:
        y = elementary.expm1(x)
    elif FUNCTION == 2:
        y = elementary.log1p(x)
    else:
        a, b, c, d = elementary.logistic(x)  # pyright: ignore[reportGeneralTypeIssues]
        y = a if FUNCTION == 3 else (b if FUNCTION == 4 else (c if FUNCTION == 5 else d))
    tl.store(p_y + i, y, mask=i < n)


def _map(function: Any, x: Tensor, y: Tensor) -> None:
    launch_kernel(_map_kernel, (triton.cdiv(len(x), 256),), x, y, len(x), FUNCTION=function)


def spread(low: float, high: float) -> Tensor:
    """Return values all over [low, high], and others that approach 0 from both sides."""
    near = torch.logspace(-30, 2, 500)
    values = torch.cat([torch.linspace(low, high, 3001), near, -near, torch.zeros(1)])
    return values[(values >= low) & (values <= high)]


FUNCTIONS = {
    "exp": (0, torch.exp, spread(-87, 88)),
    "expm1": (1, torch.expm1, spread(-100, 88)),
    "log1p": (2, torch.log1p, spread(-0.5, 1)),
    "−logσ(x)": (3, lambda x: -torch.nn.functional.logsigmoid(x), spread(-1e4, 80)),
    "−logσ(−x)": (4, lambda x: -torch.nn.functional.logsigmoid(-x), spread(-80, 1e4)),
    "σ(x)": (5, torch.sigmoid, spread(-80, 1e4)),
    "σ(−x)": (6, lambda x: torch.sigmoid(-x), spread(-1e4, 80)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_elementary_functions(name: str) -> None:
    """exp, expm1, log1p and the logistic functions are right up to four float32 roundings, over their whole range."""
    number, truth, x = FUNCTIONS[name]
    y = torch.full_like(x, float("nan"), device=DEVICE)
    _map(number, x.to(DEVICE), y)
    expected = truth(x.double())
    assert len(x) > 3000
    assert ((y.cpu().double() - expected).abs() <= 4 * EPS32 * expected.abs()).all()


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast:RuntimeWarning")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_elementary_functions_let_nan_through(name: str) -> None:
    y = torch.zeros(1, device=DEVICE)
    _map(FUNCTIONS[name][0], torch.tensor([float("nan")], device=DEVICE), y)
    assert y.isnan().all()


# --- what is compiled -------------------------------------------------------------------------------------------------


def test_a_spec_says_what_the_kernels_read() -> None:
    """A spec's flags are the kernel's constants, and its numbers are the values that the kernel loads."""
    spec = LossSpec(("hinge", "odds_ratio"), (0.5, 2.0), beta=0.25, label_smoothing=0.125, supervised=3.0, prompts=True)
    flags, numbers = spec.flags(), spec.numbers()
    assert (flags.HAS_PROMPTS, flags.HAS_REFERENCE) == (1, 0)
    assert set(flags._fields) | {"VARIANTS", "HAS_WEIGHTS", "HAS_MARGINS", "BLOCK"} == {
        n for n in launch.kernel_of({"VARIANTS": ()}).arg_names if n.isupper()
    }
    assert (numbers.beta, numbers.half_inverse_beta, numbers.unflipped, numbers.supervised) == (0.25, 2.0, 0.75, 3.0)


def test_the_table_is_all_that_a_variant_needs() -> None:
    """The table has every loss of pairs that does not sort, under its option's name, and a kernel takes any of them."""
    named = {*CLOSED, "odds_ratio"} - {"sft"}
    assert set(VARIANTS) == named
    compiled = [function for _, constants in launch.compile_cases() for function in constants.get("VARIANTS", ())]
    assert set(VARIANTS.values()) == set(compiled)
    batch = ordinary(DPO())
    with pytest.raises(ValueError, match="no_such_loss"):
        launch.pair_loss(
            batch.logp, batch.segments[:0], batch.lengths, None, None, None, None, {"no_such_loss": 1.0},
            LossSpec().flags(), LossSpec().numbers(), examples=None, nll_tokens=None,
        )  # fmt: skip


def test_lengths_are_not_compiled_in() -> None:
    """One kernel serves every batch of a run, because nothing that changes between batches is a compile-time value."""
    names = [name for name, _ in launch.compile_cases()]
    assert len(set(names)) == len(names) >= 5
    for _, constants in launch.compile_cases():
        kernel = launch.kernel_of(constants)
        assert constants.keys() == {name for name in kernel.arg_names if name.isupper()}
        types = {name: launch.argument_type(name, constants) for name in kernel.arg_names}
        assert {name for name, kind in types.items() if kind == "i32"} <= {"n", "pairs", "rows"}
        assert {kind for name, kind in types.items() if name.startswith("p_")} <= {"*fp32", "*i64", "*i8"}
