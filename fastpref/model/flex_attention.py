"""Attention over trees by FlexAttention (arXiv 2412.05496), registered with transformers as "fastpref_flex".

Each layer runs one kernel instead of one SDPA call per completion. A token may attend to two ranges of positions: a
part of its prompt, and a part of its own branch up to itself. A sliding window shortens both. So the mask is three
numbers per query, whatever the window is. The non-empty blocks of 128 × 128 positions follow from these numbers without
a [T, T] mask, and the kernel is compiled once for all lengths and windows.

The block mask of each window is made once per micro-batch and stored in its layout, where every layer, the
recomputation of gradient checkpointing and the forward pass of the reference model find it.
"""

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from fastpref.data.batch import Layout, Tree, TreeLayout
from fastpref.errors import UserError
from fastpref.model.attention import LayerCall, check_arguments, tree_attention

NAME = "fastpref_flex"
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
    tree: TreeLayout | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention, [1, T, heads, Dv], as a function of transformers' `AttentionInterface`.

    Calls `tree_attention` without a tree (padded rows, generation), and with dropout, which FlexAttention lacks.
    """
    if tree is None or dropout:
        options: dict[str, Any] = {"tree": tree, "sliding_window": sliding_window, "softcap": softcap, "s_aux": s_aux}
        return tree_attention(module, query, key, value, attention_mask, dropout, scaling, **options, **kwargs)
    check_arguments(tree, attention_mask, kwargs)
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
    found: Any = _flex(kind)(
        query.to(dtype),
        key.to(dtype),
        value.to(dtype),
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


@cache
def _flex(device: str) -> Callable[..., Any]:
    """Return FlexAttention: compiled, except on a CPU, where it serves tests only."""
    return flex_attention if device == "cpu" else torch.compile(flex_attention, dynamic=True)


@cache
def _capped(softcap: float) -> Callable[..., Tensor]:
    def score_mod(score: Tensor, batch: Tensor, head: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return score_mod


# --- the mask --------------------------------------------------------------------------------------------------------


class Visible(NamedTuple):
    """The positions that a token at position q attends to: [first, last) of its prompt, and [own, q] of its branch."""

    own: Tensor  # [T] int32
    first: Tensor  # [T] int32; first ≥ last for a token of a prompt, whose own branch is the prompt
    last: Tensor  # [T] int32

    def mask_mod(self) -> Callable[..., Tensor]:
        own, first, last = self

        def visible(batch: Tensor, head: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            return ((kv >= own[q]) & (kv <= q)) | ((kv >= first[q]) & (kv < last[q]))

        return visible


def visible(tree: TreeLayout, window: int | None, device: torch.device | str = "cpu") -> Visible:
    """Return the positions that each token of a row attends to: those less than `window` before it in its sequence."""
    runs = [run for t in tree.trees for run in _runs(t)]
    lengths = torch.tensor([length for length, *_ in runs])
    start, prompt_start, prompt_end = (
        torch.tensor(column, dtype=torch.int32).repeat_interleave(lengths).to(device, non_blocking=True)
        for column in list(zip(*runs, strict=True))[1:]
    )
    if window is None:
        return Visible(start, prompt_start, prompt_end)
    oldest = torch.arange(len(start), dtype=torch.int32, device=device) - (window - 1)
    # A branch continues at its prompt's end, so its tokens are start - prompt_end nearer to the prompt than in the row.
    return Visible(start.maximum(oldest), prompt_start.maximum(oldest - (start - prompt_end)), prompt_end)


def _runs(tree: Tree) -> Iterable[tuple[int, int, int, int]]:
    """Yield (length, start, start of the prompt before it, end of that prompt) of a tree's prompt and branches."""
    place = tree.start + tree.prompt
    yield tree.prompt, tree.start, tree.start, tree.start
    for length in tree.completions:
        yield length, place, tree.start, tree.start + tree.prompt
        place += length


def block_mask(tree: TreeLayout, window: int | None, device: torch.device) -> BlockMask:
    """Return the block mask of a layout for one window, which the first call makes."""
    at = ("block mask", window, device)
    if at not in tree.made:
        tree.made[at] = _block_mask(visible(tree, window, device))
    return tree.made[at]


