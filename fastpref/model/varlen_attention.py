"""Attention over forests by flash-attn (FlashAttention-2, arXiv 2307.08691), registered as "fastpref_varlen".

Each layer is one call of flash-attn's function for sequences of varying lengths. A sequence of the call is a chain of
the forest (`Forest.chains`): its queries are its own tokens, and its keys are the tokens before it in its sequences and
its own. The package aligns causal masks at the last query and the last key, so a call needs no other mask. The chains
fill the row in order: the queries are the row as it is, and only keys and values are gathered.

Each chain ends with the last token of a sequence and holds all keys of this sequence, so the gathered keys are as many
as the keys of packed rows without repeated sequences, whichever child continues a chain. With a sliding window a chain
needs only the window − 1 tokens before it. A row whose sequences share nothing is not gathered.

The indices are made once per micro-batch and window and stored in its layout, as the block masks of FlexAttention are.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from fastpref.data.forest import Forest, LaterForest
from fastpref.errors import UserError, one_line
from fastpref.model.attention import LayerCall, chains, check_arguments, tree_attention
from fastpref.model.later import keep

NAME = "fastpref_varlen"
DTYPES = (torch.float16, torch.bfloat16)  # that flash-attn computes
_WIDEST = 256  # the width of a head that flash-attn computes
_NEEDED = ("window_size", "softcap", "deterministic")  # arguments that older versions lack
_INSTALL = "pip install --no-build-isolation 'flash-attn>=2.6'"


def varlen_tree_attention(
    module: nn.Module,
    query: Tensor,  # [1, heads, T, D]
    key: Tensor,  # [1, kv_heads, T, D]
    value: Tensor,  # [1, kv_heads, T, Dv]
    attention_mask: Tensor | None,  # [B, 1, T, T], only without a tree
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    tree: Forest | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention, [1, T, heads, Dv], as a function of transformers' `AttentionInterface`.

    Calls `tree_attention` without a tree (padded rows, generation), with sinks or a softcap with dropout, which
    flash-attn lacks, and for later tokens, whose row has keys of its own. Raises UserError in float32.
    """
    lacking = s_aux is not None or bool(softcap is not None and dropout)
    if tree is None or lacking or isinstance(tree, LaterForest):
        options: dict[str, Any] = {"tree": tree, "sliding_window": sliding_window, "softcap": softcap, "s_aux": s_aux}
        return tree_attention(module, query, key, value, attention_mask, dropout, scaling, **options, **kwargs)
    check_arguments(tree, attention_mask, kwargs)
    keep(tree, module, key, value)
    sequences = varlen_sequences(tree, sliding_window, query.device)
    return _attend(query, key, value, sequences, dropout, scaling, sliding_window, softcap)[None], None


AttentionInterface.register(NAME, varlen_tree_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, sequences: "Sequences",
    dropout: float, scaling: float | None, window: int | None, softcap: float | None,
) -> Tensor:  # fmt: skip
    """Return [T, heads, Dv]."""
    kind = query.device.type
    # Autocast does not reach flash-attn, and RoPE with float32 angles makes queries and keys float32.
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
    if dtype not in DTYPES:
        raise UserError(f'flash-attn: {_no_dtype(dtype)}; set model.attention = "sdpa"')
    width, value_width = query.shape[-1], value.shape[-1]
    widest = max(width, value_width)  # flash-attn has one width for all three
    rows = [_widened(states[0].transpose(0, 1).to(dtype), widest) for states in (query, key, value)]
    out = _flash_attn()(
        rows[0],
        *(_gathered(states, sequences) for states in rows[1:]),
        cu_seqlens_q=sequences.queries,
        cu_seqlens_k=sequences.keys,
        max_seqlen_q=sequences.most_queries,
        max_seqlen_k=sequences.most_keys,
        dropout_p=dropout,
        softmax_scale=width**-0.5 if scaling is None else scaling,
        causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),
        softcap=0.0 if softcap is None else softcap,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return out[..., :value_width].contiguous()


def _widened(states: Tensor, width: int) -> Tensor:
    """Return states with zeros up to a width, which change neither the scores nor the other columns of the output."""
    missing = width - states.shape[-1]
    return F.pad(states, (0, missing)) if missing else states


# --- the sequences of a call -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sequences:
    """The chains of a forest as the sequences of a varlen call."""

    queries: Tensor  # [C + 1] int32: where the queries of each chain begin in the row, and the row's length
    keys: Tensor  # [C + 1] int32: where the keys of each chain begin among all keys, and their number K
    most_queries: int  # of a chain, but at least 2: with 1 flash-attn takes its code for generation
    most_keys: int
    places: Tensor | None  # [K] int64: the position of each key in the row; None if K = T, where keys are the row
    order: Tensor | None  # [K] int64: the keys sorted by their position
    bags: Tensor | None  # [T] int64: where the keys of each position begin in `order`


