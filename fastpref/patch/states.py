"""The hidden states of a padded batch, computed in any layout, and the head's results for them."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastpref.data.forest import Kept, LaterForest
from fastpref.model.attention import tree_keywords
from fastpref.model.head import Head
from fastpref.model.later import keeping
from fastpref.model.router import router_loss
from fastpref.ops import LoraWeight, TokenLogprobs
from fastpref.patch.trees import HeadRows, Later, Packed


@dataclass(frozen=True)
class States:
    """Hidden states [M, H], and the index of the one that belongs to each position of a padded batch."""

    hidden: Tensor  # [M, H]
    place: Tensor  # [B, T] int64
    head: Head
    output: Any = None  # of the body, with the router logits of each layer if they were requested
    shared: HeadRows | None = None  # the head's rows of all tokens with labels, if rows of the batch share some

    def score(self, where: Tensor, targets: Tensor, outputs: tuple[str, ...] = ()) -> TokenLogprobs:
        """Return the log-probabilities of `targets` [N], the tokens after the positions of `where` [B, T] bool."""
        return self.head(self.hidden, self.place[where], targets, outputs)

    def score_labels(self, where: Tensor, targets: Tensor, outputs: tuple[str, ...] = ()) -> TokenLogprobs:
        """Do the same for all tokens with labels, of which those that rows share are computed once."""
        if self.shared is None:
            return self.score(where, targets, outputs)
        return self.head(self.hidden, self.shared.predictors, self.shared.targets, outputs).take(self.shared.rows)

    def mean_logits(self) -> Tensor:
        """Return the mean of the logits over the vocabulary at every position of the batch, [B, T] float32."""
        return _mean_logits(self.hidden, self.head)[self.place]


def padded_states(backbone: nn.Module, head: Head, input_ids: Tensor, **options: Any) -> States:
    """Compute the hidden states of the padded rows as they are."""
    output = backbone(input_ids=input_ids, use_cache=False, **options)
    hidden = output.last_hidden_state
    place = torch.arange(hidden.shape[0] * hidden.shape[1], device=hidden.device).view(hidden.shape[:2])
    return States(hidden.flatten(0, 1), place, head, output)


def packed_states(
    backbone: nn.Module, head: Head, packed: Packed, *, keep: bool = False, **options: Any
) -> tuple[States, Kept | None]:
    """Compute the hidden states of the rows as a forest. With `keep`, also return every layer's keys and values."""
    options |= tree_keywords(packed.layout, packed.input_ids.device)
    call = {"input_ids": packed.input_ids, "position_ids": packed.position_ids, "use_cache": False}
    with keeping(packed.layout) if keep else nullcontext() as kept:
        output = backbone(**call, **options)
    hidden = output.last_hidden_state[0]
    return States(hidden, packed.place.to(hidden.device), head, output, packed.shared), kept


@torch.no_grad()
def later_states(backbone: nn.Module, states: States, kept: Kept, later: Later, *, eager: bool) -> States:
    """Compute the states of later tokens. Return them with those of the packed row, all without gradient."""
    layout = LaterForest((), branches=later.branches, kept=kept, eager=eager)
    options = tree_keywords(layout, later.input_ids.device)
    output = backbone(input_ids=later.input_ids, position_ids=later.position_ids, use_cache=False, **options)
    hidden = torch.cat([states.hidden.detach(), output.last_hidden_state[0]])
    return replace(states, hidden=hidden, place=later.place.to(hidden.device), shared=None)


def padded_router_loss(
    forward: Callable[..., Any],  # the model's own
    backbone: nn.Module,
    states: States,
    attention_mask: Tensor,  # [B, T]
) -> Tensor | None:
    """Compute the model's load-balancing loss over the padded batch, in which a shared token counts once per row.

    Returns None if the model has none, or if the body's output has no router logits.
    """
    output = states.output
    if not getattr(output, "router_logits", None):
        return None
    real = states.place[attention_mask.bool()]
    rows = output.last_hidden_state.shape[:2]

    def of_rows(logits: Tensor | None) -> Tensor | None:
        if logits is None:
            return None
        flat = logits.flatten(0, 1) if logits.shape[:2] == rows else logits  # [..., M, experts]
        return flat.index_select(-2, real)

    router_logits = tuple(map(of_rows, output.router_logits))
    padded = type(output)(last_hidden_state=output.last_hidden_state, router_logits=router_logits)
    return router_loss(forward, backbone, padded)


def _mean_logits(hidden: Tensor, head: Head) -> Tensor:
    """Return the mean of the logits over the vocabulary, [M].

    Without a softcap it is a product with the mean of the head's rows. With a softcap it has no gradient.
    """
    settings = head.settings
    weight, bias = head.weight_and_bias(hidden.dtype)
    base = weight.base if isinstance(weight, LoraWeight) else weight
    if settings.softcap is not None or not isinstance(base, Tensor):
        everywhere = torch.arange(len(hidden), device=hidden.device)
        means = head(hidden, everywhere, torch.zeros_like(everywhere), ("mean_logit",)).mean_logit
        assert means is not None
        return means.float()
    mean = base.mean(0, dtype=torch.float32)
    if isinstance(weight, LoraWeight):
        hidden, wide = weight.widen(hidden)
        mean = torch.cat([mean, mean.new_zeros(wide.zeros), weight.lora_B.mean(0, dtype=torch.float32)])
    with torch.autocast(hidden.device.type, enabled=False):
        means = hidden.float() @ mean
    if bias is not None:
        means = means + bias.float().mean()
    return means * settings.scale
