"""The tables [reference], [train], [output] and [log] of a config. Nothing here imports torch."""

from typing import Annotated, Any, Literal

from pydantic import Field, Strict, field_validator

from fastpref.config.losses import NonNegative, Positive
from fastpref.config.model import check_patterns
from fastpref.config.paths import WrittenPath
from fastpref.config.section import Count, Names, Section


class SyncConfig(Section):
    every: Count = 512
    """Moves the reference every so many steps."""
    mix: Annotated[float, Field(gt=0, le=1)] = 0.6
    """Sets the policy's share in the moved reference."""


class ReferenceConfig(Section):
    mode: Literal["auto", "adapter", "copy", "precompute"] = "auto"
    """Chooses where the reference's log-probabilities come from: in every step from the model without its adapters or
    from a frozen copy, or from a pass before the training ("precompute") whose results are kept on disk; "auto" is
    precompute without [lora], and with it the model without its adapters, which computes each completion once and keeps
    the results on disk too."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Sets the data type of a frozen copy; "auto" is that of the model."""
    quantization: Literal["auto", "none", "nf4", "int8"] = "auto"
    """Quantizes a frozen copy, except its head, to 4 or 8 bits; "auto" does what model.quantization says."""
    sync: SyncConfig | None = None
    """Moves a copy towards the policy during full fine-tuning (TR-DPO, arXiv 2404.09656): `{ every = 512, mix = 0.6 }`
    makes its weights 0.6 · the policy's + 0.4 · its own after every 512 steps."""


class TrainConfig(Section):
    learning_rate: Positive | None = None
    """Sets the highest learning rate; the default is 1e-4 with [lora] and 1e-6 without."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Chooses how the learning rate falls after the warm-up."""
    warmup: NonNegative = 0.1
    """Sets the steps of linear warm-up; a number below 1 is a share of all steps."""
    epochs: Positive = 1.0
    """Sets how often the training passes over the data."""
    steps: Count | None = None
    """Sets the number of optimizer steps, in place of epochs."""
    batch: Count = 16
    """Sets how many examples (pairs, or completions for KTO) an optimizer step has, in however many micro-batches."""
    tokens_per_microbatch: Count | None = None
    """Limits the tokens that are computed at once; the default is 2 · tokens.max_length."""
    layout: Literal["auto", "tree", "packed", "padded"] = "auto"
    """Lays out a micro-batch: "tree" is one row that computes every beginning that sequences share once (prompts, but
    also system prompts, questions of several rows, conversations), "packed" one row that repeats prompts, "padded" a
    row a sequence; "auto" is tree where the attention of the model allows it."""
    freeze: Names = ()
    """Names modules and parameters that full fine-tuning leaves as they are, by names and patterns as in lora.target:
    "embed_tokens", "layers.0"."""
    neftune_alpha: Positive | None = None
    """Adds uniform noise of at most alpha/√(L · d) to the embeddings of training passes, where L is a sequence's tokens
    and d the model's width (NEFTune, arXiv 2310.05914); 5 is usual."""
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = "adamw"
    """Chooses AdamW, AdamW with moments in 8 bits, or a paged one, whose moments move to host memory when the GPU
    is full."""
    weight_decay: NonNegative = 0.0
    """Sets the weight decay, which is applied to matrices only."""
    max_grad_norm: Positive = 1.0
    """Limits the norm of the gradient."""
    checkpointing: Literal["auto"] | bool = "auto"
    """Enables gradient checkpointing; "auto" enables it on a GPU, for as many layers as its memory needs."""
    offload_activations: bool = False
    """Moves the inputs of checkpointed layers from GPU memory to host memory."""
    seed: int = 42
    """Seeds the order of the data, the adapters and dropout."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """Decides about a loss or gradient that is not finite: stop before the step, or skip the step (ten in a row
    stop)."""

    @field_validator("freeze", mode="before")
    @classmethod
    def _one_entry(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("freeze")
    @classmethod
    def _patterns_compile(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        check_patterns(value)
        return value


class OutputConfig(Section):
    dir: WrittenPath | None = None
    """Names the folder of the run; the default is runs/<name of the config>-<loss>, with a number added if that
    exists."""
    save_every: Count | None = None
    """Saves a checkpoint every so many steps and at the best evaluation; by default only when the run is stopped."""
    keep: Count = 2
    """Keeps this number of newest checkpoints, and in addition that of the best evaluation."""
    push_to: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")] | None = None
    """Uploads final/ to this repository of the hub, "user/name", at the end; a new repository is private."""


class LogConfig(Section):
    every: Count = 1
    """Writes metrics every so many steps."""
    trackers: Annotated[tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...], Strict(False)] = ()
    """Sends the metrics to trackers too; each needs its package."""
