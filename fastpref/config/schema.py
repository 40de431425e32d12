"""The schema of a config: one strict and frozen table for each section of the TOML file. Nothing here imports torch."""

import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Annotated, Any, Literal, Self, get_type_hints

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    PlainValidator,
    Strict,
    TypeAdapter,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import core_schema

from fastpref.config.losses import DPO, KTO, LOSSES, LossOptions, NonNegative, Positive
from fastpref.config.paths import PathMark, ReadPath, WrittenPath


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )


Count = Annotated[int, Field(ge=1)]
Names = Annotated[tuple[str, ...], Strict(False)]


class ModelConfig(_Section):
    name: ReadPath
    """A folder, or a model's name on the Hugging Face hub."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the weights; "auto" is float32 on a CPU and bfloat16 (float16 on cards without it) on a GPU."""
    quantization: Literal["none", "nf4", "int8"] = "none"
    """Base weights in 4 bits (nf4, its scales quantised too) or 8, with [lora] beside them."""
    attention: Literal["auto", "flex", "sdpa"] = "auto"
    """FlexAttention or SDPA for tree and packed rows; "auto" is flex on a GPU where it can be compiled, else sdpa."""
    liger: Literal["auto"] | bool = "auto"
    """Norms, RoPE and gated MLPs by liger-kernel; "auto" is on a GPU, for the models that it knows."""
    trust_remote_code: bool = False
    """Whether to run Python code that comes with a model from the hub."""


class LoraConfig(_Section):
    rank: Count = 16
    """The adapters' inner dimension."""
    alpha: Positive = 32.0
    """Adapters are scaled by alpha/rank (rslora: alpha/√rank)."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout before the adapters."""
    target: Literal["all-linear"] | Names = "all-linear"
    """Which modules get an adapter: the language model's linear layers without the head and routers, or names
    (lm_head may be among them) and patterns, regular expressions that match the whole name of a module."""
    exclude: Names = ()
    """Names and patterns of modules that get none, nor anything in them."""
    modules_to_save: Names = ()
    """Modules trained in full beside the adapters."""
    rslora: bool = False
    """Rank-stabilised scaling, arXiv 2312.03732."""
    dora: bool = False
    """Weight-decomposed adapters, arXiv 2402.09353."""

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
                raise ValueError(f"{entry!r} is no regular expression: {error}") from None
        return value

    @model_validator(mode="after")
    def _plain_on_head(self) -> "LoraConfig":
        if self.dora and "lm_head" in self.target:
            raise ValueError("dora: not on the head; leave lm_head out of target, or set dora = false")
        return self


def is_pattern(entry: str) -> bool:
    """Whether an entry of `lora.target` or `lora.exclude` is a regular expression, not a module's name."""
    return re.fullmatch(r"[\w.-]+", entry) is None


def _known_format(value: Any) -> Any:
    from fastpref.data.rows.formats import check_format

    check_format(value)
    return value


def _map_format(value: Any, change: Callable[[str], Any]) -> Any:
    """Apply `change` to the file of a function `module:function` and to the chat template of a format."""
    from fastpref.data.rows.function import is_function, map_file

    if isinstance(value, str):
        return map_file(value, change) if is_function(value) else value
    template = value.get("chat_template") if isinstance(value, dict) else None
    return {**value, "chat_template": change(template)} if template and isinstance(template, str) else value


Format = Annotated[
    str | dict[str, Any],
    PlainValidator(_known_format),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "object"}]}),
    PathMark(inside=_map_format),
]


