"""Attention over forests by FlexAttention (arXiv 2412.05496), registered with transformers as "fastpref_flex".

Each layer runs one kernel instead of one SDPA call per chain. The mask is that of `data/forest.py`, from three numbers
a token, whatever the window is: the kernel is compiled once for all lengths and windows. The non-empty blocks of
128 × 128 positions follow from the same numbers without a [T, T] mask.

The block mask of each window is made once per micro-batch and stored in its layout, where every layer, the
recomputation of gradient checkpointing and the forward pass of the reference model find it.
"""

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from fastpref.data.forest import Forest, LaterForest
from fastpref.model.attention import LayerCall, check_arguments, tree_attention
from fastpref.model.flex_kernel import compiled, kernel_options, lacking, sizes
from fastpref.model.later import keep

NAME = "fastpref_flex"
NO_DROPOUT = "it has no dropout, which this model's config asks of its attention"
BLOCK = 128  # positions: the size of a block of the mask, in both directions


def flex_tree_attention(
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

    Calls `tree_attention` without a tree (padded rows, generation), with dropout, which FlexAttention lacks,
    and for later tokens, whose row has keys of its own.
    """
    if tree is None or dropout or isinstance(tree, LaterForest):
        options: dict[str, Any] = {"tree": tree, "sliding_window": sliding_window, "softcap": softcap, "s_aux": s_aux}
        return tree_attention(module, query, key, value, attention_mask, dropout, scaling, **options, **kwargs)
    check_arguments(tree, attention_mask, kwargs)
    keep(tree, module, key, value)
    out = _attend(query, key, value, block_mask(tree, sliding_window, query.device), scaling, softcap, s_aux)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, flex_tree_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scaling: float | None, softcap: float | None,
    sinks: Tensor | None,  # [heads]
) -> Tensor:  # fmt: skip
    """Return [1, heads, T, Dv]. A sink is one more term of the softmax's sum: out · e^lse/(e^lse + e^sink)."""
    kind = query.device.type
    # Autocast does not reach FlexAttention, and RoPE with float32 angles makes queries and keys float32.
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
    inputs = _Alike.apply(dtype, query, key, value)
    learns = inputs[0].requires_grad
    with torch.set_grad_enabled(learns), torch.autocast(kind, enabled=False, cache_enabled=False):
        # Fake tensors on a CPU are those of a count of memory.
        kernel = sizes if kind == "cpu" and isinstance(query, FakeTensor) else _flex(kind)
        found: Any = kernel(
            *inputs,
            kernel_options=kernel_options(inputs[0], inputs[2]),
            score_mod=None if softcap is None else _capped(softcap),
            block_mask=mask,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
            return_aux=None if sinks is None else AuxRequest(lse=True),
        )
    if sinks is None:
        return found
    out, aux = found
    return out * torch.sigmoid(aux.lse - sinks.float()[:, None]).to(dtype)[..., None]


class _Alike(torch.autograd.Function):
    """Queries, keys and values in a form that is the same for all layers, so that one compilation serves them all.

    The compiler tells tensors apart by their strides, by what they are views of, and by whether they have a gradient:
    the keys of a first layer with adapters on queries and values have none. Here all have one if any has, since the
    backward kernel computes all three. Layers whose memory is laid out by token, as most are, are not copied.
    """

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *states: Tensor) -> tuple[Tensor, ...]:
        ctx.dtypes = [each.dtype for each in states]
        made = []
        for each in states:
            rows = each.to(dtype).transpose(1, 2).contiguous()
            made.append(rows.view(-1).view(rows.shape).transpose(1, 2).detach())  # strides of sizes of 1 vary
        return tuple(made)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        needed = ctx.needs_input_grad[1:]
        return None, *(g.to(dtype) if need else None for g, dtype, need in zip(grads, ctx.dtypes, needed, strict=True))


@cache
def _flex(device: str) -> Callable[..., Any]:
    """Return FlexAttention: compiled, except on a CPU, where it serves tests only."""
    return flex_attention if device == "cpu" else compiled()


