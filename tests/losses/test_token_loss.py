"""`preference_loss`: the torch backend compared with written-out sums, its arguments, and torch's tracers."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastpref
from fastpref import preference_loss
from fastpref.config.losses import CPO, DPO, IPO, KTO, ORPO, PL, LiPO, LossOptions, SimPO
from fastpref.losses import PairLogps, RowLogps, Totals, WholeStep, kto_loss, pair_loss, wpo_weights
from fastpref.losses.fused import fused_loss, kernel_spec, takes_triton
from fastpref.losses.token_loss import pair_logps, scores_prompts, sequence_sums
from tests.support.losses import CLOSED_LOSSES as LOSSES
from tests.support.token_batches import Batch, flat, needs_prompts, ordinary, run, with_extras

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EVERY_LOSS = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
SORTING = DPO(variants=("sigmoid", "aot", "aot_unpaired"))
TRACED = ("dpo all at once", "orpo, prompts", "simpo, all options", "kto")


def by_hand(batch: Batch, loss: LossOptions) -> tuple[Tensor, Tensor]:
    """Compute the loss and its gradient, sequence by sequence in float64."""
    logp = batch.logp.double().requires_grad_()
    shorter = torch.minimum(batch.lengths[: batch.pairs], batch.lengths[batch.pairs : 2 * batch.pairs])

    def total(values: Tensor, sequence: int, alpha: float = 1.0) -> Tensor:
        own = values[batch.segments == sequence]
        weights = [1.0 if at < shorter[sequence % batch.pairs] else alpha for at in range(len(own))]
        return (own * torch.tensor(weights)).sum()

    def totals(values: Tensor, first: int, alpha: float = 1.0) -> Tensor:
        return torch.stack([total(values, first * batch.pairs + p, alpha) for p in range(batch.pairs)])

    reference, lengths = batch.reference.double(), batch.lengths.double().split(batch.pairs)
    if isinstance(loss, KTO):
        weights = None if batch.weights is None else batch.weights.double()
        rows = RowLogps(totals(logp, 0), totals(reference, 0), batch.labels, weights)
        output = kto_loss(rows, loss, torch.tensor(0.7, dtype=torch.float64))
    else:
        alpha = loss.length_alpha if isinstance(loss, DPO) else 1.0
        pairs = PairLogps(totals(logp, 0, alpha), totals(logp, 1, alpha), lengths[0], lengths[1])
        nll, scored = totals(logp, 0), lengths[0]
        if needs_prompts(loss):
            nll, scored = nll + totals(logp, 2), scored + lengths[2]
        pairs = replace(pairs, nll=nll, nll_lengths=scored)
        if loss.uses_reference:
            pairs = replace(pairs, ref_chosen=totals(reference, 0, alpha), ref_rejected=totals(reference, 1, alpha))
        if isinstance(loss, DPO) and loss.weighting:
            aligned = logp.detach() - batch.log_sum_sq_probs.double()
            weights = wpo_weights(totals(aligned, 0) / lengths[0], totals(aligned, 1) / lengths[1])
            pairs = replace(pairs, weights=weights)
        pairs = replace(pairs, pair_weights=batch.weights, margins=batch.margins)
        output = pair_loss(pairs, loss)
    return output.loss.detach(), torch.autograd.grad(output.loss, logp, materialize_grads=True)[0]


@pytest.mark.parametrize("extras", [False, True], ids=["plain", "weights and margins"])
@EVERY_LOSS
def test_tokens_are_added_up_right(loss: LossOptions, extras: bool) -> None:
    """In float64 the loss and its token gradients are those of written-out sums."""
    batch = ordinary(loss, [(1, 1), (3, 7), (9, 2)], "shuffled")
    batch = with_extras(batch, loss) if extras else batch
    found, grad = run(batch, loss, dtype=torch.float64)
    expected, expected_grad = by_hand(batch, loss)
    assert grad.abs().max() > 0
    torch.testing.assert_close(found.loss.detach(), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("loss", [DPO(), ORPO(nll_on="all"), KTO()], ids=["dpo", "orpo", "kto"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_what_is_logged(loss: LossOptions, backend: str) -> None:
    """Sums and rewards follow the completions' order, without gradient; sides are halves or given by labels."""
    batch = ordinary(loss, [(1, 1), (3, 7), (9, 2)])
    found, _ = run(batch, loss, backend, device=DEVICE)
    count = 3 if isinstance(loss, KTO) else 6
    sums = sequence_sums(batch.logp, batch.segments, len(batch.lengths))[:count]
    torch.testing.assert_close(found.sums.cpu(), sums)
    if loss.uses_reference:
        assert found.reference_sums is not None
        reference = sequence_sums(batch.reference, batch.segments, len(batch.lengths))[:count]
        torch.testing.assert_close(found.reference_sums.cpu(), reference)
        torch.testing.assert_close(found.rewards.cpu(), 0.1 * (sums - reference), rtol=1e-5, atol=1e-6)
    else:
        assert found.reference_sums is None
        torch.testing.assert_close(found.rewards.cpu(), 0.1 * sums / batch.lengths[:count])
        assert found.extra.keys() == {"nll_loss", "log_odds_ratio", "log_odds_chosen"}
        assert float(found.extra["nll_loss"][1]) == int(batch.lengths[:3].sum() + batch.lengths[6:].sum())
    chosen = torch.arange(6) < 3 if found.labels is None else batch.labels
    assert 0 < int(chosen.sum()) < count
    assert torch.equal(found.chosen_rewards, found.rewards[chosen.to(DEVICE)])
    assert torch.equal(found.rejected_rewards, found.rewards[~chosen.to(DEVICE)])
    logged = [found.sums, found.rewards, *(total for total, _ in found.extra.values())]
    assert found.loss.requires_grad
    assert not any(tensor.requires_grad for tensor in logged)