def varlen_sequences(tree: Forest, window: int | None, device: torch.device) -> Sequences:
    """Return the sequences of a layout for one window, which the first call makes."""
    at = ("varlen sequences", window, device)
    if at not in tree.made:
        tree.made[at] = _sequences(tree, window, device)
    return tree.made[at]


def _sequences(tree: Forest, window: int | None, device: torch.device) -> Sequences:
    needed = tree.tokens if window is None else window - 1  # tokens before a chain
    runs = [(*_last(chain.before, needed), slice(chain.start, chain.stop)) for chain in chains(tree)]
    places = np.concatenate([np.arange(run.start, run.stop) for keys in runs for run in keys])
    lengths = [sum(run.stop - run.start for run in keys) for keys in runs]
    queries = [chain.stop - chain.start for chain in chains(tree)]

    def sent(numbers: np.ndarray) -> Tensor:
        return torch.from_numpy(numbers).to(device, non_blocking=True)

    begins = sent(np.cumsum([0, *queries], dtype=np.int32)), sent(np.cumsum([0, *lengths], dtype=np.int32))
    most = max(2, *queries), max(lengths)
    if len(places) == tree.tokens:  # each key once, in the order of the row
        return Sequences(*begins, *most, None, None, None)
    copies = np.bincount(places)
    order, bags = np.argsort(places, kind="stable"), np.cumsum(copies) - copies
    return Sequences(*begins, *most, sent(places), sent(order), sent(bags))


def _last(path: tuple[slice, ...], tokens: int) -> tuple[slice, ...]:
    """Return the last `tokens` positions of a path."""
    runs: list[slice] = []
    for run in reversed(path):
        if tokens <= 0:
            break
        runs.append(slice(max(run.start, run.stop - tokens), run.stop))
        tokens -= run.stop - run.start
    return tuple(reversed(runs))


def _gathered(states: Tensor, sequences: Sequences) -> Tensor:
    """Return keys or values, [T, kv_heads, D], in the order of the call, [K, kv_heads, D]."""
    if sequences.places is None:
        return states
    return _Gather.apply(states, sequences.places, sequences.order, sequences.bags)


class _Gather(torch.autograd.Function):
    """`index_select` whose backward pass sums the gradients of a position's copies in float32, always in one order.

    That of torch adds them to the gradient one by one, each sum rounded to half precision, in an order that varies on a
    GPU; a system prompt may have a hundred copies.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, places: Tensor, order: Tensor, bags: Tensor) -> Tensor:
        ctx.save_for_backward(order, bags)
        return states.index_select(0, places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        order, bags = ctx.saved_tensors
        summed = F.embedding_bag(order, grad.reshape(len(grad), -1), bags, mode="sum")
        return summed.view(len(bags), *grad.shape[1:]), None, None, None


# --- what the package computes ---------------------------------------------------------------------------------------


def lacks(calls: Iterable[LayerCall], dtype: torch.dtype, device: torch.device) -> str | None:
    """Return the reason why flash-attn cannot compute a model's layers, or None. The trial tests the GPU."""
    if not installed():
        return f"the package flash-attn is not installed: {_INSTALL}"
    try:
        older = [name for name in _NEEDED if name not in signature(_flash_attn()).parameters]
    except Exception as error:  # packages that are built for another torch or CUDA fail in many ways
        return f"the package cannot be imported ({one_line(error, named=True)}): {_INSTALL}"
    if older:
        return f"this version of it has no {' and no '.join(older)}: {_INSTALL}"
    if dtype not in DTYPES:
        return _no_dtype(dtype)
    for call in calls:
        if call.sinks:
            return "it has no attention sinks, which this model has"
        if call.softcap is not None and call.dropout:
            return "it has no dropout with a softcap, which this model's config asks of its attention"
        if max(call.width, call.value_width) > _WIDEST:
            return f"its heads have at most {_WIDEST} dimensions, and this model's {max(call.width, call.value_width)}"
    return None


def installed() -> bool:
    """Return whether there is a package flash-attn, which may still fail."""
    return find_spec("flash_attn") is not None


def _flash_attn() -> Any:
    return import_module("flash_attn").flash_attn_varlen_func


def _no_dtype(dtype: torch.dtype) -> str:
    return f"it computes in float16 and bfloat16 only, and this model computes in {str(dtype).removeprefix('torch.')}"
