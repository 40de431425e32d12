"""The definition of a linear layer's token log-probabilities, with all logits in memory, in the inputs' own dtype.

Tests compare every faster implementation with its results in float64, and with its errors in the dtype under test.
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
    """Compute `log_softmax(z)[targets]` and the other outputs of logits z.

    z = softcap(a·(hidden·Wᵀ + b))/τ, where softcap(x) = c·tanh(x/c).
    """
    logits = torch.nn.functional.linear(hidden, weight, bias) * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return naive_logprobs(logits / temperature, targets)


def naive_logprobs(
    logits: Tensor,  # [N, V]
    targets: Tensor,  # [N] int64
) -> NaiveLogprobs:
    """Compute the outputs from given logits."""
    logps = logits.log_softmax(-1)
    probs = logps.exp()
    return NaiveLogprobs(
        logp=logps.gather(-1, targets[:, None]).squeeze(-1),
        entropy=-(probs * logps).sum(-1),
        mean_logit=logits.mean(-1),
        log_sum_sq_probs=(2 * logps).logsumexp(-1),
        is_top1=logits.argmax(-1) == targets,
    )
