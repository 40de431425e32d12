"""Trained parameters in float32, also where a model's other weights have half precision.

AdamW's steps are often smaller than the spacing of bfloat16, and would be lost; gradients of float16 weights cannot be
unscaled. PEFT keeps adapters in float32, but leaves modules that are trained in full in the model's dtype.
"""

from functools import partial
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.utils._pytree import tree_map

HALF = (torch.bfloat16, torch.float16)


def train_in_float32(model: nn.Module) -> None:
    """Make every trained parameter of half precision float32, and every module that is held in full for an adapter.

    A module that is trained in full computes in float32, or under autocast in autocast's dtype, and returns the dtype
    of the module that it replaces, which the layers after it expect.
    """
    for wrapper in model.modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            for module in wrapper.modules_to_save.values():  # also one that is frozen, the reference's
                _keep_dtype_outside(module)
                module.float()
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in HALF:
            parameter.data = parameter.data.float()


def _keep_dtype_outside(module: nn.Module) -> None:
    dtypes = [p.dtype for p in module.parameters() if p.dtype in HALF]
    if dtypes:
        module.register_forward_pre_hook(_widen_inputs, with_kwargs=True)
        module.register_forward_hook(partial(_narrow_output, dtypes[0]))


def _widen_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    return tree_map(_widened, (args, kwargs))


def _widened(value: Any) -> Any:
    half = isinstance(value, Tensor) and value.dtype in HALF and not torch.is_autocast_enabled(value.device.type)
    return value.float() if half else value


def _narrow_output(dtype: torch.dtype, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    def narrowed(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.dtype == torch.float32 else value

    return tree_map(narrowed, output)
