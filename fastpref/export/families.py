"""The model families that can be written as GGUF: their names in llama.cpp, and what it takes for granted in each.

A family is listed only if llama.cpp computes the same logits as transformers for it (tests/export). Settings that
llama.cpp does not read in a family must have the value that it assumes; any other value is an error here.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastpref.errors import UserError

Settings = Iterator[tuple[str, Any]]  # GGUFWriter's methods, without "add_", and their arguments


@dataclass(frozen=True)
class Family:
    """A family by transformers' `model_type`."""

    arch: str
    """Its name in llama.cpp and in `gguf.MODEL_ARCH_NAMES`."""
    interleaved: bool = False
    """Whether llama.cpp rotates neighbouring dimensions of a head, so that rows of q and k are permuted."""
    norm_offset: float = 0.0
    """What the model adds to the weight of every norm, which the file's weights include."""
    activation: str = "silu"
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Settings of config.json that must have this value if they are there."""
    rope: tuple[str, ...] = ("default", "linear", "yarn")
    """The kinds of RoPE scaling that llama.cpp computes for the family."""
    untied: bool = True
    """Whether llama.cpp reads a head that is not tied to the embeddings."""
    windowed: bool = False
    """Whether llama.cpp computes the sliding windows of its layers."""
    more: Callable[[Any], Settings] = lambda config: iter(())
    """Further settings, which may raise UserError."""


def family_of(config: Any) -> Family:
    """Return the family of a transformers config. Raises UserError if it is not one that can be written."""
    kind = str(config.model_type)
    family = FAMILIES.get(kind)
    if family is None:
        raise UserError(
            f"model_type {kind!r}: this family is not written as GGUF, only those that were compared with llama.cpp: "
            f"{', '.join(FAMILIES)}. llama.cpp's own convert_hf_to_gguf.py may take a merged folder of it"
        )
    activation = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
    activation = getattr(config, "hidden_activation", None) or activation
    if activation not in (family.activation, *_SAME.get(family.activation, ())):
        _refuse(kind, "hidden_act", activation, family.activation)
    for name, value in family.fixed.items():
        actual = getattr(config, name, value)
        if actual != value and (actual or value):  # None and False say the same
            _refuse(kind, name, actual, value)
    return family


_SAME = {"silu": ("swish",), "gelu_pytorch_tanh": ("gelu_new",)}


def _refuse(kind: str, name: str, value: Any, assumed: Any) -> None:
    raise UserError(
        f"config.json: {name} is {value!r}, and llama.cpp assumes {assumed!r} for {kind}, so the file would compute "
        "something else; it is not written"
    )


# --- Settings of single families -------------------------------------------------------------------------------------


def _experts(width: str) -> Callable[[Any], Settings]:
    def more(config: Any) -> Settings:
        yield "expert_count", _count(config, "num_local_experts", "num_experts")
        yield "expert_used_count", config.num_experts_per_tok
        if (size := getattr(config, width, None)) is not None and width != "intermediate_size":
            yield "expert_feed_forward_length", size
        if (shared := getattr(config, "shared_expert_intermediate_size", None)) is not None:
            yield "expert_shared_feed_forward_length", shared
        dense = [*(getattr(config, "mlp_only_layers", None) or ())]
        if dense or getattr(config, "decoder_sparse_step", 1) != 1:
            raise UserError(f"{config.model_type}: some of its layers have no experts, which llama.cpp does not read")

    return more


def _count(config: Any, *names: str) -> int:
    return next(getattr(config, name) for name in names if getattr(config, name, None) is not None)


def _gemma2(config: Any) -> Settings:
    _scale(config, 46)
    _pattern(config, 2)
    yield "sliding_window", config.sliding_window
    yield "attn_logit_softcapping", _given(config, "attn_logit_softcapping")
    yield "final_logit_softcapping", _given(config, "final_logit_softcapping")


def _gemma3(config: Any) -> Settings:
    _scale(config, 62)
    _pattern(config, 6)
    yield "sliding_window", config.sliding_window
    if getattr(config, "final_logit_softcapping", None):
        yield "final_logit_softcapping", config.final_logit_softcapping


def _scale(config: Any, largest: int) -> None:
    """Check the attention scale, which llama.cpp knows by the number of layers of the family's largest model."""
    heads = config.hidden_size // config.num_attention_heads
    assumed = heads if config.num_hidden_layers == largest else config.head_dim
    if config.query_pre_attn_scalar != assumed:
        _refuse(config.model_type, "query_pre_attn_scalar", config.query_pre_attn_scalar, assumed)


def _pattern(config: Any, every: int) -> None:
    """Check that every n-th layer sees the whole text, and the others a window."""
    kinds = ["sliding_attention" if (at + 1) % every else "full_attention" for at in range(config.num_hidden_layers)]
    if list(config.layer_types) != kinds:
        _refuse(config.model_type, "layer_types", config.layer_types, f"full_attention in every {every}th layer")


def _given(config: Any, name: str) -> float:
    value = getattr(config, name)
    if not value:
        _refuse(config.model_type, name, value, "a number")
    return value


def _granite(config: Any) -> Settings:
    yield "attention_scale", config.attention_multiplier
    yield "embedding_scale", config.embedding_multiplier
    yield "residual_scale", config.residual_multiplier
    yield "logit_scale", config.logits_scaling


def _phi3(config: Any) -> Settings:
    yield "sliding_window", 0  # llama.cpp computes none, and 0 tells that there is none to compute
    if getattr(config, "partial_rotary_factor", 1.0) not in (None, 1.0):
        _refuse("phi3", "partial_rotary_factor", config.partial_rotary_factor, 1.0)


_QWEN = {"use_sliding_window": False}
_GEMMA = {"attention_bias": False, "use_bidirectional_attention": None}
_TANH = "gelu_pytorch_tanh"
FAMILIES: dict[str, Family] = {
    "llama": Family("llama", interleaved=True, rope=("default", "linear", "yarn", "llama3")),
    "mistral": Family("llama", interleaved=True, rope=("default", "linear", "yarn", "llama3")),
    "mixtral": Family("llama", interleaved=True, more=_experts("intermediate_size")),
    "qwen2": Family("qwen2", fixed=_QWEN),
    "qwen3": Family("qwen3", fixed=_QWEN | {"attention_bias": False}),
    "qwen2_moe": Family("qwen2moe", fixed=_QWEN | {"norm_topk_prob": False}, more=_experts("moe_intermediate_size")),
    "qwen3_moe": Family(
        "qwen3moe", fixed=_QWEN | {"norm_topk_prob": True, "attention_bias": False},
        more=_experts("moe_intermediate_size"),
    ),
    "gemma": Family("gemma", norm_offset=1.0, activation=_TANH, fixed=_GEMMA, rope=("default",), untied=False),
    "gemma2": Family(
        "gemma2", norm_offset=1.0, activation=_TANH, fixed=_GEMMA, rope=("default",), untied=False, windowed=True,
        more=_gemma2,
    ),
    "gemma3_text": Family(
        "gemma3", norm_offset=1.0, activation=_TANH, fixed=_GEMMA | {"attn_logit_softcapping": None},
        rope=("default", "linear"), windowed=True, more=_gemma3,
    ),
    "phi3": Family("phi3", rope=("default",), more=_phi3),
    "olmo2": Family("olmo2", fixed={"attention_bias": False}, rope=("default",)),
    "granite": Family("granite", interleaved=True, fixed={"attention_bias": False, "mlp_bias": False}, more=_granite),
}  # fmt: skip