def _block_mask(seen: Visible) -> BlockMask:
    """Return the same block mask as `create_block_mask` for this mask function, in T·T/128 steps instead of T·T."""
    own, first, last = (side[:, None] for side in seen)
    length, device = len(own), own.device
    blocks = -(-length // BLOCK)
    q = torch.arange(length, dtype=torch.int32, device=device)[:, None]
    begin = torch.arange(blocks, dtype=torch.int32, device=device) * BLOCK
    end = begin + BLOCK
    some = ((own < end) & (q >= begin)) | ((first < end) & (last > begin) & (first < last))  # [T, blocks]
    # The first branch follows its prompt directly: together they may fill a block that neither fills alone.
    joined = (last >= own) & (first <= begin) & (q >= end - 1)
    every = ((own <= begin) & (q >= end - 1)) | ((first <= begin) & (last >= end)) | joined
    rest = blocks * BLOCK - length  # missing queries of the last block, which attend to nothing
    some, every = (
        nn.functional.pad(side, (0, 0, 0, rest)).view(blocks, BLOCK, blocks) for side in (some, every)
    )  # fmt: skip
    any_, full = some.any(1), every.all(1)
    partial = _ordered(any_ & ~full)
    mask = BlockMask.from_kv_blocks(
        *partial, *_ordered(full), BLOCK_SIZE=BLOCK, mask_mod=seen.mask_mod(), seq_lengths=(length, length)
    )
    _any_length(mask, seen)
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


# --- the choice of an attention --------------------------------------------------------------------------------------


def wants_flex(
    wanted: Literal["auto", "flex", "sdpa"],
    device: str,
    layout: Layout,
    why_padded: str | None,
    calls: Iterable[LayerCall],
) -> tuple[bool, str | None]:
    """Return whether to try FlexAttention, and the reason against it if the user should see one.

    Raises UserError if the config asks for "flex" and it is not available.
    """
    if wanted == "sdpa":
        return False, None
    why, tell = None, True
    if device != "cuda":  # ROCm devices have this name too
        why, tell = f"FlexAttention trains on GPUs only, and this is a {device} device", False
    elif layout == "padded":
        why, tell = f"FlexAttention computes tree and packed rows only ({why_padded or 'train.layout = padded'})", False
    elif any(call.dropout for call in calls):
        why = "FlexAttention has no dropout, which this model's config asks of its attention"
    if why is not None and wanted == "flex":
        raise UserError(f'model.attention = "flex": {why}; leave the key out')
    return why is None, why if tell else None


def fault(calls: Iterable[LayerCall], dtype: torch.dtype, device: torch.device) -> str | None:
    """Compile the kernels of a model's layers and compare their outputs and gradients with `tree_attention`.

    Returns a message if one fails or differs, or None. Whether a kernel compiles depends on the GPU, the head width and
    the versions: wide heads need more shared memory than consumer GPUs have. Training uses the kernels compiled here.
    """
    for call in dict.fromkeys(calls):
        try:
            error = difference(call, dtype, device)
        except Exception as failure:  # compilers fail in many ways
            lines = [line for line in str(failure).splitlines() if line.strip()] or [""]
            return f"{type(failure).__name__}: {lines[0].strip()[:200]}"
        if not error < (1e-3 if dtype == torch.float32 else 5e-2):
            return f"its result differs by {error:.2g}"
    return None


def difference(call: LayerCall, dtype: torch.dtype, device: torch.device) -> float:
    """Return the largest difference of outputs and gradients from `tree_attention`, relative to its largest value."""
    tree = TreeLayout((Tree(0, 150, (90, 70)), Tree(310, 20, (31, 9))))
    generator = torch.Generator().manual_seed(0)

    def random(heads: int, width: int) -> Tensor:
        drawn = torch.randn(1, 370, heads, width, generator=generator).to(device, dtype)
        return drawn.transpose(1, 2).requires_grad_()

    inputs = [
        random(call.heads, call.width),
        random(call.kv_heads, call.width),
        random(call.kv_heads, call.value_width),
    ]
    sinks = torch.linspace(-1, 1, call.heads).to(device, dtype) if call.sinks else None
    options: dict[str, Any] = {"sliding_window": call.window, "softcap": call.softcap, "s_aux": sinks}
    found = []
    functions: tuple[Callable[..., Any], ...] = (flex_tree_attention, tree_attention)
    for attend in functions:
        out, _ = attend(nn.Identity(), *inputs, attention_mask=None, scaling=call.scaling, tree=tree, **options)
        found.append([out, *torch.autograd.grad(out, inputs, torch.ones_like(out).cumsum(1) / 370)])
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(*found, strict=True))
