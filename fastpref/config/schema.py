"""The schema of a config: one strict and frozen table for each section of the TOML file. Nothing here imports torch."""

import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Annotated, Any, Literal, Self, get_type_hints

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    Strict,
    TypeAdapter,
    ValidationInfo,
    field_validator,
    model_validator,
)  # fmt: skip
from pydantic_core import core_schema

from fastpref.config.formats import Format
from fastpref.config.keywords import check_keywords
from fastpref.config.losses import DPO, KTO, LOSSES, LossOptions, NonNegative, Positive
from fastpref.config.paths import ReadPath, WrittenPath


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True,
        protected_namespaces=(),
    )  # fmt: skip


Count = Annotated[int, Field(ge=1)]
Names = Annotated[tuple[str, ...], Strict(False)]


class ModelConfig(_Section):
    name: ReadPath
    """Names the model: a folder, or a repository of the Hugging Face hub."""
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


class LoraConfig(_Section):
    rank: Count = 16
    """Sets the inner dimension of the adapters."""
    alpha: Positive = 32.0
    """Scales the adapters by alpha/rank, or with rslora by alpha/√rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Sets the dropout probability of the adapters' inputs."""
    target: Literal["all-linear"] | Names = "all-linear"
    """Selects the modules that get an adapter: "all-linear" (the linear layers of the language model, without the
    head and routers), or names (lm_head may be one) and patterns, which are regular expressions for a module's
    whole name."""
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


Pairing = Literal["best-worst", "best-rest", "all", "adjacent"]


class DataConfig(_Section):
    path: ReadPath
    """Names the data: a .json, .jsonl, .parquet, .csv or .arrow file, a folder that `save_to_disk` wrote, or a data
    set of the hub."""
    split: str = "train"
    """Selects the split of a data set on the hub, or of a folder with several splits."""
    name: str | None = None
    """Selects the configuration of a data set on the hub."""
    revision: str | None = None
    """Selects a branch, tag or commit of the data set on the hub."""
    format: Format = "auto"
    """Tells how rows are read: the name of a format, a table of its type and options, or "module:function"; "auto"
    recognizes the columns."""
    weight: Positive = 1.0
    """Repeats the rows: 2.5 takes every row twice and half of them once more; 0.3 takes three tenths of them."""
    rows: Count | None = None
    """Reads this number of rows only, from the first one on."""
    pairs: Pairing = "best-worst"
    """Makes pairs of a row with a list of completions: one of its best and its worst, the best with each other one,
    every two, or each with the next worse one. Pairs of the same score are dropped and counted."""
    min_difference: NonNegative = 0.0
    """Drops pairs of such a row whose scores (or ranks) differ by less."""
    on_error: Literal["error", "drop"] = "error"
    """Decides about rows that are broken or of another form: stop with an error, or drop and count them."""


