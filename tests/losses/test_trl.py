"""The losses compared with TRL's own methods, which run on stand-ins for the trainer and the model."""

import os

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from trl import DPOTrainer, KTOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

from fastpref.config.losses import CPO, DPO, KTO, ORPO, SimPO
from fastpref.losses import (
    PairLogps,
    PreferenceLoss,
    RowLogps,
    cpo_loss,
    dpo_loss,
    kto_kl,
    kto_loss,
    length_weights,
    orpo_loss,
    simpo_loss,
    wpo_weights,
)
from tests.support.losses import OF_A_DIFFERENCE

close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-8)  # both sides round in float32, in different orders
ACCELERATOR = SimpleNamespace(device=torch.device("cpu"), gather=lambda t: t, gather_for_metrics=lambda t: t)


@dataclass
class Batch:
    """Padded completions after their prompts, laid out as by TRL's collators, with a model's outputs for them."""

    inputs: dict[str, Tensor]
    outputs: SimpleNamespace  # all [rows, T − 1]
    mask: Tensor  # bool [rows, T − 1]: which outputs belong to a completion
    offsets: Tensor  # int64 [rows, T − 1]: positions in the completion
    lengths: Tensor  # [rows]

    def sum(self, values: Tensor) -> Tensor:
        return (values * self.mask).sum(1)


def make_batch(rows: int, seed: int = 0, *, width: int = 24) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(1, 8, (rows, 1), generator=generator)
    lengths = torch.randint(1, width - 8, (rows, 1), generator=generator)
    places = torch.arange(width)
    mask = (places >= prompts) & (places < prompts + lengths)
    shifted = mask[:, 1:]
    logps = -3 * torch.rand(rows, width - 1, generator=generator) * shifted
    return Batch(
        inputs={
            "input_ids": torch.randint(0, 99, (rows, width), generator=generator),
            "attention_mask": (places < prompts + lengths).long(),
            "completion_mask": mask.long(),
        },
        outputs=SimpleNamespace(
            log_probs=logps.requires_grad_(),
            log_sum_sq_probs=-2 * torch.rand(rows, width - 1, generator=generator),
            entropy=torch.zeros(rows, width - 1),
            mean_logits=torch.zeros(rows, width - 1),
            is_top1=torch.zeros(rows, width - 1, dtype=torch.bool),
        ),
        mask=shifted,
        offsets=places[1:] - prompts,
        lengths=lengths[:, 0],
    )


def stub(**attributes: Any) -> Any:
    """Return a stand-in with what the loss reads from a trainer."""
    return SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=ACCELERATOR,
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
        **attributes,
    )


def gradients(loss: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)


def expect_same_token_gradients(batch: Batch, ours: Tensor, theirs: Tensor) -> None:
    """Compare token gradients inside the completions; TRL's need no mask, because its model returns 0 outside them."""
    (our,), (their,) = (gradients(loss, batch.outputs.log_probs) for loss in (ours, theirs))
    close(our, their * batch.mask)


def expect_rewards(output: PreferenceLoss, metrics: dict[str, Any]) -> None:
    """Compare the rewards with TRL's metrics of pairs."""
    chosen, rejected = output.chosen_rewards, output.rejected_rewards
    named = {"chosen": chosen, "rejected": rejected, "margins": chosen - rejected, "accuracies": chosen > rejected}
    for name, ours in named.items():
        theirs = metrics[f"rewards/{name}"]
        value = theirs[-1] if isinstance(theirs, list) else theirs
        assert ours.float().mean().item() == pytest.approx(value, rel=1e-5), name


# --- DPO and its relatives. ---------------------------------------------------------------------------------------

TRL_DIVERGENCES = {"js": "js_divergence", "alpha": "alpha_divergence"}


