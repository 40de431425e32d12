"""The kernels of FlexAttention: how torch compiles them, and with which tiles they fit a GPU.

Without compilation FlexAttention stores all scores, [heads, T, T], and torch runs a function uncompiled, with no more
than a warning, in several cases: a part that it cannot trace, more than eight compilations of the function, or
TORCHDYNAMO_DISABLE. Here each of these raises an error, so the trial in `attention_choice.py` finds it.

`bench/flex_report.py` compiles the kernels for GPUs that are not there, and fails if one does not fit.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxOutput, flex_attention

LEAST = (8, 0)  # compute capability: torch's kernels for older GPUs take no tensor cores
NARROWEST, WIDEST = 16, 512  # the width of a head

# Floats are constants, because a symbolic one in a mask or score function cannot be traced with gradients. A process
# may train many models: torch stops after 8 compilations, or 256 of functions with the same code.
_SETTINGS = {"specialize_float": True, "recompile_limit": 10_000, "accumulated_recompile_limit": 10_000}


def compiled(backend: Any = "inductor") -> Callable[..., Any]:
    """Return `torch.nn.attention.flex_attention`, compiled in one piece for rows of all lengths."""
    kernel = torch.compile(_fused, backend=backend, dynamic=True, fullgraph=True)

    def call(*inputs: Any, **options: Any) -> Any:
        # Per call, since settings belong to a thread, and autograd recomputes checkpointed layers in one of its own.
        with torch._dynamo.config.patch(_SETTINGS):
            return kernel(*inputs, **options)

    return call


def _fused(*inputs: Any, **options: Any) -> Any:
    if not torch.compiler.is_dynamo_compiling():
        raise RuntimeError("torch does not compile FlexAttention here, which would store the scores of all pairs")
    return flex_attention(*inputs, **options)


# --- tiles -----------------------------------------------------------------------------------------------------------


def kernel_options(query: Tensor, value: Tensor) -> dict[str, Any]:
    """Return the options with which the kernels of these states, [1, heads, T, D] each, fit their GPU."""
    width = max(query.shape[-1], value.shape[-1])
    options = {"FORCE_USE_FLEX_ATTENTION": True}  # torch has another kernel for rows of less than 128 tokens
    if query.device.type != "cuda" or torch.version.hip is not None:
        return options
    return options | _tiles(width, query.dtype, _shared_memory(query.device))


@cache
def _shared_memory(device: torch.device) -> int:
    """Return the bytes of shared memory that a block may have."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def _tiles(width: int, dtype: torch.dtype, shared: int) -> dict[str, Any]:
    """Return the tiles for heads of this width on a GPU whose blocks have `shared` bytes of shared memory.

    They are empty where torch's own fit, which its developers have measured.
    """
    if dtype == torch.float32:
        # torch's own product of float32 takes no tensor cores; three products of TF32 are as exact.
        queries, keys, stages = next(tile for widest, tile in _SINGLE.items() if width <= widest)
        return _named(queries, keys, stages, 16) | {"FLOAT32_PRECISION": "'tf32x3'"}
    if width > 256:
        return _named(32, 16, 1, 16)
    if width > 128 and shared < 200 << 10:
        return _named(64, 32, 2, 32)
    return {}


# Queries and keys of a tile of the forward pass, and the stages of its pipeline, for float32, by the widest head.
_SINGLE = {64: (64, 32, 2), 128: (64, 32, 1), 256: (32, 32, 1)}


def _named(queries: int, keys: int, stages: int, backward: int) -> dict[str, int]:
    """Return the options for tiles of the forward pass, and for square ones of the backward pass."""
    sides = {f"bwd_BLOCK_{side}": backward for side in ("M1", "N1", "M2", "N2")}
    forward = {"fwd_BLOCK_M": queries, "fwd_BLOCK_N": keys, "fwd_num_stages": stages}
    return forward | sides | {"bwd_num_stages": 1}


def lacking(widths: set[int], dtype: torch.dtype, device: torch.device) -> str | None:
    """Return the reason why heads of these widths, of queries or values, have no kernel on a GPU, or None."""
    if torch.version.hip is None and (capability := torch.cuda.get_device_capability(device)) < LEAST:
        version, least = (".".join(map(str, pair)) for pair in (capability, LEAST))
        return f"it takes the tensor cores of GPUs of compute capability {least} and newer, and this GPU has {version}"
    if min(widths) < NARROWEST:
        return f"its heads have at least {NARROWEST} dimensions, and this model's {min(widths)}"
    widest = max(_SINGLE) if dtype == torch.float32 else WIDEST
    if max(widths) > widest:
        name = str(dtype).removeprefix("torch.")
        return f"its heads have at most {widest} dimensions in {name}, and this model's {max(widths)}"
    return None


# --- sizes -----------------------------------------------------------------------------------------------------------


def sizes(query: Tensor, key: Tensor, value: Tensor, *, return_aux: Any = None, **_: Any) -> Any:
    """Take the place of FlexAttention for fake tensors, of which only the sizes matter."""
    out, lse = _Sizes.apply(query, key, value)
    return out if return_aux is None else (out, AuxOutput(lse=lse))


class _Sizes(torch.autograd.Function):
    """The tensors that Inductor's kernels keep and make: neither scores nor copies of keys and values."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        heads, length = query.shape[1:3]
        out = query.new_empty(1, length, heads, value.shape[-1]).transpose(1, 2)
        lse, _ = (query.new_empty(1, heads, length, dtype=torch.float32) for _ in range(2))  # and the largest scores
        ctx.save_for_backward(query, key, value, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        *inputs, _, lse = ctx.saved_tensors
        _ = torch.empty_like(lse)  # each row's product of output and gradient
        return tuple(torch.empty_like(each) for each in inputs)
