"""The methods of computing a head's log-probabilities and losses, each called as its documentation says.

A method is a function from a problem and an objective to the loss, a scalar that can be differentiated. A
method raises Unsupported, with the reason that the table shows, for what it cannot compute.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import fastpref
from bench import objectives
from bench.objectives import DPO, KTO, ORPO, SIMPO, TOKENS, Objective
from bench.problems import IGNORED, Problem

TILE = 8192  # columns of the bare products' tile
TRL_CHUNK = 32768  # TRL's own default


class Unsupported(Exception):
    """A method cannot compute a case. The message is the reason."""


@dataclass(frozen=True)
class Method:
    name: str
    loss: Callable[[Problem, Objective], Tensor]
    package: str = "torch"

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.package) is not None


# --- methods that give log-probabilities ------------------------------------------------------------------------------


def by_tokens(logps: Callable[[Problem, Tensor], Tensor]) -> Callable[[Problem, Objective], Tensor]:
    """Return a loss that uses token log-probabilities [2P, T] of hidden states, 0 where nothing is scored."""

    def loss(problem: Problem, objective: Objective) -> Tensor:
        reference = None
        if objective.uses_reference:
            with torch.no_grad():
                reference = logps(problem, problem.reference_hidden)
        logp = logps(problem, problem.hidden)
        return objectives.value(objective, logp, reference, problem.scored, problem.token_weights)

    return loss


def full_logits(problem: Problem, hidden: Tensor) -> Tensor:
    """Compute all logits, then TRL's `selective_log_softmax`, as TRL up to 1.14 does, and its ORPO and CPO still."""
    from trl.trainer.utils import selective_log_softmax

    logits = capped(hidden @ problem.weight.t(), problem.softcap)
    logp = selective_log_softmax(logits, problem.labels.clamp(min=0))
    return torch.where(problem.scored, logp.float(), 0.0)


def trl_chunked(problem: Problem, hidden: Tensor) -> Tensor:
    """Compute log-probabilities as TRL 1.16's DPO and KTO do: on a GPU only of scored positions, elsewhere of all."""
    from trl.kernels import ChunkedLogProbFunction

    scored = problem.scored
    compact = hidden.device.type == "cuda"
    rows = hidden[scored] if compact else hidden.flatten(0, 1)
    targets = problem.labels[scored] if compact else problem.labels.clamp(min=0).flatten()
    logp, *_ = ChunkedLogProbFunction.apply(
        rows, problem.weight, None, targets, 1.0, TRL_CHUNK, problem.softcap, 1.0, ()
    )
    assert isinstance(logp, Tensor)
    if compact:
        return logp.new_zeros(scored.shape).masked_scatter(scored, logp)
    return logp.view(scored.shape).masked_fill(~scored, 0)


def torch_fused(problem: Problem, hidden: Tensor) -> Tensor:
    """Compute log-probabilities by torch.nn.functional.linear_cross_entropy in chunks, from torch 2.12 on."""
    if not hasattr(torch.nn.functional, "linear_cross_entropy"):
        raise Unsupported("not in this torch")
    if problem.softcap is not None:
        raise Unsupported("no softcap")
    rows, labels, options = hidden.flatten(0, 1), problem.labels.flatten(), torch.nn.LinearCrossEntropyOptions()
    losses = torch.nn.functional.linear_cross_entropy(
        rows, problem.weight, labels, reduction="none", ignore_index=IGNORED, options=options
    )
    return -losses.view(problem.labels.shape)


def cut_cross_entropy(problem: Problem, hidden: Tensor) -> Tensor:
    """Call Cut Cross-Entropy: its kernels on a GPU, elsewhere its compiled logits of the scored positions."""
    from cut_cross_entropy import linear_cross_entropy

    options = {"ignore_index": IGNORED, "softcap": problem.softcap, "reduction": "none"}
    kernels = "cce" if hidden.device.type == "cuda" else "torch_compile"
    return -linear_cross_entropy(hidden, problem.weight, problem.labels, impl=kernels, **options).float()


def unsloth(problem: Problem, hidden: Tensor) -> Tensor:
    """Call the head of Unsloth's preference losses, which scores the positions of its mask."""
    from bench.unsloth import token_logps

    labels = problem.labels.clamp(min=0)
    options = {"logit_softcapping": problem.softcap or 0.0}
    return token_logps()(hidden, problem.weight, None, labels, problem.scored, **options)["per_token_logps"]