def test_sorting_variants_over_parts_of_a_step() -> None:
    """aot and aot_unpaired use torch; with the whole step's pairs, the parts of a step add up to the whole."""
    batch = ordinary(SORTING, [(2, 3), (5, 1), (4, 4)], "padded")
    whole, grad = run(batch, SORTING, "auto", dtype=torch.float64)
    reference = batch.reference.double()
    pairs = pair_logps(batch.logp.double(), batch.segments, batch.lengths, SORTING, reference=reference)
    total = torch.zeros((), dtype=torch.float64)
    for index in ([2], [0, 1]):
        sequences = torch.tensor([*index, *(3 + i for i in index)])
        tokens = torch.isin(batch.segments, sequences)
        part = replace(
            batch,
            logp=batch.logp[tokens],
            reference=batch.reference[tokens],
            segments=torch.searchsorted(sequences, batch.segments[tokens]),
            lengths=batch.lengths[sequences],
        )
        step = WholeStep(pairs, torch.tensor(index))
        found, part_grad = run(part, SORTING, dtype=torch.float64, totals=Totals(3), step=step)
        total += found.loss.detach()
        torch.testing.assert_close(part_grad, grad[tokens])
    torch.testing.assert_close(total, whole.loss.detach())
    assert not takes_triton("auto", torch.zeros(1, device=DEVICE), SORTING)
    assert not takes_triton("auto", torch.zeros(1, device=DEVICE), PL())
    with pytest.raises(ValueError, match=r"triton.*aot.*sort the whole step"):
        run(batch, SORTING, "triton", device=DEVICE)


def test_auto_takes_the_kernels_on_a_gpu_only() -> None:
    """On a CPU "auto" is torch, even if Triton's interpreter could run; the kernels do not support float64."""
    assert not takes_triton("auto", torch.zeros(1), DPO())
    assert takes_triton("triton", torch.zeros(1, device=DEVICE), DPO())
    with pytest.raises(ValueError, match=r"triton.*float64"):
        takes_triton("triton", torch.zeros(1, dtype=torch.float64, device=DEVICE), DPO())
    if DEVICE == "cuda":
        assert takes_triton("auto", torch.zeros(1, device=DEVICE), DPO())


def test_options_become_the_spec_the_kernels_read() -> None:
    """Options with the same meaning give the same spec."""
    assert kernel_spec(IPO(beta=0.3)) == kernel_spec(DPO(beta=0.3, variants=("ipo",)))
    assert kernel_spec(DPO(f_divergence="alpha", f_alpha=1.0)).score == "value"
    assert kernel_spec(DPO(f_divergence="forward_kl")) == kernel_spec(DPO(f_divergence="alpha", f_alpha=0.0))
    assert kernel_spec(SimPO(beta=3.0)).margin == 1.5
    assert kernel_spec(CPO()).supervised == 1.0
    assert scores_prompts(ORPO(nll_on="all"))
    assert not any(scores_prompts(loss) for loss in (ORPO(), DPO(), KTO()))


# --- torch's tracers --------------------------------------------------------------------------------------------------


