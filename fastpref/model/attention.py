"""Attention over forests, registered with transformers under the name "fastpref".

A row holds a forest (`data/forest.py`): a token attends, causally, to the tokens before it in its sequences. The layout
reaches `tree_attention` as the keyword `tree` of the model's forward, which transformers passes to the attention of
every layer. So there is no global state, and `probe_layers` finds the models whose layers do not pass it on. A layer's
argument that is not supported here raises an error instead of being ignored. Without the keyword, `tree_attention` is
transformers' own SDPA with its masks, and it adds the softcaps and sinks that SDPA lacks. `flex_attention.py` does the
same for GPUs.

`trial.py` tests whether trees give a model the same hidden states as its own attention.
"""

from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from fastpref.data.forest import Chain, Forest, LaterForest, Node
from fastpref.errors import one_line
from fastpref.model.body import device_of
from fastpref.model.causal import CausalAttention, masked_attention
from fastpref.model.later import keep, later_attention

NAME = "fastpref"

# Keywords that reach every layer's attention and do not change what it computes for a whole row without a cache.
_WITHOUT_EFFECT = {"position_ids", "cache_position", "past_key_values", "position_embeddings", "layer_idx", "use_cache"}


class UnknownArgument(TypeError):
    """Raised when a layer gives its attention an argument that is not supported here."""


