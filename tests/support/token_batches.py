"""Batches of token log-probabilities for `preference_loss`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from fastpref import PreferenceLoss, preference_loss
from fastpref.config.losses import DPO, KTO, ORPO, LossOptions

Order = Literal["tree", "padded", "shuffled"]


@dataclass(frozen=True)
class Batch:
    """The arguments of `preference_loss` for any loss; `run` passes those that a loss needs."""

    logp: Tensor  # [N] float32
    segments: Tensor  # [N]
    lengths: Tensor  # [S]
    reference: Tensor  # [N]
    log_sum_sq_probs: Tensor  # [N]
    labels: Tensor  # [R]
    weights: Tensor | None = None  # [R]
    margins: Tensor | None = None  # [R]

    @property
    def pairs(self) -> int:
        return len(self.labels)

    def of(self, sequences: Sequence[int]) -> Tensor:
        """Return a mask of the tokens of these sequences, bool [N]."""
        return torch.isin(self.segments, torch.tensor(sequences))


def needs_prompts(loss: LossOptions) -> bool:
    return isinstance(loss, ORPO) and loss.nll_on == "all"


def in_order(lengths: Sequence[int], pairs: int, order: Order) -> Tensor:
    """Return the sequence of each token, [N]: sequence after sequence, pair after pair, or in any order."""
    places = list(range(len(lengths)))
    if order == "tree":  # a prompt comes before its completions
        places = [s for p in range(pairs) for s in (*range(2 * pairs + p, len(lengths), pairs), p, pairs + p)]
    if order == "shuffled":
        places = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(5)).tolist()
    assert sorted(places) == list(range(len(lengths)))
    return torch.cat([torch.full((lengths[s],), s) for s in places])


def ordinary(
    loss: LossOptions,
    lengths: Sequence[tuple[int, int]] = ((1, 1), (31, 257), (257, 31), (5, 4), (1100, 513), (30, 1)),
    order: Order = "tree",
    seed: int = 0,
    prompts: Sequence[int] = (0, 7, 31, 1, 600, 3),
) -> Batch:
    """Return random tokens; log-ratios of completions are a few units, whatever their lengths. KTO's rows are the
    first of each pair, and its mismatched rows the second."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [c for c, _ in lengths] + [r for _, r in lengths]
    if needs_prompts(loss):
        sizes += list(prompts)[: len(lengths)]
    segments = in_order(sizes, len(lengths), order)
    logp = -2 * torch.rand(len(segments), generator=generator)
    spread = 3 / torch.tensor(sizes, dtype=torch.float32).clamp(min=1).sqrt()
    reference = logp + torch.randn(len(segments), generator=generator) * spread[segments]
    log_sum_sq = logp + 0.5 * torch.randn(len(segments), generator=generator)
    labels = torch.rand(len(lengths), generator=generator) < 0.5
    labels[:2] = torch.tensor([True, False])[: len(labels)]
    return Batch(logp, segments, torch.tensor(sizes), reference, log_sum_sq, labels)


def with_extras(batch: Batch, loss: LossOptions) -> Batch:
    """Return a batch whose examples have weights, 0 among them, and margins, if the loss takes them."""
    numbers = torch.arange(batch.pairs)
    weights = torch.tensor([2.0, 0.5, 0.0, 1.0, 0.3])[numbers % 5]
    margins = torch.tensor([0.4, 0.0, 1.5, -0.7])[numbers % 4]
    return replace(
        batch, weights=None if loss.no_weights else weights, margins=None if loss.no_margins else margins
    )  # fmt: skip


def of_values(loss: LossOptions, values: Sequence[tuple[float, float]], lengths: Sequence[tuple[int, int]]) -> Batch:
    """Return a batch whose completions have these log-ratios to the reference or, for losses without one, these mean
    log-probabilities."""
    batch = ordinary(loss, lengths, prompts=[2] * len(lengths))
    value = torch.tensor([c for c, _ in values] + [r for _, r in values] + [-1.0] * len(values))[batch.segments]
    if not loss.uses_reference:
        return replace(batch, logp=value)
    reference = torch.full_like(value, -1.375)
    logp = reference + value / batch.lengths[batch.segments]
    return replace(batch, logp=logp, reference=reference, log_sum_sq_probs=logp + 0.25)


def run(
    batch: Batch,
    loss: LossOptions,
    backend: str = "torch",
    dtype: torch.dtype = torch.float32,
    kl: float = 0.7,
    device: str = "cpu",
    **keywords: Any,
) -> tuple[PreferenceLoss, Tensor]:
    """Return the loss and its gradient for every token."""
    logp = batch.logp.to(device, dtype, copy=True).requires_grad_()
    arguments: dict[str, Any] = {"backend": backend, **keywords}
    if loss.uses_reference:
        arguments["reference"] = batch.reference.to(device, dtype)
    if isinstance(loss, KTO):
        arguments |= {"labels": batch.labels.to(device), "kl": torch.tensor(kl, dtype=dtype, device=device)}
    if isinstance(loss, DPO) and loss.weighting:
        arguments["log_sum_sq_probs"] = batch.log_sum_sq_probs.to(device, dtype)
    extras = {"weights": batch.weights, "margins": batch.margins}
    arguments |= {name: values.to(device, dtype) for name, values in extras.items() if values is not None}
    result = preference_loss(logp, batch.segments.to(device), batch.lengths.to(device), loss, **arguments)
    result.loss.backward()
    assert logp.grad is not None
    return result, logp.grad.cpu()


def flat(answer: tuple[PreferenceLoss, Tensor]) -> dict[str, Tensor]:
    """Return every tensor of a result by its name, on the CPU."""
    loss, grad = answer
    tensors = {"loss": loss.loss, "grad": grad, "sums": loss.sums, "rewards": loss.rewards}
    tensors |= {"chosen_rewards": loss.chosen_rewards, "rejected_rewards": loss.rejected_rewards}
    if loss.reference_sums is not None:
        tensors["reference_sums"] = loss.reference_sums
    for name, (total, count) in loss.extra.items():
        tensors |= {name: total, f"{name}, counted": count}
    return {name: tensor.detach().cpu() for name, tensor in tensors.items()}
