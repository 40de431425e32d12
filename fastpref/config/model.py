"""The tables [model] and [lora] of a config. Nothing here imports torch."""

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from fastpref.config.losses import Positive
from fastpref.config.paths import ReadPath
from fastpref.config.section import Count, Names, Section


class ModelConfig(Section):
    name: ReadPath
    """Names the model: a folder, or a repository of the Hugging Face hub."""
    revision: str | None = None
    """Selects a branch, tag or commit of the model on the hub."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Sets the data type of frozen weights; "auto" is float32 on a CPU and bfloat16 on a GPU (float16 where the card
    has no bfloat16). Whatever is trained is float32, without a [lora] table all weights; a GPU multiplies in half
    precision unless this is "float32". "float16" needs a [lora] table."""
    quantization: Literal["none", "nf4", "int8"] = "none"
    """Quantizes the weights of linear layers and of experts to 4 bits (nf4, with double quantization) or 8 bits
    (int8); both need a [lora] table."""
    attention: Literal["auto", "flex", "varlen", "sdpa"] = "auto"
    """Chooses FlexAttention, FlashAttention-2 ("varlen", which needs the package flash-attn 2.6 or newer) or SDPA for
    tree and packed rows; "auto" is flex on a GPU that can compile it, else varlen where that package works, and sdpa
    elsewhere."""
    streaming: Literal["auto"] | bool = "auto"
    """Keeps the frozen weights of the decoder layers, embeddings and head in host memory, and copies each layer to the
    GPU when it computes; it needs a [lora] table. "auto" does so only if a step does not fit the GPU otherwise, and
    keeps as many layers on the GPU as fit."""
    liger: Literal["auto"] | bool = "auto"
    """Computes norms, RoPE and gated MLPs with liger-kernel; "auto" does so on a GPU, for the models that it
    supports."""
    trust_remote_code: bool = False
    """Allows the Python code that comes with a model on the hub to run."""


class LoraConfig(Section):
    rank: Count = 16
    """Sets the inner dimension of the adapters."""
    alpha: Positive = 32.0
    """Scales the adapters by alpha/rank, or with rslora by alpha/√rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Sets the dropout probability of the adapters' inputs."""
    target: Literal["all-linear"] | Names = "all-linear"
    """Selects the modules that get an adapter: "all-linear" (the linear layers of the language model, without the
    head and routers, and experts where PEFT counts them among these), or names (lm_head may be one, or
    experts.down_proj, or experts for all weights of these) and patterns, which are regular expressions for a module's
    or an experts' parameter's whole name."""
    exclude: Names = ()
    """Excludes modules, and all modules inside them, from the adapters, by names and patterns."""
    modules_to_save: Names = ()
    """Names modules that are trained in full, in addition to the adapters, and in float32 like these."""
    rslora: bool = False
    """Uses rank-stabilized scaling (rsLoRA, arXiv 2312.03732)."""
    dora: bool = False
    """Uses weight-decomposed adapters (DoRA, arXiv 2402.09353)."""

    @field_validator("target", "exclude", mode="before")
    @classmethod
    def _one_pattern(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) and is_pattern(value) and value != "all-linear" else value

    @field_validator("target", "exclude")
    @classmethod
    def _patterns_compile(cls, value: Any) -> Any:
        for entry in () if isinstance(value, str) else value:
            try:
                re.compile(entry if is_pattern(entry) else "")
            except re.error as error:
                raise ValueError(f"{entry!r} is not a regular expression: {error}") from None
        return value

    @model_validator(mode="after")
    def _plain_on_head(self) -> "LoraConfig":
        if self.dora and "lm_head" in self.target:
            raise ValueError("dora: DoRA cannot adapt the head; remove lm_head from target, or set dora = false")
        return self


def is_pattern(entry: str) -> bool:
    """Return whether an entry of `lora.target` or `lora.exclude` is a regular expression instead of a module's name."""
    return re.fullmatch(r"[\w.-]+", entry) is None
