"""The tables [reference], [train], [output] and [log] of a config. Nothing here imports torch."""

from typing import Annotated, Any, Literal

from pydantic import Field, Strict, field_validator, model_validator

from fastpref.config.formats import Functions
from fastpref.config.losses import NonNegative, Positive
from fastpref.config.model import check_patterns
from fastpref.config.optimization import Optimizer, ScheduleName
from fastpref.config.paths import ReadPath, WrittenPath
from fastpref.config.section import Count, Names, Section, Share, steps_or_share
from fastpref.config.stopping import StopConfig

Tracker = Literal["aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb"]
Beta = Annotated[float, Field(ge=0, lt=1)]


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
    the results on disk too. "adapter" is also that of another adapter."""
    adapter: Literal["start", "none"] | None = None
    """Chooses the adapter of the reference: "start" is that of lora.from as it was before the training, "none" the base
    model alone. The default is "start" with lora.from, and "none" without."""
    name: ReadPath | None = None
    """Names another reference: an adapter of the same base model, which shares the base's weights with the policy, or a
    whole model, which is loaded as a frozen copy."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Sets the data type of a frozen copy; "auto" is that of the model."""
    quantization: Literal["auto", "none", "nf4", "int8"] = "auto"
    """Quantizes a frozen copy, except its head, to 4 or 8 bits; "auto" does what model.quantization says."""
    sync: SyncConfig | None = None
    """Moves a copy towards the policy during full fine-tuning (TR-DPO, arXiv 2404.09656): `{ every = 512, mix = 0.6 }`
    makes its weights 0.6 · the policy's + 0.4 · its own after every 512 steps. The mode "auto" is then "copy"."""

    @model_validator(mode="before")
    @classmethod
    def _moves_a_copy(cls, value: Any) -> Any:
        moves = isinstance(value, dict) and value.get("sync") is not None
        return value | {"mode": "copy"} if moves and value.get("mode", "auto") == "auto" else value


class TrainConfig(Section):
    learning_rate: Positive | None = None
    """Sets the highest learning rate; the default is 1e-4 with [lora] and 1e-6 without, for sft 1e-5; a fifth of it for
    lion and twice as much for schedule_free_adamw."""
    schedule: ScheduleName = "auto"
    """Chooses how the learning rate changes after the warm-up, by the names of transformers' get_scheduler; "auto" is
    cosine. constant is constant_with_warmup. reduce_lr_on_plateau and greedy follow the held-out loss."""
    schedule_options: dict[str, bool | int | float | str] = Field(default_factory=dict)
    """Passes options to the schedule's function, such as { num_cycles = 2 }; a number of steps below 1 is a share of
    all."""
    min_lr: Positive | None = None
    """Sets the learning rate at which a schedule ends, for cosine, linear and others that fall to a lowest rate."""
    warmup: NonNegative | None = None
    """Sets the steps of linear warm-up; a number below 1 is a share of all steps, and the default is 0.1."""
    epochs: Positive = 1.0
    """Sets how often the training passes over the data."""
    steps: Count | None = None
    """Sets the number of optimizer steps, in place of epochs."""
    batch: Count = 16
    """Sets how many examples (pairs, or completions for KTO and SFT) an optimizer step has, in however many
    micro-batches."""
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
    optimizer: Optimizer = "adamw"
    """Chooses the optimizer: AdamW or Lion, with moments in 8 bits, or paged, whose moments move to host memory when
    the GPU is full; Adafactor (transformers', without relative steps); Muon for matrices of hidden layers, adapters'
    among them, with AdamW for the rest; or schedule-free AdamW. Other names that transformers has for them are
    understood."""
    betas: Annotated[tuple[Beta, Beta], Strict(False)] | None = None
    """Sets the two decay rates of AdamW's or Lion's moments; the default is [0.9, 0.999], for lion [0.9, 0.99]."""
    epsilon: Positive | None = None
    """Sets AdamW's term against division by zero; the default is 1e-8."""
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
    stop: StopConfig | None = None
    """Ends the run early if evaluations get no better, with the weights of the best one in final/: { after = 3, metric
    = "eval/rewards/accuracies", by = 0.001 } after three evaluations in a row that are not better by more than 0.001.
    It needs held-out data."""
    callbacks: Functions = ()
    """Calls Python functions of yours, "module:function", after every step, every evaluation and the end."""

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
    save_every: Annotated[Count | Share | Literal["auto", "stop"], steps_or_share("auto", "stop")] = "auto"
    """Saves a checkpoint every so many steps (below 1: every such share of all steps) and at the best evaluation;
    "auto" saves one half an hour after the last, and at the best evaluation. "stop" saves only when the run is
    stopped."""
    keep: Count = 2
    """Keeps this number of newest checkpoints, and in addition that of the best evaluation."""
    push_to: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")] | None = None
    """Uploads final/ to this repository of the hub, "user/name", at the end; a new repository is private."""


class LogConfig(Section):
    every: Count = 1
    """Writes metrics every so many steps."""
    trackers: Annotated[tuple[Tracker, ...], Strict(False)] = ()
    """Sends the metrics to trackers too; each needs its package."""