class EvalConfig(_Section):
    fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Holds out this share of the prompts of [[data]], chosen by a hash of the prompt."""
    data: Annotated[tuple[DataConfig, ...], Strict(False)] = ()
    """Holds out other data instead: [[eval.data]] has the keys of [[data]]."""
    every: Count | None = None
    """Evaluates every so many steps, in addition to the start and the end."""
    samples: Annotated[int, Field(ge=0)] = 1
    """Sets how many held-out prompts the model answers before and after the training."""
    sample_tokens: Count = 48
    """Limits such an answer, in tokens."""

    @model_validator(mode="after")
    def _one_source(self) -> "EvalConfig":
        if self.fraction is not None and self.data:
            raise ValueError("fraction and [[eval.data]] both hold out data; remove one of them")
        return self

    @property
    def wanted(self) -> bool:
        return self.fraction is not None or bool(self.data)


class TokensConfig(_Section):
    max_length: Annotated[int, Field(ge=2)] = 2048
    """Limits a prompt with its completion, in tokens."""
    max_prompt_length: Count | None = None
    """Limits a prompt, in tokens."""
    overlong: Literal["truncate", "drop", "error"] = "truncate"
    """Decides about longer rows. "truncate" first cuts the prompt down to half of max_length (a chat loses its oldest
    turns, a text its beginning), then the ends of the completions; it drops the row if the question does not fit."""
    score: Literal["assistant", "all"] = "assistant"
    """Scores, in a completion of several turns, only what the assistant writes and how its turns end, or all of it (as
    TRL does)."""
    strict: bool = False
    """Stops with an error at rows that cannot be used (empty or equal completions), instead of dropping them."""
    duplicates: Literal["keep", "drop"] = "keep"
    """Decides about rows that repeat another row exactly, in the same source or another."""
    chat_template: ReadPath | None = None
    """Replaces the tokenizer's chat template by a Jinja template, a file with one, or a known name (chatml, llama3,
    ...)."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Passes keywords to the chat template, such as { enable_thinking = false }; the keywords of a row take
    precedence."""

    @field_validator("chat_template_kwargs")
    @classmethod
    def _known_keywords(cls, given: dict[str, Any] | None) -> dict[str, Any] | None:
        check_keywords(given or {})
        return given or None


class ReferenceConfig(_Section):
    mode: Literal["auto", "adapter", "copy", "precompute"] = "auto"
    """Chooses where the reference's log-probabilities come from: in every step from the model without its adapters or
    from a frozen copy, or from a pass before the training ("precompute") whose results are kept on disk; "auto" is
    precompute without [lora], and with it the model without its adapters, which computes each completion once and keeps
    the results on disk too."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Sets the data type of a frozen copy; "auto" is that of the model."""
    quantization: Literal["auto", "none", "nf4", "int8"] = "auto"
    """Quantizes a frozen copy, except its head, to 4 or 8 bits; "auto" does what model.quantization says."""


class TrainConfig(_Section):
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


class OutputConfig(_Section):
    dir: WrittenPath | None = None
    """Names the folder of the run; the default is runs/<name of the config>-<loss>, with a number added if that
    exists."""
    save_every: Count | None = None
    """Saves a checkpoint every so many steps and at the best evaluation; by default only when the run is stopped."""
    keep: Count = 2
    """Keeps this number of newest checkpoints, and in addition that of the best evaluation."""
    push_to: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")] | None = None
    """Uploads final/ to this repository of the hub, "user/name", at the end; a new repository is private."""


class LogConfig(_Section):
    every: Count = 1
    """Writes metrics every so many steps."""
    trackers: Annotated[tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...], Strict(False)] = ()
    """Sends the metrics to trackers too; each needs its package."""


