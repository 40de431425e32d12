"""Autocast for fake CUDA tensors: torch's own asks C++ whether a tensor is on CUDA, and C++ takes these for others.

The operators are those for which torch has an autocast kernel for CUDA; their kinds are those of
`aten/src/ATen/autocast_mode.h`: half precision, the widest dtype of the arguments, and float32 for all others.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch.utils._pytree import tree_leaves, tree_map

_HALF = {
    "_convolution", "conv1d", "conv2d", "conv3d", "conv_tbc", "conv_transpose1d", "conv_transpose2d",
    "conv_transpose3d", "convolution", "prelu", "addmm", "addmv", "addr", "matmul", "einsum", "mm", "mv",
    "linalg_vecdot", "linear", "addbmm", "baddbmm", "bmm", "chain_matmul", "linalg_multi_dot",
    "_scaled_dot_product_flash_attention", "scaled_dot_product_attention",
}  # fmt: skip
_WIDEST = {
    "addcdiv", "addcmul", "atan2", "bilinear", "cross", "dot", "vdot", "grid_sampler", "index_put", "tensordot",
    "scatter_add",
}  # fmt: skip


@contextmanager
def autocast_of_fakes() -> Iterator[None]:
    """Let autocast cast fake CUDA tensors inside the block."""
    library = torch.library.Library("aten", "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Warning only once for all operators")  # of the replaced kernels
            for name in _names():
                base, _, overload = name.removeprefix("aten::").partition(".")
                operator = getattr(getattr(torch.ops.aten, base), overload or "default")
                library.impl(operator, partial(_cast, operator, base), "AutocastCUDA")
        yield
    finally:
        library._destroy()


def _names() -> list[str]:
    """Return the names of the operators that have an autocast kernel for CUDA."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    names = torch._C._dispatch_get_all_op_names()
    return [name for name in names if name.startswith("aten::") and has_kernel(name, "AutocastCUDA")]


def _cast(operator: Any, base: str, *args: Any, **kwargs: Any) -> Any:
    """Call an operator without autocast, with arguments in the dtype of its kind."""
    tensors = [value for value in tree_leaves((args, kwargs)) if _is_cast(value)]
    dtype = torch.get_autocast_dtype("cuda") if base in _HALF else torch.float32
    if base in _WIDEST and all(tensor.dtype != torch.float32 for tensor in tensors):
        dtype = tensors[0].dtype if tensors else dtype
    args, kwargs = tree_map(lambda value: value.to(dtype) if _is_cast(value) else value, (args, kwargs))
    with torch._C._ExcludeDispatchKeyGuard(DispatchKeySet(DispatchKey.AutocastCUDA)):
        return operator(*args, **kwargs)


def _is_cast(value: Any) -> bool:
    eligible = isinstance(value, Tensor) and value.device.type == "cuda" and value.is_floating_point()
    return eligible and value.dtype != torch.float64