class DataConfig(_Section):
    path: ReadPath
    """A .json, .jsonl, .parquet, .csv or .arrow file, a folder of `save_to_disk`, or a data set's name on the hub."""
    split: str = "train"
    """Which split of a hub data set, or of a folder with several."""
    name: str | None = None
    """The configuration of a hub data set."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    format: Format = "auto"
    """How rows are read: a name, a table of type and options, or "module:function"; "auto" goes by the columns."""
    weight: Positive = 1.0
    """How often the rows are used: 2.5 is twice, and half of them once more; 0.3 is three tenths of them."""
    rows: Count | None = None
    """Use only the first rows."""
    on_error: Literal["error", "drop"] = "error"
    """What happens to rows that are broken or of another form: an error, or left out and counted."""


class EvalConfig(_Section):
    fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Hold out this share of the prompts of [[data]], chosen by a hash of the prompt."""
    data: Annotated[tuple[DataConfig, ...], Strict(False)] = ()
    """Or hold out other data: [[eval.data]], with the keys of [[data]]."""
    every: Count | None = None
    """Evaluate every so many steps, beside the start and the end."""
    samples: Annotated[int, Field(ge=0)] = 1
    """How many held-out prompts to answer before and after the training."""
    sample_tokens: Count = 48
    """The longest such answer, in tokens."""

    @model_validator(mode="after")
    def _one_source(self) -> "EvalConfig":
        if self.fraction is not None and self.data:
            raise ValueError("fraction and [[eval.data]] both hold out data; give one of them")
        return self

    @property
    def wanted(self) -> bool:
        return self.fraction is not None or bool(self.data)


class TokensConfig(_Section):
    max_length: Annotated[int, Field(ge=2)] = 2048
    """Tokens of a prompt with its response, at most."""
    max_prompt_length: Count | None = None
    """Tokens of a prompt, at most."""
    overlong: Literal["truncate", "drop", "error"] = "truncate"
    """What happens to longer rows: cut (a chat loses its oldest turns whole, a text its beginning, down to half of
    max_length; then the responses their ends; dropped if the question does not fit), dropped, or an error."""
    score: Literal["assistant", "all"] = "assistant"
    """What is scored of a response of several turns: the assistant's words and their ends, or all of it (as TRL)."""
    strict: bool = False
    """Make rows that cannot be used (empty or equal responses) an error instead of dropping them."""
    duplicates: Literal["keep", "drop"] = "keep"
    """What happens to rows that repeat another one exactly, in the same source or another."""
    chat_template: ReadPath | None = None
    """A Jinja template, a file holding one, or a known name (chatml, llama3, ...), instead of the tokenizer's own."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Keywords for the chat template, such as { enable_thinking = false }; a row's own come before them."""

    @field_validator("chat_template_kwargs")
    @classmethod
    def _known_keywords(cls, given: dict[str, Any] | None) -> dict[str, Any] | None:
        from fastpref.data.template.keywords import check_keywords

        check_keywords(given or {})
        return given or None


class ReferenceConfig(_Section):
    mode: Literal["auto", "adapter", "copy", "precompute"] = "auto"
    """Where the reference's log-probabilities come from: the model with its adapters off, a frozen copy, or a pass
    before training whose numbers are kept on disk; "auto" is adapter with [lora] and precompute without."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of a frozen copy's weights; "auto" is the model's own."""
    quantization: Literal["auto", "none", "nf4", "int8"] = "auto"
    """A frozen copy's body in 4 bits or 8, or in neither; "auto" is as the model's."""


