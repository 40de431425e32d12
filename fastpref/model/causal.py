"""Causal attention of the last tokens of a sequence, with the windows, softcaps and sinks of a layer."""

import torch
import torch.nn.functional as F
from torch import Tensor


class CausalAttention:
    """Causal attention of the last Q tokens of a contiguous sequence to the whole sequence."""

    def __init__(
        self, dropout: float, scaling: float | None, window: int | None, softcap: float | None, sinks: Tensor | None
    ):
        self.dropout, self.scaling, self.window, self.softcap, self.sinks = dropout, scaling, window, softcap, sinks

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return [B, heads, Q, D] for queries of this shape, the last Q, and keys and values [B, kv_heads, K, D]."""
        q, k = query.shape[2], key.shape[2]
        windowed = self.window is not None and self.window < k
        if self.softcap is None and self.sinks is None:
            groups = query.shape[1] // key.shape[1]
            key, value = repeat_kv(key, groups), repeat_kv(value, groups)
            plain = q == k and not windowed
            mask = None if plain else _causal(q, k, self.window, query.device)
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=plain, dropout_p=self.dropout, scale=self.scaling
            )
        mask = _causal(q, k, self.window, query.device)
        out = masked_attention(query, key, value, mask, self.dropout, self.scaling, self.softcap, self.sinks)
        return out.transpose(1, 2)


def _causal(q: int, k: int, window: int | None, device: torch.device) -> Tensor:
    """Return a mask [Q, K] that is True where query i of the last Q positions may attend to key j of all K."""
    i = torch.arange(k - q, k, device=device)[:, None]
    j = torch.arange(k, device=device)[None, :]
    mask = j <= i
    return mask if window is None else mask & (i - j < window)


def masked_attention(
    query: Tensor,  # [B, heads, Q, D]
    key: Tensor,  # [B, kv_heads, K, D]
    value: Tensor,  # [B, kv_heads, K, D]
    mask: Tensor | None,  # bool, broadcast to [B, heads, Q, K]
    dropout: float,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,  # [heads]
) -> Tensor:
    """Compute attention, [B, Q, heads, D], with the softcap or sinks that SDPA lacks. The scores are in float32."""
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    scores = (query @ key.transpose(2, 3)).float() * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        mask = _causal(query.shape[2], key.shape[2], None, query.device)
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if sinks is not None:
        sink = sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], dim=-1)
    weights = scores.softmax(-1)[..., : key.shape[2]].to(query.dtype)
    weights = F.dropout(weights, dropout) if dropout else weights
    return (weights @ value).transpose(1, 2).contiguous()


def repeat_kv(kv: Tensor, groups: int) -> Tensor:
    return kv if groups == 1 else kv.repeat_interleave(groups, dim=1)
