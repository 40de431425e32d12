"""The settings of a model that llama.cpp reads from a GGUF file, from its config.json."""

from collections.abc import Iterable
from typing import Any

import gguf

from fastpref.export.families import Family, Settings
from fastpref.export.rope import head_dim, rope_settings


def model_settings(config: Any, family: Family) -> Settings:
    """Yield what describes a model. Raises UserError for settings that llama.cpp would not compute."""
    yield "vocab_size", config.vocab_size
    yield "context_length", context_length(config, family)
    yield "embedding_length", config.hidden_size
    yield "block_count", config.num_hidden_layers
    yield "feed_forward_length", config.intermediate_size
    yield "head_count", config.num_attention_heads
    yield "head_count_kv", getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    yield "key_length", head_dim(config)
    yield "value_length", head_dim(config)
    yield "layer_norm_rms_eps", config.rms_norm_eps
    yield from rope_settings(config, family)
    yield from family.more(config)


def context_length(config: Any, family: Family) -> int:
    """Return the longest text that llama.cpp computes as transformers does: no longer than a window it ignores."""
    longest, window = config.max_position_embeddings, getattr(config, "sliding_window", None)
    ignored = window is not None and not family.windowed and getattr(config, "use_sliding_window", True)
    return min(longest, window) if ignored else longest


def window_note(config: Any, family: Family) -> str | None:
    """Return a remark if a sliding window makes the context shorter than the model's, or None."""
    length = context_length(config, family)
    if length == config.max_position_embeddings:
        return None
    return (
        f"context length {length:,}, not {config.max_position_embeddings:,}: llama.cpp does not compute the sliding "
        f"window of {config.model_type}, which changes nothing in texts up to its size"
    )


def apply(writer: Any, settings: Iterable[tuple[str, Any]]) -> None:
    """Write settings with a GGUFWriter's own methods; a tuple holds several arguments of one."""
    for name, value in settings:
        if name in _STRINGS:
            writer.add_string(_STRINGS[name], value)
        elif name in _FLOATS:
            writer.add_float32(_FLOATS[name], value)
        else:
            getattr(writer, f"add_{name}")(*(value if isinstance(value, tuple) else (value,)))


_STRINGS = {"adapter_type": gguf.Keys.Adapter.TYPE}  # for which the writer has no method
_FLOATS = {"adapter_alpha": gguf.Keys.Adapter.LORA_ALPHA}
