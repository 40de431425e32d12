"""SFT: the mean of −logp over the tokens of a step, its gradient, its parts, and its metrics."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpref.config.losses import SFT
from fastpref.losses import Totals, sft_loss
from fastpref.losses.token_loss import preference_loss
from fastpref.step.metrics import Metrics

LENGTHS = [(1,), (3, 1, 7), (5, 5), (600, 1, 513)]


def tokens(lengths: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probabilities, their completions, and the completions' lengths."""
    count = torch.tensor(lengths)
    logp = -4 * torch.rand(int(count.sum()), generator=torch.Generator().manual_seed(len(lengths)))
    return logp.to(dtype).requires_grad_(), torch.repeat_interleave(torch.arange(len(lengths)), count), count


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weights"])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_loss_and_gradient_are_those_of_the_definition(lengths: tuple[int, ...], weighted: bool):
    """The loss is −Σ weight·logp over the number of tokens, and a token's gradient −weight over it, as in float64."""
    logp, segments, count = tokens(lengths)
    weights = torch.linspace(0.5, 2, len(lengths)) if weighted else None
    result = preference_loss(logp, segments, count, SFT(), weights=weights)
    result.loss.backward()
    factors = (torch.ones(len(lengths)) if weights is None else weights).double()[segments]
    exact = -(factors * logp.detach().double()).sum() / sum(lengths)
    assert float(result.loss.detach()) == pytest.approx(float(exact), rel=1e-6)
    assert logp.grad is not None
    torch.testing.assert_close(logp.grad.double(), -factors / sum(lengths), rtol=1e-6, atol=0)
    for at, sequence in enumerate(logp.detach().split(lengths)):
        assert float(result.sums[at]) == pytest.approx(float(sequence.sum()), rel=1e-5)
    assert len(result.rewards) == 0


def test_parts_of_a_step_add_up():
    """With the totals of the step, the losses of its parts add up to that of the whole, and so do the gradients."""
    logp, segments, count = tokens((3, 1, 7, 2))
    preference_loss(logp, segments, count, SFT()).loss.backward()
    whole, logp.grad = logp.grad, None
    parts = [(0, 2), (2, 4)]
    for first, last in parts:
        own = (segments >= first) & (segments < last)
        part = sft_loss(logp[own], segments[own] - first, count[first:last], totals=Totals(4, float(count.sum())))
        part.loss.backward()
    torch.testing.assert_close(logp.grad, whole)


def test_a_long_completion_counts_by_its_tokens():
    """The mean is over tokens, not over completions: 9 tokens of −1 and one of −2 cost 1.1, not 1.5."""
    logp = torch.tensor([-1.0] * 9 + [-2.0])
    result = preference_loss(logp, torch.tensor([0] * 9 + [1]), torch.tensor([9, 1]), SFT())
    assert float(result.loss) == pytest.approx(1.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_metrics_are_of_tokens_without_weights(dtype: torch.dtype):
    """nll_loss ignores weights, perplexity is its exponential, and there are neither rewards nor sides."""
    logp, segments, count = tokens((3, 1, 7), dtype)
    metrics = Metrics()
    metrics.imitated_completions()
    metrics.add_loss(preference_loss(logp, segments, count, SFT(), weights=torch.tensor([1.0, 3.0, 0.5])), count)
    result = metrics.result()
    nll = -float(logp.detach().mean())
    assert result.keys() == {"loss", "nll_loss", "perplexity"}
    assert result["nll_loss"] == pytest.approx(nll, rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(nll), rel=1e-5)
    assert result["loss"] != pytest.approx(nll, rel=1e-2)


def test_a_perplexity_too_large_for_a_float_is_infinite():
    """An nll of 1,000 nats does not end the run by an overflow."""
    logp, metrics = torch.full((2,), -1000.0), Metrics()
    metrics.imitated_completions()
    metrics.add_loss(preference_loss(logp, torch.zeros(2, dtype=torch.int64), torch.tensor([2]), SFT()), logp)
    assert metrics.result()["perplexity"] == math.inf


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a reference": ({"reference": torch.zeros(4)}, "sft takes no reference"),
    "labels": ({"labels": torch.tensor([True, False])}, "sft takes no labels"),
    "scores": ({"scores": torch.ones(1, 2)}, "sft takes no scores"),
    "margins": ({"margins": torch.ones(2)}, "sft takes no margins: a margin is between the two completions of a pair"),
    "too few weights": ({"weights": torch.ones(1)}, "weights has 1 entries, there are 2 completions"),
    "no completions": ({"lengths": torch.zeros(0, dtype=torch.int64)}, "there must be at least one completion"),
    "an empty completion": ({"lengths": torch.tensor([4, 0]), "segments": torch.zeros(4, dtype=torch.int64)},
                            r"lengths\[1\] is 0; a completion has at least one token"),
    "a kernel": ({"backend": "triton"}, "backend is 'triton', but sft is a sum over tokens"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_named(changes: dict[str, Any], message: str):
    """What SFT does not take is refused by name."""
    given: dict[str, Any] = {"segments": torch.tensor([0, 0, 0, 1]), "lengths": torch.tensor([3, 1])}
    with pytest.raises(ValueError, match=message):
        preference_loss(torch.zeros(4), loss=SFT(), **given | changes)