# --- methods that give losses -----------------------------------------------------------------------------------------


def ours(problem: Problem, objective: Objective) -> Tensor:
    scored = problem.scored
    positions = scored.flatten().nonzero().squeeze(1)
    targets = problem.labels.flatten()[positions]

    def logps(hidden: Tensor) -> Tensor:
        return fastpref.linear_logprob(
            hidden.flatten(0, 1), problem.weight, targets, positions=positions, softcap=problem.softcap
        ).logp

    logp = logps(problem.hidden)
    if objective is TOKENS:
        return (logp * problem.token_weights.flatten()[positions]).sum()
    reference = None
    if objective.uses_reference:
        with torch.no_grad():
            reference = logps(problem.reference_hidden)
    rows, length = scored.shape
    options = {
        DPO: fastpref.losses.DPO(beta=objectives.BETA),
        KTO: fastpref.losses.KTO(beta=objectives.BETA),
        ORPO: fastpref.losses.ORPO(beta=objectives.BETA),
        SIMPO: fastpref.losses.SimPO(beta=objectives.SIMPO_BETA, gamma=objectives.SIMPO_GAMMA),
    }[objective]
    labels = torch.arange(rows, device=scored.device) < rows // 2 if objective is KTO else None
    return fastpref.preference_loss(
        logp, positions // length, scored.sum(1), options, reference=reference, labels=labels
    ).loss


def liger(problem: Problem, objective: Objective) -> Tensor:
    """Call Liger's fused linear preference losses, compiled by default, which score every position."""
    from liger_kernel import chunked_loss

    if objective is TOKENS:
        raise Unsupported("whole losses only")
    if problem.softcap is not None:
        raise Unsupported("no softcap")
    hidden, weight, labels = problem.hidden, problem.weight, problem.labels
    reference = {"ref_input": problem.reference_hidden, "ref_weight": weight.detach()}
    if objective is DPO:
        return chunked_loss.LigerFusedLinearDPOLoss(beta=objectives.BETA)(weight, hidden, labels, **reference)[0]
    if objective is KTO:
        desirable = torch.arange(len(labels), device=labels.device) < len(labels) // 2
        loss = chunked_loss.LigerFusedLinearKTOLoss(beta=objectives.BETA, use_ref_model=True)
        return loss(hidden, weight, labels, preference_labels=desirable, **reference)[0]
    if objective is ORPO:
        return chunked_loss.LigerFusedLinearORPOLoss(beta=objectives.BETA)(weight, hidden, labels)[0]
    loss = chunked_loss.LigerFusedLinearSimPOLoss(
        beta=objectives.SIMPO_BETA, gamma=objectives.SIMPO_GAMMA, compute_nll_loss=False
    )
    return loss(weight, hidden, labels)[0]


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


METHODS = (
    Method("fastpref", ours),
    Method("TRL 1.16, chunked", by_tokens(trl_chunked), package="trl"),
    Method("all logits", by_tokens(full_logits), package="trl"),
    Method("Liger", liger, package="liger_kernel"),
    Method("cut-cross-entropy", by_tokens(cut_cross_entropy), package="cut_cross_entropy"),
    Method("Unsloth", by_tokens(unsloth), package="unsloth_zoo"),
    Method("torch, chunked", by_tokens(torch_fused)),
)


# --- the yardstick ----------------------------------------------------------------------------------------------------


def bare_products(problem: Problem, objective: Objective, *, backward: bool) -> Callable[[], None]:
    """Return a step of only the matrix products, in tiles, that every method needs for the scored positions.

    The forward pass has one (and one for a reference), the backward pass one for the hidden states and one for a
    trained head.
    """
    hidden = problem.hidden.detach()[problem.scored]
    weight = problem.weight.detach()
    buffer = hidden.new_empty(hidden.shape[0], min(TILE, weight.shape[0]))
    out, grad = torch.empty_like(hidden), torch.empty_like(weight) if problem.weight.requires_grad else None

    def step() -> None:
        out.zero_()
        for start in range(0, weight.shape[0], TILE):
            w = weight[start : start + TILE]
            tile = buffer[:, : w.shape[0]]
            for _ in range(2 if objective.uses_reference else 1):
                torch.mm(hidden, w.t(), out=tile)
            if backward:
                out.addmm_(tile, w)
            if backward and grad is not None:
                torch.mm(tile.t(), hidden, out=grad[start : start + TILE])

    return step