class _ByType:
    """Makes the losses a union that is told apart by `type`; without a type it is DPO."""

    @staticmethod
    def __get_pydantic_core_schema__(_: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        choices = {name: handler.generate_schema(options) for name, options in LOSSES.items()}
        return core_schema.tagged_union_schema(choices, _loss_type)


def _loss_type(value: Any) -> str:
    kind = value.get("type", "dpo") if isinstance(value, dict) else getattr(value, "type", "dpo")
    return kind if isinstance(kind, str) else "dpo"


class Config(_Section):
    """A whole training run."""

    model: ModelConfig
    """Describes the model to train."""
    lora: LoraConfig | None = None
    """Trains adapters; without this table the whole model is trained."""
    loss: Annotated[LossOptions, _ByType] = Field(default_factory=DPO)
    """Chooses the loss; the other keys depend on its type."""
    data: Annotated[tuple[DataConfig, ...], Strict(False), Field(min_length=1)]
    """Names the preferences to train on; several [[data]] are joined."""
    eval: EvalConfig = EvalConfig()
    """Decides which data are held out, and when the model is evaluated on them."""
    tokens: TokensConfig = TokensConfig()
    """Decides how rows become tokens."""
    reference: ReferenceConfig = ReferenceConfig()
    """Describes the reference model, with which DPO, IPO, KTO, PL and LiPO compare."""
    train: TrainConfig = TrainConfig()
    """Sets up the optimization."""
    output: OutputConfig = OutputConfig()
    """Decides what is written, and where."""
    log: LogConfig = LogConfig()
    """Decides what is logged."""

    @model_validator(mode="after")
    def _sections_agree(self) -> "Config":
        model, reference, train = self.model, self.reference, self.train
        not_copied = 'only a frozen copy has this key; set reference.mode = "copy", or remove it'
        checks = [
            (reference.mode == "adapter" and self.lora is None,
             'reference.mode: "adapter" needs a [lora] table; full fine-tuning takes "copy"'),
            (reference.dtype != "auto" and reference.mode != "copy", f"reference.dtype: {not_copied}"),
            (reference.quantization != "auto" and reference.mode != "copy", f"reference.quantization: {not_copied}"),
            (model.quantization != "none" and self.lora is None,
             f'model.quantization: "{model.quantization}" weights cannot be trained themselves; add a [lora] table'),
            (model.streaming is True and self.lora is None,
             "model.streaming: only frozen weights can stay in host memory; add a [lora] table"),
            (model.streaming is True and reference.mode == "copy" and self.loss.uses_reference,
             'model.streaming: a frozen copy (reference.mode = "copy") would lie on the GPU as a whole; set '
             'reference.mode to "adapter", or model.streaming to false'),
            (model.attention in ("flex", "varlen") and train.layout == "padded",
             f'model.attention: "{model.attention}" computes tree and packed rows only; set train.layout = "auto", or '
             "remove it"),
            (isinstance(self.loss, KTO) and self.loss.kl == "batch" and train.batch == 1,
             "train.batch: KTO compares each row with the next one of its batch, so a batch needs two rows; "
             'set train.batch to 2 or more, or loss.kl = "none"'),
            (train.offload_activations and train.checkpointing is False,
             "train.offload_activations: only gradient checkpointing has inputs to move; set "
             'train.checkpointing to true or "auto"'),
            (self.eval.every is not None and not self.eval.wanted,
             "eval.every: there is nothing to evaluate on; set eval.fraction or add [[eval.data]]"),
        ]  # fmt: skip
        mistakes = [message for wrong, message in checks if wrong]
        for table, sources in (("data", self.data), ("eval.data", self.eval.data)):
            mistakes += [f"{table}.{at}.{text}" for at, data in enumerate(sources) for text in _unused(data, self.loss)]
        if mistakes:
            raise ValueError("\n".join(mistakes))
        return self

    @model_validator(mode="after")
    def _weights_can_be_trained(self, info: ValidationInfo) -> "Config":
        trains = (info.context or {}).get("trains", True)
        if trains and self.model.dtype == "float16" and self.lora is None:
            raise ValueError(
                'model.dtype: "float16" weights cannot be trained themselves; add a [lora] table, or leave the key '
                "out: weights are then float32, and a GPU multiplies in half precision"
            )
        return self

    @property
    def learning_rate(self) -> float:
        return self.train.learning_rate or (1e-6 if self.lora is None else 1e-4)

    @property
    def tokens_per_microbatch(self) -> int:
        return self.train.tokens_per_microbatch or 2 * self.tokens.max_length

    def but(self, changes: Mapping[str, Any]) -> Self:
        """Return the config with other values, by dotted keys or whole tables: `{"train.batch": 8, "lora": {}}`.

        Each table that changes is validated. Whether the tables agree with each other is not checked, because not
        every config is that of a run: the config of a quantized reference has no [lora], for example.

        Raises pydantic.ValidationError for an unknown key and for a value that the table refuses, and KeyError for an
        unknown table.
        """
        tables: dict[str, Any] = {}
        for key, value in changes.items():
            table, _, name = key.partition(".")
            if name:
                current = (tables[table] if table in tables else getattr(self, table, None)) or {}
                value = {**(current if isinstance(current, Mapping) else vars(current)), name: value}
            tables[table] = value
        return self.model_copy(update={t: _table(type(self), t).validate_python(v) for t, v in tables.items()})


def _unused(data: DataConfig, loss: LossOptions) -> Iterator[str]:
    """Yield messages about the keys of a source that make pairs, each with its key, if the loss has no use for them."""
    for key in ("pairs", "min_difference"):
        if getattr(data, key) == DataConfig.model_fields[key].default:
            continue
        if loss.listwise:
            yield f"{key}: {loss.type} takes lists of completions whole; remove this key"
        elif not loss.paired and key == "pairs":
            reason = f"{loss.type} takes the best completion of a list as a good one and the worst as a bad one"
            yield f"{key}: {reason}; remove this key, or use a loss of pairs"


@cache
def _table(schema: type[Config], name: str) -> TypeAdapter[Any]:
    return TypeAdapter(get_type_hints(schema, include_extras=True)[name])