@cache
def _capped(softcap: float) -> Callable[..., Tensor]:
    def score_mod(score: Tensor, batch: Tensor, head: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return score_mod


# --- the mask --------------------------------------------------------------------------------------------------------


class Visible(NamedTuple):
    """The numbers of the mask: token q attends to k if k ≤ q < end[k] and depth[k] > reach[q]."""

    end: Tensor  # [T] int32
    depth: Tensor  # [T] int32
    reach: Tensor  # [T] int32: the deepest token before q's window, −1 without one

    def mask_mod(self) -> Callable[..., Tensor]:
        end, depth, reach = self

        def visible(batch: Tensor, head: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            return (kv <= q) & (q < end[kv]) & (depth[kv] > reach[q])

        return visible


def visible(tree: Forest, window: int | None, device: torch.device | str = "cpu") -> Visible:
    """Return the numbers of the mask of a forest, with a sliding window of so many tokens."""
    end, depth = tree.by_token()
    reach = torch.full_like(depth, -1) if window is None else depth - window
    return Visible(*(numbers.to(device, non_blocking=True) for numbers in (end, depth, reach)))


def block_mask(tree: Forest, window: int | None, device: torch.device) -> BlockMask:
    """Return the block mask of a layout for one window, which the first call makes."""
    at = ("block mask", window, device)
    if at not in tree.made:
        pieces = sorted({node.start for node in tree.nodes} | set(range(0, tree.tokens, BLOCK)))
        tree.made[at] = _block_mask(visible(tree, window, device), torch.tensor(pieces).to(device, non_blocking=True))
    return tree.made[at]


def _block_mask(
    numbers: Visible,
    pieces: Tensor,  # [P] int64, rising: the positions where a node or a block begins
) -> BlockMask:
    """Return the same block mask as `create_block_mask` for this mask function, in P·T steps instead of T·T.

    The first token of a piece sees every earlier block that any of the piece sees: those after it in the same node have
    the same tokens before the node, and their windows begin later.
    """
    end, depth, reach = numbers
    length, device = len(end), end.device
    blocks = -(-length // BLOCK)
    rest = blocks * BLOCK - length
    k = torch.arange(length, dtype=torch.int32, device=device)
    seen = (k <= pieces[:, None]) & (pieces[:, None] < end) & (depth > reach[pieces][:, None])  # [P, T]
    seen = nn.functional.pad(seen, (0, rest)).view(-1, blocks, BLOCK).any(2).to(torch.int32)
    some = seen.new_zeros(blocks, blocks).index_add_(0, pieces // BLOCK, seen) > 0
    some |= torch.eye(blocks, dtype=torch.bool, device=device)

    def of_blocks(values: Tensor, fill: int) -> Tensor:
        return nn.functional.pad(values, (0, rest), value=fill).view(blocks, BLOCK)

    after = torch.arange(1, blocks + 1, device=device) * BLOCK  # the position after each block
    # Every token of a block of keys ends after a later, complete block of queries, whose windows reach all of them.
    full = (of_blocks(end, 0).amin(1) >= after[:, None]) & (after[:, None] > after)
    full &= of_blocks(depth, 0).amin(1) > of_blocks(reach, -1).amax(1)[:, None]
    mask = BlockMask.from_kv_blocks(
        *_ordered(some & ~full),
        *_ordered(full),
        BLOCK_SIZE=BLOCK,
        mask_mod=numbers.mask_mod(),
        seq_lengths=(length, length),
    )
    _any_length(mask, numbers)
    return mask


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return, for [Q, KV] bool, each row's number of True blocks [1, 1, Q] and its blocks, True first [1, 1, Q, KV]."""
    numbers = blocks.to(torch.int32)
    which = numbers.argsort(dim=1, descending=True, stable=True).to(torch.int32)
    return numbers.sum(1, dtype=torch.int32)[None, None], which[None, None]


def _any_length(mask: BlockMask, seen: Visible) -> None:
    """Mark lengths as dynamic. Otherwise the compiler makes one kernel for the first length and one for all others."""
    blocks = mask.as_tuple()
    for tensor in [*seen, *(part for part in blocks if isinstance(part, Tensor))]:
        for dimension in range(2 if tensor.dim() > 2 else 0, tensor.dim()):
            torch._dynamo.maybe_mark_dynamic(tensor, dimension)


def lacks(calls: Iterable[LayerCall], dtype: torch.dtype, device: torch.device) -> str | None:
    """Return the reason why FlexAttention cannot compute a model's layers on a GPU, or None."""
    calls = list(calls)
    if any(call.dropout for call in calls):
        return NO_DROPOUT
    return lacking({width for call in calls for width in (call.width, call.value_width)}, dtype, device)