def tree_attention(
    module: nn.Module,
    query: Tensor,  # [B, heads, T, D]
    key: Tensor,  # [B, kv_heads, T, D]
    value: Tensor,  # [B, kv_heads, T, D]
    attention_mask: Tensor | None,  # [B, 1, T, T], only without a tree
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    tree: Forest | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention, [B, T, heads, D], as a function of transformers' `AttentionInterface`.

    Raises UnknownArgument for a keyword that would change the result and is not supported here.
    """
    if tree is None and softcap is None and s_aux is None and not _is_empty(attention_mask):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    check_arguments(tree, attention_mask, kwargs)
    if tree is None:
        return masked_attention(query, key, value, attention_mask, dropout, scaling, softcap, s_aux), None
    if isinstance(tree, _Probe):
        shape = (query.shape[1], key.shape[1], query.shape[3], value.shape[3])
        tree.calls.append(LayerCall(*shape, dropout, scaling, sliding_window, softcap, s_aux is not None))
    attend = CausalAttention(dropout, scaling, sliding_window, softcap, s_aux)
    if isinstance(tree, LaterForest):
        return later_attention(tree, module, query, key, value, attend).transpose(1, 2).contiguous(), None
    keep(tree, module, key, value)
    parts = [_chain(attend, query, key, value, chain) for chain in chains(tree)]
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


def chains(tree: Forest) -> list[Chain]:
    """Return the chains of a layout, which the first call makes."""
    if "chains" not in tree.made:
        tree.made["chains"] = tree.chains()
    return tree.made["chains"]


def _chain(attend: CausalAttention, query: Tensor, key: Tensor, value: Tensor, chain: Chain) -> Tensor:
    """Return the output of a chain: its queries attend to the tokens before it in its sequences, and to itself."""
    own = slice(chain.start, chain.stop)
    if not chain.before:
        return attend(query[:, :, own], key[:, :, own], value[:, :, own])
    keys, values = (torch.cat([side[:, :, run] for run in (*chain.before, own)], dim=2) for side in (key, value))
    return attend(query[:, :, own], keys, values)


def _is_empty(attention_mask: Tensor | None) -> bool:
    """Return whether this is the empty mask that `tree_keywords` makes."""
    return attention_mask is not None and attention_mask.numel() == 0


def check_arguments(tree: Forest | None, attention_mask: Tensor | None, options: dict[str, Any]) -> None:
    """Raise UnknownArgument if a layer gives its attention arguments that trees do not support."""
    if tree is None and _is_empty(attention_mask):
        raise UnknownArgument("its layers do not hand the layout down to their attention")
    if tree is not None and attention_mask is not None and not _is_empty(attention_mask):
        raise UnknownArgument("it makes an attention mask of its own")
    for name, value in options.items():
        if name == "is_causal":
            if value is False:
                raise UnknownArgument("its layers ask for attention that is not causal")
        elif (
            value is not None and value is not False and name not in _WITHOUT_EFFECT and not name.startswith("output_")
        ):
            raise UnknownArgument(f"its layers ask their attention for {name}, which trees do not compute")


AttentionInterface.register(NAME, tree_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def tree_keywords(tree: Forest, device: torch.device) -> dict[str, Any]:
    """Return the keywords of a model's forward for a packed row of trees.

    Models pass a four-dimensional mask on unchanged, so an empty one keeps them from making their own [T, T] mask.
    """
    return {"tree": tree, "attention_mask": torch.empty((1, 1, 0, 0), dtype=torch.bool, device=device)}


@dataclass(frozen=True)
class LayerCall:
    """The arguments that one layer gives its attention."""

    heads: int
    kv_heads: int
    width: int  # of a head's queries and keys
    value_width: int
    dropout: float
    scaling: float | None
    window: int | None
    softcap: float | None
    sinks: bool


@dataclass(frozen=True)
class _Probe(Forest):
    """A layout that records the arguments of every layer it reaches."""

    calls: list[LayerCall] = field(default_factory=list)


def layers_reached(backbone: nn.Module, **options: Any) -> list[LayerCall]:
    """Return the arguments of each layer whose attention receives the layout, from a forward of four tokens.

    The body is in training mode, so that dropout shows. `options` override the keywords of `tree_keywords`.
    """
    device = device_of(backbone)
    probe = _Probe((Node(0, 2, 0, None, 4), Node(2, 1, 2, 0, 3), Node(3, 1, 2, 0, 4)))
    training = backbone.training
    backbone.train()  # for the dropout
    try:
        with torch.no_grad():
            ids = torch.zeros((1, 4), dtype=torch.int64, device=device)
            positions = torch.tensor([[0, 1, 2, 2]], device=device)
            layout = tree_keywords(probe, device) | options
            backbone(input_ids=ids, position_ids=positions, use_cache=False, **layout)
    finally:
        backbone.train(training)
    return probe.calls


def probe_layers(model: PreTrainedModel, backbone: nn.Module, name: str = NAME) -> tuple[list[LayerCall], str | None]:
    """Return the arguments of the layers' attention, and the reason why the model needs padded rows, or None.

    `name` is the registered attention that the model must have. This does not test whether the result is right.
    """
    kind = model.config.model_type
    if not has_attention(model, name):
        return [], f"the attention of {kind} models is their own code"
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    try:
        calls = layers_reached(backbone)
    except UnknownArgument as error:
        return [], f"this {kind} model has attention that trees do not compute: {error}"
    except Exception as error:  # models raise different errors for an unknown keyword
        if _wants_mask(backbone):
            return [], f"{kind} models compute with the attention mask in code of their own, and trees have none"
        return [], f"{kind} models refuse the layout: {one_line(error, named=True)}"
    if layers is not None and len(calls) < layers:
        return (
            calls,
            f"only {len(calls)} of the {layers} layers of this {kind} model have attention that takes the layout",
        )
    return calls, None


def _wants_mask(backbone: nn.Module) -> bool:
    """Return whether a body that fails with the empty mask of trees runs, or makes its own mask, without one."""
    try:
        layers_reached(backbone, attention_mask=None)
    except UnknownArgument:  # it made its own mask
        return True
    except Exception:
        return False
    return True


# --- the attention of a model -----------------------------------------------------------------------------------------


def has_attention(model: PreTrainedModel, name: str) -> bool:
    """Return whether the model's text layers look up their attention under this name."""
    return model.config.get_text_config()._attn_implementation == name


def give_attention(model: PreTrainedModel, name: str) -> bool:
    """Set the registered attention of this name in a model's layers. Return False if its code does not support that."""
    if not getattr(model, "_can_set_attn_implementation", lambda: True)():
        return False
    before = attention_of(model)
    with suppress(ValueError, ImportError):
        model.set_attn_implementation(name)
    if has_attention(model, name):
        return True
    restore_attention(before)
    return False


AttentionState = list[tuple[Any, Any]]


def attention_of(model: PreTrainedModel) -> AttentionState:
    """Return the attention of the model and of each of its parts, for `restore_attention`."""
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    configs |= {id(config): config for config in (model.config, model.config.get_text_config())}
    return [(config, config._attn_implementation_internal) for config in configs.values()]


def restore_attention(state: AttentionState) -> None:
    """Set the attention in the configs back to what `attention_of` returned."""
    for config, name in state:
        config._attn_implementation_internal = name
