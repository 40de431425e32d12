"""Tree attention that can store a row's keys and values, and attention of later tokens to them.

Two kinds of tokens in TRL's padded rows have no gradient and attend to tokens of the packed row: KTO's mismatched
completions, which follow the same prompts, and padding, over which ORPO and CPO average their logged logits. Both are
computed after the packed row, without gradient, as `Branch`es that attend to its stored keys and values.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from fastpref.data.forest import Forest
from fastpref.model import attention, flex_attention
from fastpref.model.attention import CausalAttention, masked_attention, repeat_kv

NAME = "fastpref_trl"
FLEX_NAME = "fastpref_trl_flex"
_KEPT = "kept keys and values"

Kept = dict[int, tuple[Tensor, Tensor]]  # by attention module: [1, kv_heads, N, D]


@dataclass(frozen=True)
class Branch:
    """Tokens that follow a prefix in a row that is already computed."""

    prefix: tuple[slice, ...]  # positions in the computed row, in order
    length: int
    sees_itself: bool  # whether its tokens attend, causally, to each other and not only to the prefix


@dataclass(frozen=True)
class LaterLayout(Forest):
    """A separate row of branches, one after the other."""

    branches: tuple[Branch, ...] = ()
    kept: Kept | None = None
    eager: bool = False  # a token that may attend to nothing gets the mean of all values, as in eager attention


@contextmanager
def keeping(layout: Forest) -> Iterator[Kept]:
    """Store the keys and values of every layer that computes this layout inside the block, and yield them."""
    layout.made[_KEPT] = kept = {}
    try:
        yield kept
    finally:
        del layout.made[_KEPT]  # gradient checkpointing computes this layout again, which must store nothing


def _with_branches(inner: Callable[..., tuple[Tensor, None]]) -> Callable[..., tuple[Tensor, None]]:
    """Return an attention function of transformers' interface that is `inner` and also supports `LaterLayout`."""

    def attend(
        module: nn.Module,
        query: Tensor,  # [B, heads, T, D]
        key: Tensor,  # [B, kv_heads, T, D]
        value: Tensor,  # [B, kv_heads, T, Dv]
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        *,
        tree: Forest | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        if isinstance(tree, LaterLayout):
            assert tree.kept is not None
            rules = (dropout, scaling, kwargs.get("sliding_window"), kwargs.get("softcap"), kwargs.get("s_aux"))
            out = _branches(tree, tree.kept[id(module)], query, key, value, CausalAttention(*rules))
            return out.transpose(1, 2).contiguous(), None
        if tree is not None and _KEPT in tree.made:
            tree.made[_KEPT][id(module)] = (key.detach(), value.detach())
        return inner(module, query, key, value, attention_mask, dropout, scaling, tree=tree, **kwargs)

    return attend


def _branches(
    layout: LaterLayout,
    kept: tuple[Tensor, Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attend: CausalAttention,
) -> Tensor:
    """Compute the attention of all branches, [1, heads, N, Dv]."""
    parts, start = [], 0
    for branch in layout.branches:
        own = slice(start, start + branch.length)
        start += branch.length
        keys, values = (torch.cat([side[:, :, span] for span in branch.prefix], dim=2) for side in kept)
        all_keys, all_values = torch.cat([keys, key[:, :, own]], dim=2), torch.cat([values, value[:, :, own]], dim=2)
        if branch.sees_itself:
            parts.append(attend(query[:, :, own], all_keys, all_values))
        elif layout.eager or attend.softcap is not None or attend.sinks is not None:
            mask = _prefix_mask(branch.length, keys.shape[2], attend.window, query.device)
            mask = F.pad(mask, (0, branch.length))
            rules = (attend.dropout, attend.scaling, attend.softcap, attend.sinks)
            parts.append(masked_attention(query[:, :, own], all_keys, all_values, mask, *rules).transpose(1, 2))
        else:
            groups = query.shape[1] // key.shape[1]
            mask = None
            if attend.window is not None:
                mask = _prefix_mask(branch.length, keys.shape[2], attend.window, query.device)
            parts.append(
                F.scaled_dot_product_attention(
                    query[:, :, own],
                    repeat_kv(keys, groups),
                    repeat_kv(values, groups),
                    attn_mask=mask,
                    dropout_p=attend.dropout,
                    scale=attend.scaling,
                )
            )
    return torch.cat(parts, dim=2)


def _prefix_mask(q: int, k: int, window: int | None, device: torch.device) -> Tensor:
    """Return a mask [Q, K] that is True where one of Q tokens after a prefix of K tokens has it within its window."""
    if window is None:
        return torch.ones((q, k), dtype=torch.bool, device=device)
    return torch.arange(k, k + q, device=device)[:, None] - torch.arange(k, device=device) < window


for _name, _inner in ((NAME, attention.tree_attention), (FLEX_NAME, flex_attention.flex_tree_attention)):
    AttentionInterface.register(_name, _with_branches(_inner))
    AttentionMaskInterface.register(_name, sdpa_mask)
