"""The losses of the head benchmarks, for methods that only compute log-probabilities."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastpref.config.losses import LOSSES, title_of

BETA = 0.1
SIMPO_BETA, SIMPO_GAMMA = 2.0, 1.0


@dataclass(frozen=True)
class Objective:
    name: str
    uses_reference: bool = False


TOKENS = Objective("tokens")  # Σ weight·logp, which measures the head alone
DPO = Objective("dpo", uses_reference=True)
KTO = Objective("kto", uses_reference=True)
ORPO = Objective("orpo")
SIMPO = Objective("simpo")
OBJECTIVES = (TOKENS, DPO, KTO, ORPO, SIMPO)


def name_of(objective: str) -> str:
    """Return how an objective is written in tables and plots."""
    return title_of(objective) if objective in LOSSES else objective


def value(
    objective: Objective,
    logp: Tensor,  # [2P, T], 0 where nothing is scored
    reference: Tensor | None,  # the reference's logp
    scored: Tensor,  # [2P, T] bool
    token_weights: Tensor,  # [2P, T]
) -> Tensor:
    """Return the loss, a scalar. KTO's KL is taken as 0, and chosen rows as the desirable ones."""
    if objective is TOKENS:
        return (logp * token_weights).sum()
    sums, counts = logp.sum(1), scored.sum(1)
    if objective is DPO or objective is KTO:
        assert reference is not None
        better, worse = (sums - reference.sum(1)).chunk(2)
        if objective is DPO:
            return -logsigmoid(BETA * (better - worse)).mean()
        return (1 - torch.sigmoid(BETA * torch.cat([better, -worse]))).mean()
    averages = sums / counts
    better, worse = averages.chunk(2)
    if objective is SIMPO:
        return -logsigmoid(SIMPO_BETA * (better - worse) - SIMPO_GAMMA).mean()
    odds = (better - worse) - (torch.log1p(-better.exp()) - torch.log1p(-worse.exp()))
    pairs = len(sums) // 2
    return -sums[:pairs].sum() / counts[:pairs].sum() - BETA * logsigmoid(odds).mean()
