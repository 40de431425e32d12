"""RoPE as llama.cpp takes it: settings for a scaling of all frequencies, and a tensor of divisors for Llama 3's."""

from collections.abc import Iterator
from typing import Any

import gguf
import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from fastpref.errors import UserError
from fastpref.export.families import Family, Settings


def rope_settings(config: Any, family: Family) -> Settings:
    """Yield the settings of RoPE. Raises UserError for a kind that llama.cpp does not compute in this family."""
    rope = _of_full_layers(config)
    kind = rope.get("rope_type", "default")
    if kind not in family.rope:
        raise UserError(
            f"config.json: rope_type {kind!r} is not written for {config.model_type}: llama.cpp computes "
            f"{', '.join(family.rope)} there"
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError("config.json: partial_rotary_factor is not 1: llama.cpp rotates whole heads in this family")
    yield "rope_freq_base", float(rope["rope_theta"])
    yield "rope_dimension_count", head_dim(config)
    if kind == "linear":
        yield "rope_scaling_type", gguf.RopeScalingType.LINEAR
        yield "rope_scaling_factor", float(rope["factor"])
    if kind == "yarn":
        yield from _yarn(config, rope)
    local = _parameters(config).get("sliding_attention")
    if local is not None:
        if local.get("rope_type", "default") != "default":
            raise UserError("config.json: the rope_type of its sliding layers is scaled, which llama.cpp does not do")
        yield "rope_freq_base_swa", float(local["rope_theta"])


def divisors(config: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the divisors of the frequencies [head_dim / 2] in float32 if the config has Llama 3's scaling."""
    rope = _of_full_layers(config)
    if rope.get("rope_type") != "llama3":
        return
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    dimension = head_dim(config)
    plain = 1.0 / float(rope["rope_theta"]) ** (torch.arange(0, dimension, 2, dtype=torch.float64) / dimension)
    yield gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.ROPE_FREQS] + ".weight", (plain / scaled.double()).float()


def head_dim(config: Any) -> int:
    """Return the size of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _yarn(config: Any, rope: dict[str, Any]) -> Settings:
    """Yield YaRN's settings, which llama.cpp computes as the paper and transformers do by default."""
    for name, assumed in (("attention_factor", None), ("mscale", None), ("mscale_all_dim", None), ("truncate", True)):
        if rope.get(name, assumed) not in (assumed, None):
            raise UserError(f"config.json: {name} of YaRN is {rope[name]}, which is not written")
    original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
    yield "rope_scaling_type", gguf.RopeScalingType.YARN
    yield "rope_scaling_factor", float(rope["factor"])
    yield "rope_scaling_orig_ctx_len", int(original)
    yield "rope_scaling_yarn_beta_fast", float(rope.get("beta_fast") or 32.0)
    yield "rope_scaling_yarn_beta_slow", float(rope.get("beta_slow") or 1.0)


def _of_full_layers(config: Any) -> dict[str, Any]:
    rope = _parameters(config)
    return dict(rope.get("full_attention") or rope)


def _parameters(config: Any) -> dict[str, Any]:
    return dict(getattr(config, "rope_parameters", None) or {})