class TrainConfig(_Section):
    learning_rate: Positive | None = None
    """The highest learning rate; 1e-4 with [lora] and 1e-6 without if left out."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup: NonNegative = 0.1
    """Steps of linear warm-up, or below 1 the share of all steps."""
    epochs: Positive = 1.0
    """Passes over the data."""
    steps: Count | None = None
    """Optimizer steps; overrides epochs."""
    batch: Count = 16
    """Pairs (KTO: rows) an optimizer step, however many micro-batches they take."""
    tokens_per_microbatch: Count | None = None
    """Tokens computed at once; 2 · tokens.max_length if left out."""
    layout: Literal["auto", "tree", "packed", "padded"] = "auto"
    """tree: prompts computed once and rows packed; packed: prompts repeated; padded: one row a sequence."""
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = "adamw"
    """AdamW; with moments in 8 bits; or with moments that a full GPU moves to host memory."""
    weight_decay: NonNegative = 0.0
    """AdamW's weight decay, on matrices only."""
    max_grad_norm: Positive = 1.0
    """Gradients are scaled down to this norm."""
    checkpointing: Literal["auto"] | bool = "auto"
    """Compute activations twice instead of holding them; "auto": on a GPU, in as many layers as its memory asks."""
    offload_activations: bool = False
    """Keep the inputs of layers that are computed twice in host memory instead of the GPU's."""
    seed: int = 42
    """Of the data's order, the adapters and dropout."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """What to do when a loss or gradient is not finite: stop before the step, or leave it out (ten in a row stop)."""


class OutputConfig(_Section):
    dir: WrittenPath | None = None
    """The run's folder; runs/<name of the config>-<loss> if left out, with a number added when that exists."""
    save_every: Count | None = None
    """Save a checkpoint every so many steps, and at the best evaluation; left out, only when the run is stopped."""
    keep: Count = 2
    """How many checkpoints to keep, the newest ones; that of the best evaluation is kept beside them."""
    push_to: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")] | None = None
    """A repository of the hub, "user/name", to upload final/ to at the end; it is made private if it is not there."""


class LogConfig(_Section):
    every: Count = 1
    """Write metrics every so many steps."""
    trackers: Annotated[tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...], Strict(False)] = ()
    """Where else metrics go; each needs its package."""


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
    """The model to train."""
    lora: LoraConfig | None = None
    """Train adapters; without this table the whole model is trained."""
    loss: Annotated[LossOptions, _ByType] = Field(default_factory=DPO)
    """What is optimised; the other keys depend on its type."""
    data: Annotated[tuple[DataConfig, ...], Strict(False), Field(min_length=1)]
    """The preferences to train on; several [[data]] are joined."""
    eval: EvalConfig = EvalConfig()
    """What is held out, and when the model is evaluated on it."""
    tokens: TokensConfig = TokensConfig()
    """From rows to tokens."""
    reference: ReferenceConfig = ReferenceConfig()
    """The model that DPO, IPO and KTO compare with."""
    train: TrainConfig = TrainConfig()
    """The optimisation."""
    output: OutputConfig = OutputConfig()
    """What is written."""
    log: LogConfig = LogConfig()
    """What is logged."""

    @model_validator(mode="after")
    def _sections_agree(self) -> "Config":
        mistakes = []
        if self.reference.mode == "adapter" and self.lora is None:
            mistakes.append('reference.mode: "adapter" needs a [lora] table; full fine-tuning takes "copy"')
        for key in ("dtype", "quantization"):
            if getattr(self.reference, key) != "auto" and self.reference.mode != "copy":
                mistakes.append(
                    f'reference.{key}: only a frozen copy has one; set reference.mode = "copy", or leave the key out'
                )
        if self.model.quantization != "none" and self.lora is None:
            mistakes.append(
                f'model.quantization: "{self.model.quantization}" weights cannot be trained themselves; add a [lora] '
                "table"
            )
        if self.model.attention == "flex" and self.train.layout == "padded":
            mistakes.append(
                'model.attention: "flex" computes tree and packed rows only; set train.layout = "auto", or drop the key'
            )
        if isinstance(self.loss, KTO) and self.loss.kl == "batch" and self.train.batch == 1:
            mistakes.append(
                "train.batch: KTO compares each row with the next one of its batch, so a batch needs two rows; "
                'set train.batch to 2 or more, or loss.kl = "none"'
            )
        if self.train.offload_activations and self.train.checkpointing is False:
            mistakes.append(
                "train.offload_activations: only layers that are computed twice have inputs to move; set "
                'train.checkpointing to true or "auto"'
            )
        if self.eval.every is not None and not self.eval.wanted:
            mistakes.append("eval.every: there is nothing to evaluate on; set eval.fraction or add [[eval.data]]")
        if mistakes:
            raise ValueError("\n".join(mistakes))
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


@cache
def _table(schema: type[Config], name: str) -> TypeAdapter[Any]:
    return TypeAdapter(get_type_hints(schema, include_extras=True)[name])
