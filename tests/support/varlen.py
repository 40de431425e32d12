"""The varlen function of flash-attn in plain torch, by its documentation, for tests on machines without the package."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastpref.model import varlen_attention


def visible(queries: int, keys: int, causal: bool, window: tuple[int, int]) -> Tensor:
    """Return which keys each query sees, [queries, keys] bool: masks are aligned at the last query and the last key."""
    q = torch.arange(queries)[:, None] + keys - queries
    k = torch.arange(keys)[None]
    left, right = window[0], 0 if causal else window[1]
    mask = torch.ones(queries, keys, dtype=torch.bool)
    if left >= 0:
        mask &= k >= q - left
    if right >= 0:
        mask &= k <= q + right
    return mask


def flash_attn_varlen_func(
    q: Tensor,  # [queries, heads, D]
    k: Tensor,  # [keys, kv_heads, D]
    v: Tensor,  # [keys, kv_heads, D]
    cu_seqlens_q: Tensor,  # [sequences + 1] int32
    cu_seqlens_k: Tensor,  # [sequences + 1] int32
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor:
    """Return [queries, heads, D]. The checks are those of the package, for float32 too, in which tests are exact."""
    assert q.dtype == k.dtype == v.dtype
    assert q.dtype in varlen_attention.DTYPES
    assert q.shape[2] == k.shape[2] == v.shape[2] <= 256
    assert k.shape[:2] == v.shape[:2]
    assert q.shape[1] % k.shape[1] == 0
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    assert not (softcap and dropout_p)
    assert alibi_slopes is None
    assert not return_attn_probs
    for starts, states, most in ((cu_seqlens_q, q, max_seqlen_q), (cu_seqlens_k, k, max_seqlen_k)):
        assert starts.dtype == torch.int32
        assert starts.is_contiguous()
        assert (starts[0], starts[-1]) == (0, len(states))
        assert starts.diff().min() >= 0
        assert starts.diff().max() <= most
    assert len(cu_seqlens_q) == len(cu_seqlens_k)
    scale = q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale
    groups, parts = q.shape[1] // k.shape[1], []
    for number in range(len(cu_seqlens_q) - 1):
        own, seen = (slice(*starts[number : number + 2].tolist()) for starts in (cu_seqlens_q, cu_seqlens_k))
        scores = torch.einsum("qhd,khd->hqk", q[own].float(), k[seen].repeat_interleave(groups, 1).float()) * scale
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        mask = visible(scores.shape[1], scores.shape[2], causal, window_size)
        weights = scores.masked_fill(~mask, -torch.inf).softmax(-1).masked_fill(~mask, 0.0)
        weights = F.dropout(weights, dropout_p)
        parts.append(torch.einsum("hqk,khd->qhd", weights, v[seen].repeat_interleave(groups, 1).float()))
    return torch.cat(parts).to(q.dtype)


def install(monkeypatch: pytest.MonkeyPatch, function: Any = flash_attn_varlen_func, *, exact: bool = False) -> None:
    """Make a function the package's for a test. `exact` admits float32, which the package does not compute."""
    package: Any = ModuleType("flash_attn")
    package.__spec__ = ModuleSpec("flash_attn", None)
    if function is not None:
        package.flash_attn_varlen_func = function
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    if exact:
        monkeypatch.setattr(varlen_attention, "DTYPES", (*varlen_attention.DTYPES, torch.float32))
