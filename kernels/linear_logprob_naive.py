"""The definition of a linear layer's token log-probabilities: every logit, in memory, in the inputs' own dtype.

The truth (in float64) and the yardstick (in the dtype under test) for every faster way of computing the same.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class NaiveLogprobs(NamedTuple):
    logp: Tensor  # [N]
    entropy: Tensor  # [N]
    mean_logit: Tensor  # [N]
    log_sum_sq_probs: Tensor  # [N]
    is_top1: Tensor  # [N] bool


def linear_logprob_naive(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    targets: Tensor,  # [N] int64
    bias: Tensor | None = None,  # [V]
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
) -> NaiveLogprobs:
    """`log_softmax(z)[targets]` and its companions, z = softcap(a·(hidden·Wᵀ + b))/τ, softcap(x) = c·tanh(x/c)."""
    logits = torch.nn.functional.linear(hidden, weight, bias) * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return naive_logprobs(logits / temperature, targets)


def naive_logprobs(
    logits: Tensor,  # [N, V]
    targets: Tensor,  # [N] int64
) -> NaiveLogprobs:
    """The same of logits that are there already."""
    logps = logits.log_softmax(-1)
    probs = logps.exp()
    return NaiveLogprobs(
        logp=logps.gather(-1, targets[:, None]).squeeze(-1),
        entropy=-(probs * logps).sum(-1),
        mean_logit=logits.mean(-1),
        log_sum_sq_probs=(2 * logps).logsumexp(-1),
        is_top1=logits.argmax(-1) == targets,
    )
