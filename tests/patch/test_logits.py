"""A `Logits` gives the results of the tensor that it replaces, or computes that tensor."""

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from fastpref.model.head import Head
from fastpref.patch.logits import Logits, Scores
from fastpref.patch.states import States
from tests.support.tiny import VOCABULARY, model_config

ROWS, WIDTH = 4, 7


@contextmanager
def around(places: int, scored: int):
    yield


def both(outputs: tuple[str, ...] = ()) -> tuple[Logits, Tensor, Tensor, Tensor]:
    """Return a stand-in, the logits that it replaces, the token ids, and a mask of those that the loss reads."""
    generator = torch.Generator().manual_seed(0)
    model = AutoModelForCausalLM.from_config(model_config("llama"), dtype=torch.float32)
    hidden = torch.randn(ROWS * WIDTH, 32, generator=generator, requires_grad=True)
    place = torch.randperm(ROWS * WIDTH, generator=generator).view(ROWS, WIDTH)
    ids = torch.randint(0, VOCABULARY, (ROWS, WIDTH), generator=generator)
    wanted = torch.rand(ROWS, WIDTH, generator=generator) > 0.4
    wanted[0, 0] = True  # no logits predict a first token
    head = Head(model)
    states = States(hidden, place, head)
    stand_in = Logits(
        Scores(states, ids, wanted, outputs, around, lambda: states), torch.arange(ROWS * WIDTH).view(ROWS, WIDTH)
    )
    return stand_in, model.lm_head(hidden)[place], ids, wanted


CUTS: dict[str, Callable[[Any], Any]] = {
    "rows": lambda x: x[:2],
    "shifted": lambda x: x[..., :-1, :],
    "shifted rows": lambda x: x[1:3, :-1, :],
    "last": lambda x: x[:, -3:],
    "flat": lambda x: x[..., :-1, :].contiguous().view(-1, x.shape[-1]),
    "flattened": lambda x: torch.flatten(x[:2, :-1], end_dim=1),
    "chunk": lambda x: x.detach().chunk(2, dim=0)[1],
    "index": lambda x: x.index_select(0, torch.tensor([2, 0])),
    "list": lambda x: x[[3, 1], ...],
    "mask": lambda x: x[torch.arange(ROWS * WIDTH).view(ROWS, WIDTH) % 3 == 0],
    "one place": lambda x: x[1, 2],
}


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_a_cut_is_the_tensors(cut: Callable[[Any], Any]) -> None:
    """Slicing a stand-in equals slicing the tensor: shape, values, mean and sum."""
    ours, theirs, *_ = both()
    part, real = cut(ours), cut(theirs)
    assert isinstance(part, Logits)
    assert (part.shape, part.dim(), part.size(-1)) == (real.shape, real.dim(), real.size(-1))
    torch.testing.assert_close(part.materialize(), real)
    torch.testing.assert_close(part.detach().mean(), real.mean(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(part.mean(-1), real.mean(-1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(part.nansum(), real.nansum(), rtol=1e-4, atol=1e-4)


OPERATIONS: dict[str, Callable[[Any], Any]] = {
    "softmax": lambda x: torch.softmax(x, -1),
    "log_softmax": lambda x: F.log_softmax(x, dim=-1),
    "times": lambda x: 2.0 * x,
    "method": lambda x: x.logsumexp(-1),
    "vocabulary": lambda x: x[..., :5],
    "wide view": lambda x: x.view(ROWS, -1),
    "mean over places": lambda x: x.mean(1),
    "maximum": lambda x: x.max(-1).values,
    "argmax": lambda x: x.argmax(-1),
    "sum cross-entropy": lambda x: F.cross_entropy(x[0], torch.arange(WIDTH), reduction="sum"),
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_anything_else_gets_the_real_logits(operation: Callable[[Any], Any]) -> None:
    """Any other operation gets the real logits, with their gradient."""
    ours, theirs, *_ = both()
    torch.testing.assert_close(operation(ours), operation(theirs))


def test_what_a_loss_asks() -> None:
    """A loss gets its log-probabilities, cross-entropy of any labels, entropy and argmax, with the right gradient."""
    ours, theirs, ids, wanted = both(("entropy", "is_top1"))
    mask, labels = wanted[:, 1:], ids[:, 1:].masked_fill(~wanted[:, 1:], 0)
    logp = theirs[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    shifted = ours[:, :-1]
    torch.testing.assert_close(shifted.logp(labels), logp * mask)
    entropy = torch.distributions.Categorical(logits=theirs[:, :-1]).entropy()
    torch.testing.assert_close(shifted.entropy() * mask, entropy * mask)
    hits = (shifted.argmax(-1) == ids[:, 1:]) & mask
    assert torch.equal(hits, (theirs[:, :-1].argmax(-1) == ids[:, 1:]) & mask)
    every = torch.nn.CrossEntropyLoss()
    results = every(shifted[:2].view(-1, VOCABULARY), ids[:2, 1:].reshape(-1))
    torch.testing.assert_close(results, -logp[:2].mean())
    weights = torch.linspace(-1, 2, mask.numel()).view(mask.shape)
    (gradient,) = torch.autograd.grad((shifted.logp(labels) * weights).sum() + results, ours.scores.states.hidden)
    expected = (logp * mask * weights).sum() - logp[:2].mean()
    assert expected.requires_grad
    hidden = ours.scores.states.hidden.detach().requires_grad_()
    real = ours.scores.states.head.module(hidden)[ours.scores.states.place][:, :-1].log_softmax(-1)
    logp = real.gather(-1, ids[:, 1:, None]).squeeze(-1)
    (theirs_gradient,) = torch.autograd.grad((logp * mask * weights).sum() - logp[:2].mean(), hidden)
    torch.testing.assert_close(gradient, theirs_gradient)


def test_other_labels_are_not_mistaken_for_the_next_tokens() -> None:
    """Labels that are not the batch's next tokens get their own log-probabilities."""
    ours, theirs, ids, _ = both()
    other = (ids[:, 1:] + 1) % VOCABULARY
    logp = theirs[:, :-1].log_softmax(-1).gather(-1, other[..., None]).squeeze(-1)
    torch.testing.assert_close(ours[:, :-1].logp(other), logp)
    results = F.cross_entropy(ours[0, :-1], other[0])
    torch.testing.assert_close(results, -logp[0].mean())
