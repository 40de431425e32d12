"""Fixed frequencies for RoPE types whose frequencies depend on the length of the input.

transformers chooses the frequencies of the types "dynamic" and "longrope" by the longest position of a call. A packed
row, or a batch, would then give each sequence the frequencies of the longest one in it, and a run's numbers would
depend on its micro-batches. Here every row has the frequencies of `tokens.max_length`, as on an inference server that
is started for that length. If `tokens.max_length` is within the length that the model was first trained on, the model
keeps its own frequencies.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from fastpref.errors import UserError

BY_LENGTH = ("dynamic", "longrope")


def fix_rope(model: nn.Module, max_length: int) -> list[str]:
    """Fix the frequencies of a model's rotary embeddings to those of `max_length` tokens.

    Returns a note if they differ from those of short rows. Raises UserError if they still depend on the length.
    """
    notes: dict[str, None] = {}
    for module in model.modules():
        for layers, kind in _kinds(module).items():
            if kind in BY_LENGTH:
                notes |= dict.fromkeys(_fix(module, kind, layers, max_length))
                module.rope_type = "default" if layers is None else {**module.rope_type, layers: "default"}  # pyright: ignore
    for module in model.modules():
        if _follows_longest(module, max_length):
            parameters = getattr(getattr(module, "config", None), "rope_parameters", None) or {}
            short = parameters.get("original_max_position_embeddings")
            most = "the length that the model was first trained on" if short is None else f"{short:,}"
            raise UserError(
                f"the RoPE of this model ({type(module).__name__}) gives a row other embeddings when a longer one is "
                f"in its micro-batch; set tokens.max_length, which is {max_length:,}, to no more than {most}"
            )
    return list(notes)


@torch.no_grad()
def _follows_longest(module: Any, max_length: int) -> bool:
    """Return whether the embeddings of the first positions change if the same call has a later one."""
    if "position_ids" not in signature(module.forward).parameters:
        return False
    frequencies = [buffer for name, buffer in module.named_buffers(recurse=False) if name.endswith("inv_freq")]
    if not frequencies or max_length <= 8:
        return False
    few = torch.arange(8, device=frequencies[0].device)[None]
    longer = torch.cat([few, few.new_tensor([[max_length - 1]])], dim=1)
    for layers in _kinds(module):
        options = {} if layers is None else {"layer_type": layers}
        with unchanged(module), suppress(Exception):  # for modules with another signature
            alone, beside = (
                module(frequencies[0].new_zeros((1, ids.shape[1], 1)), position_ids=ids, **options)
                for ids in (few, longer)
            )
            pairs = zip(alone, beside, strict=True)
            if any(not torch.equal(a, b[..., :8, :]) for a, b in pairs if isinstance(a, Tensor) and a.dim() > 1):
                return True
    return False


def has_rope_by_length(model: PreTrainedModel) -> bool:
    """Return whether a model's config names a type of `BY_LENGTH`, whether `fix_rope` has fixed it or not."""
    tables = [config.__dict__.get("rope_parameters") or {} for config in (model.config, model.config.get_text_config())]
    tables += [inner for table in tables for inner in table.values() if isinstance(inner, dict)]
    return any(table.get("rope_type") in BY_LENGTH for table in tables)


def depends_on_length(model: nn.Module) -> bool:
    """Return whether a model's frequencies depend on the longest position of a call."""
    return any(kind in BY_LENGTH for module in model.modules() for kind in _kinds(module).values())


def _kinds(module: nn.Module) -> dict[str | None, Any]:
    """Return a module's RoPE type for each kind of layer; the key is None if it has one type for all layers."""
    kinds = getattr(module, "rope_type", None)
    return kinds if isinstance(kinds, dict) else {None: kinds}


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Restore a model's rotary embeddings after the block: those that depend on the length store the longest one."""
    before = [
        (module, {name: b.clone() for name, b in module._buffers.items() if b is not None}, dict(vars(module)))
        for module in model.modules()
        if hasattr(module, "rope_type")
    ]
    try:
        yield
    finally:
        for module, buffers, values in before:
            vars(module).clear()
            vars(module).update(values)
            module._buffers.update(buffers)


def _fix(module: Any, kind: str, layers: str | None, max_length: int) -> list[str]:
    prefix = "" if layers is None else f"{layers}_"
    parameters = module.config.rope_parameters if layers is None else module.config.rope_parameters[layers]
    short = parameters.get("original_max_position_embeddings") if kind == "longrope" else None
    short = short or module.original_max_seq_len
    if max_length <= short:
        return []  # the frequencies that the module was made with
    by_layers = {} if layers is None else {"layer_type": layers}
    buffer = getattr(module, f"{prefix}inv_freq")
    frequencies, _ = ROPE_INIT_FUNCTIONS[kind](module.config, buffer.device, seq_len=max_length, **by_layers)
    module.register_buffer(f"{prefix}inv_freq", frequencies, persistent=False)
    if hasattr(module, f"{prefix}original_inv_freq"):
        setattr(module, f"{prefix}original_inv_freq", frequencies)
    return [
        f"RoPE: the frequencies of this model depend on a row's length past {short:,} tokens ({kind}); every row has "
        f"those of tokens.max_length = {max_length:,}"
    ]
