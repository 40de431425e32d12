"""Computation of a model in float32, or with more rounding than its own, for comparisons of its results."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastpref.model.body import device_of
from fastpref.model.gradient_checkpointing import decoder_layers
from fastpref.model.streaming.stream import stream_of
from fastpref.sharding import is_sharded

_ENTRIES = 1 << 20  # of a tensor that are looked at together


@contextmanager
def in_float32(model: nn.Module) -> Iterator[bool]:
    """Let a model of half precision compute in float32 inside the block if it can. Yields whether it does.

    Every number of half precision is exact in float32, so the weights are the same afterwards, bit for bit. Weights in
    4 bits stay as they are and are dequantised to float32. A model with weights in 8 bits always computes in 8 bits,
    and a streamed one in the dtype of its buffers. There may not be memory enough for float32, or a product
    of the model, such as that of grouped experts, may not exist in it on a device.
    """
    distinct = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    tensors = [(t, t.dtype) for t in distinct.values() if t.dtype in (torch.float16, torch.bfloat16)]
    extra = sum(tensor.numel() * 2 for tensor, _ in tensors)
    fixed = stream_of(model) is not None or any(isinstance(module, Linear8bitLt) for module in model.modules())
    if not fixed and extra <= _free(model):
        with _cast_to_float32(model, tensors):
            if not tensors or _computes(model):
                yield True
                return
    yield False


@contextmanager
def _cast_to_float32(model: nn.Module, tensors: list[tuple[Tensor, torch.dtype]]) -> Iterator[None]:
    """Cast tensors, which are given with their dtypes, and let weights in 4 bits be dequantised to float32."""
    four_bits: list[Any] = [module for module in model.modules() if isinstance(module, Linear4bit)]
    states = [getattr(parameter, "quant_state", None) for parameter in model.parameters()]
    dtypes = [(module, "compute_dtype", module.compute_dtype) for module in four_bits]
    dtypes += [(state, "dtype", state.dtype) for state in states if state is not None]
    try:
        for tensor, _ in tensors:
            tensor.data = tensor.data.float()
        for owner, name, _ in dtypes:
            setattr(owner, name, torch.float32)
        yield
    finally:
        for tensor, dtype in tensors:
            tensor.data = tensor.data.to(dtype)
        for owner, name, dtype in dtypes:
            setattr(owner, name, dtype)


@torch.no_grad()
def _computes(model: nn.Module) -> bool:
    """Return whether a language model computes a token without an error."""
    if not isinstance(model, PreTrainedModel):
        return True
    try:
        model(input_ids=torch.zeros((1, 1), dtype=torch.long, device=model.device), use_cache=False)
    except Exception:  # each device and product fails in its own way
        return False
    return True


@contextmanager
def rounded_once_more(model: PreTrainedModel) -> Iterator[None]:
    """Let every decoder layer's output in half precision be rounded once more inside the block, as if at random.

    A difference of results that two right computations may have is about the one that this makes.
    """
    generator = torch.Generator().manual_seed(0)

    def rounded(module: nn.Module, args: Any, output: Any) -> Any:
        hidden = output if isinstance(output, Tensor) else output[0]
        half_units = torch.rand(hidden.shape, generator=generator).to(hidden.device) - 0.5
        other = (hidden.float() * (1 + torch.finfo(hidden.dtype).eps * half_units)).to(hidden.dtype)
        return other if isinstance(output, Tensor) else (other, *output[1:])

    hooks = [layer.register_forward_hook(rounded) for layer in decoder_layers(model)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def is_finite(tensor: Tensor) -> bool:
    """Return whether a tensor has no NaN and no infinity, with temporary memory for some of its rows only."""
    if not tensor.is_floating_point():
        return True
    if not tensor.dim() or is_sharded(tensor):  # all processes look at a sharded tensor together
        return bool(tensor.isfinite().all())
    rows = tensor.view(-1) if tensor.is_contiguous() else tensor
    step = max(1, _ENTRIES * len(rows) // max(1, rows.numel()))
    return all(bool(part.isfinite().all()) for part in rows.split(step))


def _free(model: nn.Module) -> int:
    """Return nine tenths of the bytes that are free on a model's device."""
    device = device_of(model)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return int(0.9 * free)
