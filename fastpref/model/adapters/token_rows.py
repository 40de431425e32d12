"""Trained rows of new tokens beside adapters, in PEFT's format for them: `trainable_token_indices`.

PEFT's layer copies the whole table in each pass to put the trained rows into it. Here only the new tokens are looked up
among the trained rows, and the head is W with an adapter whose A is what training has added to the rows of the new
tokens, and whose B selects these tokens. The fused kernels compute that as any LoRA on the head: exactly, without the
whole table and without its gradient.
"""

from types import MethodType
from typing import Any

import peft
import torch
import torch.nn.functional as F
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastpref.errors import UserError
from fastpref.model.tables import grown
from fastpref.ops import LoraWeight


def train_tokens(settings: peft.LoraConfig, ids: tuple[int, ...], model: PreTrainedModel) -> None:
    """Let PEFT train the rows of these tokens. Raises UserError for tables with adapters, and for others than plain."""
    ends: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    names = [next(name for name, module in model.named_modules() if module is end) for end in ends]
    whole = tuple(settings.modules_to_save or ())
    for name, end in zip(names, ends, strict=True):
        if name in (settings.target_modules or ()) or name.endswith(whole):
            key = "target" if name in (settings.target_modules or ()) else "modules_to_save"
            raise UserError(
                f"tokens.add: the rows of {name} are trained for new tokens only; remove it from lora.{key}"
            )
        if not end.weight.is_floating_point() or getattr(end.weight, "quant_state", None) is not None:
            raise UserError(f"tokens.add: the rows of {name} are quantised, and cannot be trained")
    if type(ends[1]) is not nn.Linear or ends[1].bias is not None or not isinstance(ends[0], nn.Embedding):
        raise UserError(
            f"tokens.add: adapters leave room for new tokens in plain tables only, and the head of this "
            f"{model.config.model_type} model is none or has a bias; train without [lora]"
        )
    tied = ends[0].weight is ends[1].weight
    if tied != bool(getattr(model.config, "tie_word_embeddings", False)):  # by which PEFT decides
        raise UserError("tokens.add: the config.json of this model is wrong about whether its head is tied")
    settings.trainable_token_indices = {name: list(ids) for name in (names[:1] if tied else names)}


def fuse_tokens(model: nn.Module) -> None:
    """Give PEFT's layers of trained tokens the forward method of this module."""
    for module in model.modules():
        if isinstance(module, TrainableTokensLayer) and "forward" not in vars(module):
            module.forward = MethodType(_forward, module)


def token_head(module: TrainableTokensWrapper) -> Tensor | LoraWeight:
    """Return the weight [V, H] of a head with the trained rows of its new tokens, if its adapter is active."""
    layer: Any = module.token_adapter
    weight, name = layer.base_layer.weight, _active(layer)
    if name is None:
        return weight
    ids = _ids(layer, name, weight.device)
    rows = layer.trainable_tokens_delta[name]
    selection = torch.zeros(len(weight), len(ids), dtype=weight.dtype, device=weight.device)
    selection[ids, torch.arange(len(ids), device=weight.device)] = 1
    return LoraWeight(weight, rows - weight[ids].detach().to(rows.dtype), selection)


@torch.no_grad()
def with_rows(module: TrainableTokensWrapper, table: Tensor) -> Tensor:
    """Return a copy of a table [V, H] with the trained rows of its new tokens, for which it grows if it must."""
    layer: Any = module.token_adapter
    (name,) = layer.active_adapters
    ids = _ids(layer, name, table.device)
    rows = layer.trainable_tokens_delta[name].to(table)
    return grown(table, rows_of_tokens(module)).index_copy(0, ids, rows)


def rows_of_tokens(module: TrainableTokensWrapper) -> int:
    """Return how many rows a table needs for its trained ones."""
    layer: Any = module.token_adapter
    (name,) = layer.active_adapters
    return max(layer.token_indices[name]) + 1


def tokens_of(settings: Any) -> int:
    """Return how many rows a model needs for an adapter's trained tokens, by the adapter's settings; 0 for none."""
    indices = getattr(settings, "trainable_token_indices", None) or []
    every = indices.values() if isinstance(indices, dict) else [indices]
    return max((number + 1 for ids in every for number in ids), default=0)


def _active(layer: Any) -> str | None:
    """Return the adapter whose rows a layer computes with."""
    if layer.disable_adapters or layer.merged:
        return None
    return next((name for name in layer.active_adapters if name in layer.trainable_tokens_delta), None)


def _ids(layer: Any, name: str, device: torch.device) -> Tensor:
    return torch.tensor(layer.token_indices[name], device=device)


def _forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    out, name = self.base_layer(x, *args, **kwargs), _active(self)
    if name is None:
        return out
    ids, rows = _ids(self, name, x.device), self.trainable_tokens_delta[name]
    if not isinstance(self.base_layer, nn.Embedding):
        return out.index_copy(-1, ids, F.linear(x, rows.to(x.dtype)).to(out.dtype))
    same = x[..., None] == ids
    new = F.embedding(same.int().argmax(-1), rows).to(out.dtype)
    scale = self._get_embed_scale()  # of models that scale their embeddings in the layer itself
    return torch.where(same.any(-1)[..., None], new if scale is None else new * scale.to(new.dtype), out)