def trl_dpo(batch: Batch, references: Tensor, options: DPO) -> tuple[Tensor, dict[str, Any]]:
    trainer = stub(
        beta=options.beta,
        loss_types=list(options.variants),
        loss_weights=list(options.weights or [1.0] * len(options.variants)),
        label_smoothing=options.label_smoothing,
        f_divergence_type=TRL_DIVERGENCES.get(options.f_divergence, options.f_divergence),
        f_alpha_divergence_coef=options.f_alpha,
        ld_alpha=None if options.length_alpha == 1 else options.length_alpha,
        use_weighting=options.weighting,
        args=SimpleNamespace(discopop_tau=options.discopop_tau),
    )
    chosen, rejected = references.chunk(2)
    inputs = {**batch.inputs, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    return DPOTrainer._compute_loss(trainer, lambda **_: batch.outputs, inputs, False), trainer._metrics["train"]


def our_dpo(batch: Batch, references: Tensor, options: DPO) -> tuple[PairLogps, PreferenceLoss]:
    logps = batch.outputs.log_probs
    n_chosen, n_rejected = batch.lengths.chunk(2)
    shorter = torch.minimum(n_chosen, n_rejected).repeat(2)[:, None].expand_as(batch.offsets)
    chosen, rejected = batch.sum(logps * length_weights(batch.offsets, shorter, options.length_alpha)).chunk(2)
    aligned = batch.sum(logps - batch.outputs.log_sum_sq_probs) / batch.lengths
    weights = wpo_weights(*aligned.chunk(2)) if options.weighting else None
    supervised = {"nll": batch.sum(logps).chunk(2)[0], "nll_lengths": n_chosen}
    pairs = PairLogps(chosen, rejected, n_chosen, n_rejected, *references.chunk(2), weights=weights, **supervised)
    return pairs, dpo_loss(pairs, options)


NOT_OF_A_DIFFERENCE = ("nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down", "sft")


def _dpo(*variants: Any, **options: Any) -> DPO:
    smooth = {"exo_pair", "robust", "aot", "aot_unpaired"}.intersection(variants)  # TRL never smooths sigmoid
    return DPO(variants=variants, label_smoothing=0.1 if smooth else 0.0, **options)


DPO_CASES = [
    *(_dpo(v) for v in (*OF_A_DIFFERENCE, *NOT_OF_A_DIFFERENCE)),
    *(DPO(variants=(v,), beta=0.5) for v in ("sigmoid", "hinge", "ipo", "robust", "aot", "aot_unpaired")),
    *(_dpo(v, f_divergence=f) for v in (*OF_A_DIFFERENCE, "bco_pair", "aot") for f in ("forward_kl", "js", "alpha")),
    *(DPO(f_divergence="alpha", f_alpha=alpha) for alpha in (-1.0, 1.0, 1.7)),
    *(_dpo(v, length_alpha=alpha) for v in ("sigmoid", "ipo", "sft", "aot") for alpha in (0.0, 0.3)),
    DPO(variants=("sigmoid", "sft"), weights=(1.0, 0.2)),
    _dpo("sigmoid_norm", "sft", "aot_unpaired", "apo_down", weights=(0.8, 0.2, 1.5, -0.1), length_alpha=0.5),
]


@pytest.mark.parametrize("options", DPO_CASES, ids=repr)
def test_dpo_is_trls(options: DPO) -> None:
    """Every variant, divergence and length weight gives TRL's loss, token gradients, rewards and log-probabilities."""
    batch = make_batch(10)
    generator = torch.Generator().manual_seed(1)
    references = batch.sum(batch.outputs.log_probs.detach()) + 4 * torch.randn(10, generator=generator)
    theirs, metrics = trl_dpo(batch, references, options)
    pairs, ours = our_dpo(batch, references, options)
    close(ours.loss, theirs)
    expect_same_token_gradients(batch, ours.loss, theirs)
    expect_rewards(ours, metrics)
    assert pairs.chosen.mean().item() == pytest.approx(metrics["logps/chosen"][-1], rel=1e-5)
    assert pairs.rejected.mean().item() == pytest.approx(metrics["logps/rejected"][-1], rel=1e-5)


@pytest.mark.parametrize(
    "variant", [v for v in (*OF_A_DIFFERENCE, *NOT_OF_A_DIFFERENCE) if v not in ("aot", "aot_unpaired", "sft")]
)
def test_wpo_is_trls(variant: str) -> None:
    """Weighting multiplies the pairs of every variant as it does in TRL."""
    options = _dpo(variant, weighting=True)
    batch = make_batch(10, seed=2)
    references = batch.sum(batch.outputs.log_probs.detach()) + torch.linspace(-6, 5, 10)
    theirs, _ = trl_dpo(batch, references, options)
    _, ours = our_dpo(batch, references, options)
    close(ours.loss, theirs)
    if variant != "hinge":  # TRL scales relu's result in place, after which the backward pass fails
        expect_same_token_gradients(batch, ours.loss, theirs)


# --- ORPO, SimPO, CPO. --------------------------------------------------------------------------------------------


def some_pairs(seed: int = 3) -> PairLogps:
    generator = torch.Generator().manual_seed(seed)
    n_chosen, n_rejected, n_nll = torch.randint(1, 15, (3, 6), generator=generator)
    logps = -torch.rand(3, 6, generator=generator) * torch.stack([n_chosen, n_rejected, n_nll])
    chosen, rejected, nll = (row.clone().requires_grad_() for row in logps)
    return PairLogps(chosen, rejected, n_chosen, n_rejected, nll=nll, nll_lengths=n_nll)


def trl_reference_free(trainer_class: Any, pairs: PairLogps, average: bool, **attributes: Any) -> tuple[Tensor, dict]:
    """Return the whole loss of TRL's trainer with these results of its forward pass, and its metrics."""
    chosen, rejected = pairs.chosen, pairs.rejected
    if average:
        chosen, rejected = chosen / pairs.chosen_lengths, rejected / pairs.rejected_lengths
    logps, lengths = pairs.supervised
    logits = torch.zeros(1)
    results = (chosen, rejected, logits, logits, -logps.sum() / lengths.sum())
    trainer = stub(concatenated_forward=lambda model, batch: results, **attributes)
    for name in ("odds_ratio_loss", "cpo_loss"):
        if hasattr(trainer_class, name):
            setattr(trainer, name, partial(getattr(trainer_class, name), trainer))
    return trainer_class.get_batch_loss_metrics(trainer, None, {})


def expect_same(ours: PreferenceLoss, theirs: Tensor, metrics: dict[str, Any], pairs: PairLogps) -> None:
    close(ours.loss, theirs)
    assert pairs.nll is not None
    leaves = (pairs.chosen, pairs.rejected, pairs.nll)
    close(gradients(ours.loss, *leaves), gradients(theirs, *leaves))
    expect_rewards(ours, metrics)
    for name, (total, count) in ours.extra.items():
        assert (total / count).item() == pytest.approx(metrics[name], rel=1e-5), name


@pytest.mark.parametrize("beta", [0.0, 0.1, 1.0])
def test_orpo_is_trls(beta: float) -> None:
    """ORPO gives TRL's loss, gradients, rewards, and its nll_loss, log_odds_ratio and log_odds_chosen."""
    pairs = some_pairs()
    output = orpo_loss(pairs, ORPO(beta=beta))
    assert {"nll_loss", "log_odds_ratio", "log_odds_chosen"} == set(output.extra)
    expect_same(output, *trl_reference_free(ORPOTrainer, pairs, average=True, beta=beta), pairs)


@pytest.mark.parametrize(
    "options",
    [
        SimPO(),
        SimPO(gamma=0.0),
        SimPO(beta=2.5, gamma_beta_ratio=0.3),
        SimPO(label_smoothing=0.1, sft_weight=0.5),
        SimPO(alpha=0.25),
        SimPO(alpha=-0.5, gamma=0.1, sft_weight=1.0),
        CPO(),
        CPO(label_smoothing=0.2, sft_weight=0.0),
        CPO(beta=0.5, sft_weight=0.3, alpha=0.1),
        CPO(alpha=-0.2, label_smoothing=0.1),
        CPO(variant="hinge"),
        CPO(variant="hinge", beta=0.5, alpha=0.2),
        CPO(variant="ipo"),
        CPO(variant="ipo", beta=0.6, alpha=0.4),
    ],
    ids=repr,
)
def test_simpo_and_cpo_are_trls(options: SimPO | CPO) -> None:
    """SimPO and CPO give the loss, gradients and rewards of TRL's CPO trainer, for SimPO with loss_type = "simpo"."""
    pairs = some_pairs()
    trainer: dict[str, Any] = {"beta": options.beta, "label_smoothing": options.label_smoothing}
    trainer |= {"cpo_alpha": options.sft_weight, "alpha": options.alpha}
    if isinstance(options, SimPO):
        output, average, trainer["simpo_gamma"] = simpo_loss(pairs, options), True, options.margin
    else:
        output, average = cpo_loss(pairs, options), options.variant == "ipo"
    trainer["loss_type"] = "simpo" if isinstance(options, SimPO) else options.variant
    expect_same(output, *trl_reference_free(CPOTrainer, pairs, average, **trainer), pairs)


# --- KTO. ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [[1, 0, 1, 1, 0, 0, 1], [1] * 7, [0] * 7], ids=["both", "desirable", "undesirable"])
@pytest.mark.parametrize("shift", [0.9, -0.9])
@pytest.mark.parametrize(
    "options",
    [
        KTO(),
        KTO(beta=0.5, desirable_weight=1.33, undesirable_weight=0.8),
        KTO(desirable_weight=0.0),
        KTO(kl="none", undesirable_weight=0.5),
    ],
    ids=repr,
)
def test_kto_is_trls(options: KTO, shift: float, labels: list[int]) -> None:
    """KTO gives TRL's loss, token gradients, KL and rewards, for either sign of the estimate; "none" is apo_zero."""
    batch = make_batch(7, seed=4)
    logps, label = batch.outputs.log_probs, torch.tensor(labels, dtype=torch.bool)
    references = batch.sum(logps.detach()) + torch.linspace(-5, 6, 7)
    kl_logps = references.flip(0) * 1.1
    ref_kl_logps = kl_logps - shift
    trainer = stub(
        loss_type="kto" if options.kl == "batch" else "apo_zero_unpaired",
        calculate_KL=options.kl == "batch",
        beta=options.beta,
        desirable_weight=options.desirable_weight,
        undesirable_weight=options.undesirable_weight,
        _compute_kl_logps=lambda model, inputs: kl_logps,
    )
    inputs = {**batch.inputs, "label": label, "ref_logps": references, "ref_KL_logps": ref_kl_logps}
    theirs = KTOTrainer._compute_loss(trainer, lambda **_: batch.outputs, inputs, False)
    metrics = trainer._metrics["train"]

    kl = kto_kl(kl_logps, ref_kl_logps)
    ours = kto_loss(RowLogps(batch.sum(logps), references, label), options, kl)
    close(ours.loss, theirs)
    expect_same_token_gradients(batch, ours.loss, theirs)
    if options.kl == "batch":
        assert metrics["kl"] == [pytest.approx(kl.item(), rel=1e-5)]
    for name, rewards in (("chosen", ours.chosen_rewards), ("rejected", ours.rejected_rewards)):
        expected = [rewards.mean().item()] if len(rewards) else []
        assert metrics[f"rewards/{name}"] == pytest.approx(expected, rel=1e-5), name
