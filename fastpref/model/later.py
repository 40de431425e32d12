"""Attention of later tokens to a row that is computed already.

Tokens without a gradient may follow a row: KTO's mismatched completions, which follow the same prompts, and padding,
over which TRL's ORPO and CPO average their logged logits. They are computed after the row, without gradient, as
`Branch`es that attend to its stored keys and values.
"""

from collections import ChainMap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastpref.data.forest import Forest, Kept, LaterForest
from fastpref.model.causal import CausalAttention, masked_attention, repeat_kv

_KEPT = "kept keys and values"


@contextmanager
def keeping(layout: Forest) -> Iterator[Kept]:
    """Store the keys and values of every layer that computes this layout inside the block, and yield them."""
    layout.made[_KEPT] = kept = {}
    try:
        yield kept
    finally:
        del layout.made[_KEPT]  # gradient checkpointing computes this layout again, which must store nothing


def kept_apart(layout: Forest) -> Forest:
    """Return the same layout for another model, whose keys and values are kept apart from those of the first.

    Both share what the first makes of the layout, such as its masks.
    """
    return replace(layout, made=ChainMap({}, layout.made))


def keep(layout: Forest, module: nn.Module, key: Tensor, value: Tensor) -> None:
    """Store the keys and values of a layer if the layout is computed inside `keeping`."""
    if _KEPT in layout.made:
        layout.made[_KEPT][id(module)] = (key.detach(), value.detach())


def later_attention(
    layout: LaterForest,
    module: nn.Module,
    query: Tensor,  # [1, heads, N, D]
    key: Tensor,  # [1, kv_heads, N, D]
    value: Tensor,  # [1, kv_heads, N, Dv]
    attend: CausalAttention,
) -> Tensor:
    """Compute the attention of all branches to the stored row and to themselves, [1, heads, N, Dv]."""
    assert layout.kept is not None
    kept = layout.kept[id(module)]
    parts, start = [], 0
    for branch in layout.branches:
        own = slice(start, start + branch.length)
        start += branch.length
        all_keys, all_values = (
            torch.cat([*(before[:, :, span] for span in branch.prefix), side[:, :, own]], dim=2)
            for before, side in zip(kept, (key, value))
        )
        if branch.sees_itself:
            parts.append(attend(query[:, :, own], all_keys, all_values))
            continue
        keys, values = all_keys[:, :, : -branch.length], all_values[:, :, : -branch.length]
        if layout.eager or attend.softcap is not None or attend.sinks is not None:
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
