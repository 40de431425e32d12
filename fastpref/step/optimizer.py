"""The AdamW optimizers: plain, with moments in 8 bits, and paged."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastpref.config import Config
from fastpref.errors import UserError

_MOMENTS = ("state1", "state2")  # bitsandbytes' names


def make_optimizer(policy: nn.Module, config: Config) -> torch.optim.Optimizer:
    """Make the optimizer of `train.optimizer` for the policy's trainable parameters. Only matrices have weight decay.

    The 8-bit kinds store the moments of tensors of at least 4,096 entries in 8 bits (arXiv 2110.02861). The paged kinds
    let moments move to host memory when a GPU is full. Raises UserError for a paged kind without a GPU.
    """
    parameters = [p for p in policy.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.train.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return _kind(config.train.optimizer, parameters)([g for g in groups if g["params"]], lr=config.learning_rate)


def _kind(name: str, parameters: Iterable[nn.Parameter]) -> Callable[..., torch.optim.Optimizer]:
    if name == "adamw":  # the fused kernel needs no temporary tensors of a parameter's size
        fused = all(p.device.type in ("cpu", "cuda", "mps", "xpu") for p in parameters)
        return lambda groups, **options: torch.optim.AdamW(groups, fused=fused, **options)
    import bitsandbytes.optim as kinds

    classes: dict[str, Any] = {
        "adamw_8bit": kinds.AdamW8bit,
        "paged_adamw": kinds.PagedAdamW,
        "paged_adamw_8bit": kinds.PagedAdamW8bit,
    }
    if name.startswith("paged") and not torch.cuda.is_available():
        raise UserError(f'train.optimizer = "{name}": only moments on a GPU can be paged; set "adamw" or "adamw_8bit"')
    return classes[name]


def load_state(optimizer: Any, state: dict[str, Any]) -> None:
    """Load what `state_dict` returned into an optimizer, which Accelerate may have prepared.

    bitsandbytes would move all moments to the GPU as plain tensors. Those of a paged kind may not fit there, so each
    goes from host memory to a buffer like the one that it was saved from.
    """
    own = getattr(optimizer, "optimizer", optimizer)
    if not getattr(own, "is_paged", False):
        optimizer.load_state_dict(state)
        return
    own.load_state_dict(state, move_to_device=False)
    moved: dict[int, tuple[Tensor, Tensor]] = {}  # by id, with the tensor, so that ids stay unique
    for parameter, values in own.state.items():
        for name, value in values.items():
            if name in _MOMENTS:
                values[name] = own.get_state_buffer(parameter, dtype=value.dtype)
                values[name].copy_(value)
            elif isinstance(value, Tensor):  # parameters share their tables
                moved.setdefault(id(value), (value, value.to(parameter.device)))
                values[name] = moved[id(value)][1]