def inputs(
    name: str, lengths: Sequence[tuple[int, int]] = ((1, 1), (3, 7), (9, 2))
) -> tuple[LossOptions, dict[str, Any]]:
    """Return a loss and the tensors that it takes, on the device."""
    loss = LOSSES[name]
    batch = ordinary(loss, lengths)
    tensors = {"logp": batch.logp, "segments": batch.segments, "lengths": batch.lengths}
    if loss.uses_reference:
        tensors["reference"] = batch.reference
    if isinstance(loss, KTO):
        tensors |= {"labels": batch.labels, "kl": torch.tensor(0.7)}
    if isinstance(loss, DPO) and loss.weighting:
        tensors["log_sum_sq_probs"] = batch.log_sum_sq_probs
    return loss, {key: tensor.to(DEVICE) for key, tensor in tensors.items()}


@pytest.mark.parametrize("name", TRACED)
def test_the_operation_is_a_good_citizen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.library.opcheck` accepts the operation: schema, autograd, fake tensors and AOT dispatch."""
    from fastpref.losses import token_loss

    calls: list[tuple] = []
    monkeypatch.setattr(token_loss, "fused_loss", lambda *arguments: calls.append(arguments) or fused_loss(*arguments))
    loss, tensors = inputs(name)
    preference_loss(loss=loss, **tensors, backend="triton")
    (arguments,) = calls
    arguments = (arguments[0].clone().requires_grad_(), *arguments[1:])
    registered: Any = fused_loss
    results = torch.library.opcheck(registered, arguments)
    assert len(results) >= 4
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", TRACED)
def test_fake_tensors_pass_through(name: str) -> None:
    """Fake tensors, used to plan memory, give the real shapes and dtypes and a backward pass."""
    loss, tensors = inputs(name)
    real = preference_loss(loss=loss, **tensors, backend="triton")
    with FakeTensorMode() as mode:
        fake: dict[str, Any] = {key: mode.from_tensor(tensor) for key, tensor in tensors.items()}
        fake["logp"].requires_grad_()
        found = preference_loss(loss=loss, backend="triton", **fake)
        found.loss.backward()
        assert fake["logp"].grad is not None
        assert fake["logp"].grad.shape == tensors["logp"].shape
    for name in ("loss", "sums", "reference_sums", "rewards"):
        theirs, ours = getattr(found, name), getattr(real, name)
        assert (theirs is None) == (ours is None)
        assert ours is None or (theirs.shape, theirs.dtype) == (ours.shape, ours.dtype)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", TRACED)
def test_compiles_in_one_graph(name: str, compiler: str) -> None:
    """`torch.compile(fullgraph=True)` gives the same loss and gradient, for batches of different lengths."""
    torch.compiler.reset()

    @torch.compile(fullgraph=True, backend=compiler, dynamic=True)
    def step(tensors: dict[str, Any], loss: LossOptions) -> tuple[Tensor, Tensor]:
        found = preference_loss(loss=loss, backend="triton", **tensors)
        return found.loss * 2, found.rewards

    for lengths in (((1, 1), (3, 7), (9, 2)), ((2, 5), (4, 4), (1, 6), (8, 1))):
        loss, tensors = inputs(name, lengths)
        leaves = [tensors["logp"].clone().requires_grad_() for _ in range(2)]
        value, rewards = step(tensors | {"logp": leaves[0]}, loss)
        plain = preference_loss(loss=loss, backend="triton", **tensors | {"logp": leaves[1]})
        value.backward()
        (plain.loss * 2).backward()
        assert leaves[0].grad is not None
        assert leaves[1].grad is not None
        assert leaves[0].grad.abs().max() > 0
        torch.testing.assert_close(value, plain.loss * 2)
        torch.testing.assert_close(rewards, plain.rewards)
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad)


def test_there_is_no_second_derivative() -> None:
    """A second derivative raises an error instead of being ignored, because the coefficients have no gradient."""
    loss, tensors = inputs("simpo, all options")
    leaf, factor = tensors["logp"].clone().requires_grad_(), torch.ones((), device=DEVICE, requires_grad=True)
    found = preference_loss(loss=loss, backend="triton", **tensors | {"logp": leaf})
    (grad,) = torch.autograd.grad(found.loss * factor, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()


def test_no_gradient_is_no_graph() -> None:
    """Without gradients the result has no graph and the same value."""
    loss, tensors = inputs("simpo, all options")
    with torch.no_grad():
        found = preference_loss(loss=loss, **tensors | {"logp": tensors["logp"].clone().requires_grad_()})
    assert not found.loss.requires_grad
    torch.testing.assert_close(found.loss, preference_loss(loss=loss, **tensors, backend="torch").loss)


# --- arguments --------------------------------------------------------------------------------------------------------

GOOD: dict[str, Any] = {
    "logp": -torch.arange(1.0, 7.0),
    "segments": torch.tensor([0, 0, 2, 1, 3, 3]),
    "lengths": torch.tensor([2, 1, 1, 2]),
    "loss": DPO(),
    "reference": -torch.ones(6),
}
EXTRAS = {"weights": torch.tensor([1.0, 2.0]), "margins": torch.tensor([0.5, 0.0])}
LIST_GOOD = GOOD | {"loss": PL(), "scores": torch.tensor([[2.0, 1.0], [0.0, 3.0]])}
KTO_GOOD = GOOD | {"loss": KTO(), "labels": torch.tensor([True, False])}
ORPO_GOOD = {name: value for name, value in GOOD.items() if name != "reference"} | {"loss": ORPO()}
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "logp a list": (GOOD | {"logp": [1.0]}, TypeError, "logp must be a torch.Tensor, got list"),
    "logp half": (GOOD | {"logp": torch.zeros(6).half()}, TypeError, "logp must be .*float32.*float16"),
    "logp flat": (GOOD | {"logp": torch.zeros(2, 3)}, ValueError, r"logp must have 1 dimension, got shape \(2, 3\)"),
    "segments short": (GOOD | {"segments": torch.zeros(5).long()}, ValueError, "segments has 5 entries, logp has 6"),
    "segments int32": (GOOD | {"segments": GOOD["segments"].int()}, TypeError, "segments must be torch.int64"),
    "segments too high": (GOOD | {"segments": torch.tensor([0, 0, 2, 1, 3, 4])}, ValueError, "segments holds 4"),
    "segments negative": (GOOD | {"segments": torch.tensor([0, 0, 2, 1, 3, -1])}, ValueError, "segments holds -1"),
    "segments torn": (
        GOOD | {"segments": torch.tensor([0, 3, 2, 1, 3, 0])}, ValueError, "sequence [03] do not lie together",
    ),
    "lengths float": (GOOD | {"lengths": torch.ones(4)}, TypeError, "lengths must be torch.int64, got torch.float32"),
    "lengths wrong": (
        GOOD | {"lengths": torch.tensor([2, 2, 1, 1])}, ValueError, r"lengths\[1\] is 2, segments holds 1 1 times",
    ),
    "lengths odd": (GOOD | {"lengths": torch.tensor([2, 2, 2])}, ValueError, "3 entries.*as many chosen and rejected"),
    "no lengths": (GOOD | {"lengths": torch.zeros(0).long()}, ValueError, "lengths has 0 entries"),
    "an empty completion": (
        GOOD | {"segments": torch.tensor([0, 0, 2, 2, 3, 3]), "lengths": torch.tensor([2, 0, 2, 2])},
        ValueError, r"lengths\[1\] is 0",
    ),
    "no prompts": (
        ORPO_GOOD | {"loss": ORPO(nll_on="all")}, ValueError, "4 entries.*as many chosen, rejected and prompt",
    ),
    "loss a name": (GOOD | {"loss": "dpo"}, TypeError, "loss must be options such as DPO.*got str"),
    "no reference": (GOOD | {"reference": None}, ValueError, "dpo needs reference"),
    "a reference too many": (ORPO_GOOD | {"reference": GOOD["reference"]}, ValueError, "orpo takes no reference"),
    "reference short": (GOOD | {"reference": torch.zeros(5)}, ValueError, "reference has 5 entries, logp has 6"),
    "reference int": (GOOD | {"reference": torch.zeros(6).long()}, TypeError, "reference must be of floating point"),
    "reference elsewhere": (GOOD | {"reference": torch.zeros(6, device="meta")}, ValueError, "reference is on meta"),
    "no labels": (KTO_GOOD | {"labels": None}, ValueError, "kto needs labels"),
    "labels int": (KTO_GOOD | {"labels": torch.tensor([1, 0])}, TypeError, "labels must be a torch.bool.*int64"),
    "labels too few": (KTO_GOOD | {"labels": torch.tensor([True])}, ValueError, "lengths has 4.*labels has shape"),
    "labels for pairs": (GOOD | {"labels": torch.tensor([True, False])}, ValueError, "dpo takes no labels"),
    "kl a word": (KTO_GOOD | {"kl": "batch"}, TypeError, "kl must be a number or a tensor, got 'batch'"),
    "kl a vector": (KTO_GOOD | {"kl": torch.zeros(2)}, ValueError, r"kl must be a scalar, got shape \(2,\)"),
    "kl for pairs": (GOOD | {"kl": 0.5}, ValueError, "only kto takes kl"),
    "no Σp²": (GOOD | {"loss": DPO(weighting=True)}, ValueError, "dpo needs log_sum_sq_probs"),
    "Σp² too many": (GOOD | {"log_sum_sq_probs": torch.zeros(6)}, ValueError, "dpo takes no log_sum_sq_probs"),
    "weights for aot": (
        GOOD | {"loss": DPO(variants=("aot",)), "weights": torch.ones(2)}, ValueError, "dpo takes no weights: aot sort",
    ),
    "weights short": (GOOD | {"weights": torch.ones(3)}, ValueError, "weights has 3 entries, there are 2 pairs"),
    "weights int": (GOOD | {"weights": torch.tensor([1, 2])}, TypeError, "weights must be of floating point"),
    "margins for kto": (KTO_GOOD | {"margins": torch.ones(2)}, ValueError, "kto takes no margins: a margin is between"),
    "margins for ipo": (GOOD | {"loss": IPO(), "margins": torch.ones(2)}, ValueError, "ipo takes no margins: its"),
    "margins for orpo": (ORPO_GOOD | {"margins": torch.ones(2)}, ValueError, "orpo takes no margins: it compares odds"),
    "margins for lists": (LIST_GOOD | {"margins": torch.ones(2)}, ValueError, "pl takes no margins"),
    "margins square": (GOOD | {"margins": torch.ones(2, 1)}, ValueError, "margins must have 1 dimension"),
    "no scores": (GOOD | {"loss": PL()}, ValueError, "pl needs scores"),
    "scores for pairs": (GOOD | {"scores": LIST_GOOD["scores"]}, ValueError, "dpo takes no scores"),
    "scores too many": (LIST_GOOD | {"scores": torch.zeros(2, 3)}, ValueError, r"4 entries, scores has shape \(2, 3\)"),
    "scores int": (LIST_GOOD | {"scores": torch.ones(2, 2).long()}, TypeError, "scores must be of floating point"),
    "a score too few": (
        LIST_GOOD | {"scores": torch.tensor([[2.0, torch.nan], [0.0, 3.0]])}, ValueError, "2 of 1 tokens has no score",
    ),
    "lists in Triton": (LIST_GOOD | {"backend": "triton"}, ValueError, "'triton', but pl compares all completions"),
    "totals a number": (GOOD | {"totals": 4}, TypeError, "totals must be losses.Totals, got int"),
    "totals zero": (GOOD | {"totals": Totals(0)}, ValueError, "totals.examples must be above 0, got 0"),
    "step a list": (GOOD | {"step": []}, TypeError, "step must be losses.WholeStep, got list"),
    "a part that sorts": (GOOD | {"loss": SORTING, "totals": Totals(9)}, ValueError, "sort the whole step"),
    "backend": (GOOD | {"backend": "cuda"}, ValueError, "backend is 'cuda', known are auto, torch, triton"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_wrong_arguments_are_named(case: str) -> None:
    """A wrong argument is refused by name, with its value."""
    arguments, error, message = BAD[case]
    with pytest.raises(error, match=message):
        preference_loss(**arguments)


@pytest.mark.parametrize(
    "arguments",
    [GOOD, GOOD | EXTRAS, KTO_GOOD, ORPO_GOOD, LIST_GOOD, LIST_GOOD | {"loss": LiPO()}],
    ids=["dpo", "dpo, weights and margins", "kto", "orpo", "pl", "lipo"],
)
def test_right_arguments_are_taken(arguments: dict[str, Any]) -> None:
    """The arguments from which the table of wrong ones starts are accepted."""
    assert preference_loss(**arguments).loss.isfinite()


def test_it_is_public() -> None:
    """`fastpref.preference_loss` and its result type are public names."""
    assert fastpref.preference_loss is preference_loss
    assert {"preference_loss", "PreferenceLoss"} <= set(fastpref.__all__)
    found = preference_loss(**GOOD)
    assert isinstance(found, fastpref.PreferenceLoss)
    assert flat((found, torch.zeros(6)))["loss"].dim() == 0
