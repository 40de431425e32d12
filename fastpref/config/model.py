"""The tables [model] and [lora] of a config. Nothing here imports torch."""

import re
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    Strict,
    field_validator,
    model_serializer,
    model_validator,
)

from fastpref.config.losses import Positive
from fastpref.config.paths import ReadPath
from fastpref.config.section import Count, Names, Section

_INITS = ("default", "gaussian", "orthogonal", "pissa", "olora", "loftq")
Layers = Annotated[tuple[int | str, ...], Strict(False)]


class ModelConfig(Section):
    name: ReadPath
    """Names the model: a folder, or a repository of the Hugging Face hub. The name of an adapter stands for its base
    model, and is the same as lora.from."""
    revision: str | None = None
    """Selects a branch, tag or commit of the model on the hub."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Sets the data type of frozen weights; "auto" is float32 on a CPU and bfloat16 on a GPU (float16 where the card
    has no bfloat16). Whatever is trained is float32, without a [lora] table all weights; a GPU multiplies in half
    precision unless this is "float32". "float16" needs a [lora] table."""
    quantization: Literal["none", "nf4", "int8"] = "none"
    """Quantizes the base weights to 4 bits (nf4, with double quantization) or 8 bits (int8); both need a [lora]
    table."""
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


# The keys of [lora] for which a trained adapter has settings of its own.
ADAPTERS_OWN = (
    "rank", "alpha", "rank_pattern", "alpha_pattern", "dropout", "target", "exclude", "layers", "modules_to_save",
    "init", "rslora", "dora",
)  # fmt: skip


class LoraConfig(Section):
    start: ReadPath | None = Field(default=None, alias="from")
    """Names a trained LoRA adapter, which the training continues: its folder, that of a fastpref run, or a repository
    of the hub. Its own settings then stand in place of the keys from rank to dora, except dropout."""
    stack: bool = False
    """Leaves the adapter of lora.from as it is, frozen, and trains a new one on top of it; final/ has both as one."""
    rank: Count = 16
    """Sets the inner dimension of the adapters."""
    alpha: Positive = 32.0
    """Scales the adapters by alpha/rank, or with rslora by alpha/√rank."""
    rank_pattern: dict[str, Count] = Field(default_factory=dict)
    """Gives some modules another rank: names and patterns, as in target, with their ranks. Of several entries that
    match a module, the first counts."""
    alpha_pattern: dict[str, Positive] = Field(default_factory=dict)
    """Gives some modules another alpha, like rank_pattern."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Sets the dropout probability of the adapters' inputs."""
    target: Literal["all-linear"] | Names = "all-linear"
    """Selects the modules that get an adapter: "all-linear" (the linear layers of the language model, without the
    head and routers), or names (lm_head may be one) and patterns, which are regular expressions for a module's
    whole name."""
    exclude: Names = ()
    """Excludes modules, and all modules inside them, from the adapters, by names and patterns."""
    layers: Layers = ()
    """Restricts the adapters inside decoder layers to some layers: indices such as 0 and -1, and slices such as "8:16"
    and "-4:", as in Python; modules outside of the layers are not affected."""
    modules_to_save: Names = ()
    """Names modules that are trained in full, in addition to the adapters, and in float32 like these."""
    init: str = "default"
    """Chooses the adapters' first values: "default" (A uniform, B zero), "gaussian", "orthogonal", parts of the weights
    by "pissa", "pissa_niter_4" (faster) or "olora", which add a frozen half to each adapter, or "loftq", which makes up
    for the rounding to nf4."""
    plus_ratio: Annotated[float, Field(ge=1)] = 1.0
    """Multiplies the learning rate of the adapters' B matrices (LoRA+, arXiv 2402.12354); its authors take 16."""
    rslora: bool = False
    """Uses rank-stabilized scaling (rsLoRA, arXiv 2312.03732)."""
    dora: bool = False
    """Uses weight-decomposed adapters (DoRA, arXiv 2402.09353)."""

    @field_validator("target", "exclude", mode="before")
    @classmethod
    def _one_pattern(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) and is_pattern(value) and value != "all-linear" else value

    @field_validator("init")
    @classmethod
    def _known_values(cls, value: str) -> str:
        if value not in _INITS and re.fullmatch(r"pissa_niter_[1-9]\d*", value) is None:
            near = get_close_matches(value, _INITS, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(f"must be one of {', '.join(_INITS)}, pissa_niter_N, got {value!r}{hint}")
        return value

    @field_validator("layers", mode="before")
    @classmethod
    def _one_slice(cls, value: Any) -> Any:
        return [value] if isinstance(value, str | int) and not isinstance(value, bool) else value

    @field_validator("layers")
    @classmethod
    def _slices_are_slices(cls, value: tuple[int | str, ...]) -> tuple[int | str, ...]:
        for entry in value:
            if isinstance(entry, str) and re.fullmatch(r"(-?\d+)?:(-?\d+)?", entry) is None:
                raise ValueError(f'{entry!r} is neither an index such as 3 nor a slice such as "8:16"')
        return value

    @field_validator("target", "exclude", "rank_pattern", "alpha_pattern")
    @classmethod
    def _patterns_compile(cls, value: Any) -> Any:
        check_patterns(() if isinstance(value, str) else value)
        return value

    @property
    def continues(self) -> bool:
        """Whether the trained adapter is that of `lora.from` itself, with its settings."""
        return self.start is not None and not self.stack

    @model_serializer(mode="wrap")
    def _without_the_adapters_own(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out the keys that the adapter of `lora.from` decides, unless they were set: defaults would be false."""
        content = handler(self)
        unset = set(ADAPTERS_OWN) - self.model_fields_set if self.continues else set()
        return {key: value for key, value in content.items() if key not in unset}

    @model_validator(mode="after")
    def _first_values_fit(self) -> "LoraConfig":
        if self.dora and self.init == "loftq":
            raise ValueError("init: DoRA keeps the norms of the rounded weights, which loftq changes; set dora = false")
        odd = [rank for rank in (self.rank, *self.rank_pattern.values()) if rank % 2]
        if self.init == "orthogonal" and odd:
            raise ValueError(f"init: orthogonal needs even ranks, got {odd[0]}")
        return self

    @model_validator(mode="after")
    def _plain_on_head(self) -> "LoraConfig":
        if self.dora and "lm_head" in self.target:
            raise ValueError("dora: DoRA cannot adapt the head; remove lm_head from target, or set dora = false")
        return self

    @property
    def ranks(self) -> str:
        """The ranks in words."""
        others = sorted({*self.rank_pattern.values()} - {self.rank})
        return f"rank {self.rank}" + (f" (some {', '.join(map(str, others))})" if others else "")


def check_patterns(entries: Iterable[str]) -> None:
    """Raise ValueError for an entry that is meant as a regular expression and is none."""
    for entry in entries:
        try:
            re.compile(entry if is_pattern(entry) else "")
        except re.error as error:
            raise ValueError(f"{entry!r} is not a regular expression: {error}") from None


def is_pattern(entry: str) -> bool:
    """Return whether an entry of `lora.target` or `lora.exclude` is a regular expression instead of a module's name."""
    return re.fullmatch(r"[\w.-]+", entry) is None
