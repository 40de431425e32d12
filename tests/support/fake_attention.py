"""Attention of fake CUDA tensors as one operation of the right shape, in the places of SDPA and FlexAttention."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from fastpref.model import flex_attention


@torch.library.custom_op("fake_cuda::attention", mutates_args=())
def attention(query: Tensor, key: Tensor, value: Tensor, masks: Sequence[Tensor]) -> Tensor:
    """Return [B, heads, T, Dv], the layout of torch's kernels. Raises TypeError for tensors that they refuse."""
    if not query.dtype == key.dtype == value.dtype:
        raise TypeError(f"attention: query is {query.dtype}, key is {key.dtype}, value is {value.dtype}")
    batch, heads, length, _ = query.shape
    return query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)


@torch.library.custom_op("fake_cuda::attention_backward", mutates_args=())
def backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


attention.register_fake(attention._init_fn)
backward.register_fake(backward._init_fn)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.masks = len(inputs[3])


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return *backward(grad, *ctx.saved_tensors), [None] * ctx.masks


attention.register_autograd(_backward, setup_context=_keep)


@contextmanager
def attention_of_fakes() -> Iterator[None]:
    """Let SDPA and FlexAttention of fake CUDA tensors be `attention` inside the block."""
    library = torch.library.Library("aten", "IMPL")
    forget_caches(flex_attention)
    try:
        library.impl("scaled_dot_product_attention", _sdpa, "AutogradCUDA")
        with mock.patch.object(flex_attention, "compiled", return_value=_flex):
            yield
    finally:
        forget_caches(flex_attention)
        library._destroy()


def forget_caches(module: ModuleType) -> None:
    """Empty the caches of a module's functions, which may hold fake tensors, or what is compiled for real ones."""
    for function in list(vars(module).values()):
        if hasattr(function, "cache_clear"):
            function.cache_clear()


def _sdpa(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    return attention(query, key, value, [] if attn_mask is None else [attn_mask])


def _flex(
    query: Tensor, key: Tensor, value: Tensor, *, score_mod: Any = None, block_mask: BlockMask, scale: float | None,
    enable_gqa: bool = False, return_aux: Any = None, kernel_options: Any = None,
) -> Any:  # fmt: skip
    assert block_mask.seq_lengths == (query.shape[2], key.shape[2]), "the mask is that of another row"
    assert enable_gqa == (query.shape[1] != key.shape[1])
    place = query.new_zeros(1, dtype=torch.int32)
    masked = block_mask.mask_mod(*[place] * 4)
    scores = [] if score_mod is None else [score_mod(place.float(), *[place] * 4)]
    blocks = [part for part in block_mask.as_tuple() if isinstance(part, Tensor)]
    out = attention(query, key, value, [*blocks, masked, *scores])
    if return_aux is None:
        return out
    return out, type("Aux", (), {"lse": out.detach().float().sum(-1)})
