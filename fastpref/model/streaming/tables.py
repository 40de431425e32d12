"""Embeddings and the head of a model in host memory, while the rest of it computes on a device."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fastpref.data.batch import copied_from
from fastpref.model.streaming.layers import Allocate

_ROWS = 1 << 13  # of a head's weight that are on the device at once, where the model's own code makes the logits
_DEVICE = "_fastpref_computes_on"


def keep_embeddings(module: nn.Module, device: torch.device) -> None:
    """Let an embedding gather its rows where its weight is, in host memory, and return them on a device."""

    def there(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        place = next(module.parameters()).device  # that of a trained copy, which has this hook too, is another
        return tuple(_moved(arg, place) for arg in args), {name: _moved(arg, place) for name, arg in kwargs.items()}

    module.register_forward_pre_hook(there, with_kwargs=True)
    module.register_forward_hook(lambda module, args, output: _moved(output, device))


def keep_head(module: nn.Linear, device: torch.device, allocate: Allocate) -> None:
    """Let a head in host memory compute on a device, some of its rows at a time. Also see `computes_on`.

    Its weight, and with it that of tied embeddings, moves to memory of `allocate`: copies from locked memory overlap.
    """
    weight = module.weight
    there = allocate(weight.nbytes).view(weight.dtype).view(weight.shape)
    weight.data = there.copy_(weight.data)
    setattr(module, _DEVICE, device)
    vars(module)["forward"] = partial(_product, module)


def on_its_device(module: nn.Module) -> None:
    """Undo `keep_head` for a trained copy of the head, which lies on the device."""
    if vars(module).pop(_DEVICE, None) is not None:
        del vars(module)["forward"]


def computes_on(module: nn.Module) -> torch.device | None:
    """Return the device on which a head in host memory computes, or None for a head that lies on its device."""
    return vars(module).get(_DEVICE)


def _product(module: nn.Linear, hidden: Tensor) -> Tensor:
    """Return a head's product for a few hidden states, such as those of a generated token."""
    weight, bias = module.weight, module.bias
    if weight.device == hidden.device:
        return linear(hidden, weight, bias)
    logits: Any = _HostProduct.apply(hidden, weight)
    return logits if bias is None else logits + bias.to(hidden.device)


class _HostProduct(torch.autograd.Function):
    """hidden [*, H] · weightᵀ with a frozen weight [V, H] in host memory, which the backward pass copies again."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.weight, ctx.dtype = weight, hidden.dtype
        return torch.cat([linear(hidden, rows) for rows in _tiles(weight, hidden.device)], dim=-1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        parts = zip(gradient.split(_ROWS, dim=-1), _tiles(ctx.weight, gradient.device), strict=True)
        total = sum(part @ rows.to(part.dtype) for part, rows in parts)
        return torch.as_tensor(total).to(ctx.dtype), None


def _tiles(weight: Tensor, device: torch.device) -> Iterator[Tensor]:
    """Yield the rows of a weight on a device, some at a time."""
    return (rows.to(device, non_blocking=True) for rows in weight.split(_ROWS))


def _moved(value: Any, device: torch.device) -> Any:
    """Return a tensor on a device. For token ids that were copied from the host, the host need not wait."""
    if not isinstance(value, Tensor):
        return value
    there = copied_from(value) if device.type == "cpu" else None
    return value.to(device, non_blocking=device.type != "cpu") if there is None else there
