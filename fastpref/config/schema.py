"""The schema of a config: one strict and frozen table for each section of the TOML file. Nothing here imports torch."""

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Annotated, Any, Self, get_type_hints

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    GetCoreSchemaHandler,
    Strict,
    TypeAdapter,
    ValidationInfo,
    model_validator,
)
from pydantic_core import core_schema

from fastpref.config.data import DataConfig, EvalConfig, TokensConfig
from fastpref.config.formats import CHATS, parse_format, writes_text
from fastpref.config.losses import DPO, KTO, LOSSES, SMOOTHED_VARIANTS, LossOptions
from fastpref.config.model import LoraConfig, ModelConfig
from fastpref.config.optimization import OPTIMIZERS, SCHEDULES, optimization_mistakes
from fastpref.config.section import Section
from fastpref.config.stopping import stop_mistakes
from fastpref.config.training import LogConfig, OutputConfig, ReferenceConfig, TrainConfig


class _ByType:
    """Makes the losses a union that is told apart by `type`; without a type it is DPO."""

    @staticmethod
    def __get_pydantic_core_schema__(_: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        choices = {name: handler.generate_schema(options) for name, options in LOSSES.items()}
        return core_schema.tagged_union_schema(choices, _loss_type)


def _loss_type(value: Any) -> str:
    kind = value.get("type", "dpo") if isinstance(value, dict) else getattr(value, "type", "dpo")
    return kind if isinstance(kind, str) else "dpo"


def _table_or_none(value: Any) -> Any:
    """Return true and false as a table with the defaults and as none, so that a command line can switch it."""
    return ({} if value else None) if isinstance(value, bool) else value


class Config(Section):
    """A whole training run."""

    model: ModelConfig
    """Describes the model to train."""
    lora: Annotated[LoraConfig | None, BeforeValidator(_table_or_none)] = None
    """Trains adapters; without this table, or with lora = false, the whole model is trained."""
    loss: Annotated[LossOptions, _ByType] = Field(default_factory=DPO)
    """Chooses the loss; the other keys depend on its type."""
    data: Annotated[tuple[DataConfig, ...], Strict(False), Field(min_length=1)]
    """Names the rows to train on; several [[data]] are joined."""
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
        compared = self.loss.uses_reference
        useless = () if compared or reference.sync is not None else ("mode", "adapter", "name", "dtype", "quantization")
        useless = [key for key in useless if getattr(reference, key) != ReferenceConfig.model_fields[key].default]
        # Whether the name is a model's is seen later.
        copies = reference.mode == "copy" or reference.name is not None or not compared
        not_copied = 'only a frozen copy has this key; set reference.mode = "copy", or remove it'
        checks = [
            *((True, f"reference.{key}: {self.loss.type} has no reference; remove the key") for key in useless),
            (reference.mode == "adapter" and self.lora is None and compared,
             'reference.mode: "adapter" needs a [lora] table; full fine-tuning takes "copy"'),
            (reference.dtype != "auto" and not copies, f"reference.dtype: {not_copied}"),
            (reference.quantization != "auto" and not copies, f"reference.quantization: {not_copied}"),
            (reference.adapter is not None and reference.name is not None and compared,
             "reference.name: reference.adapter chooses the reference already; remove one of them"),
            (reference.sync is not None and not self.loss.uses_reference,
             f"reference.sync: {self.loss.type} has no reference to move; remove it"),
            (reference.sync is not None and self.loss.uses_reference and self.lora is not None,
             "reference.sync: a mix of adapters of some rank has a higher rank, and quantized weights have no mix, so "
             "only full fine-tuning moves its reference; remove sync, or [lora]"),
            (reference.sync is not None and self.loss.uses_reference and self.lora is None
             and (reference.mode != "copy" or reference.name is not None),
             'reference.sync: only a copy of the model itself can be moved; set reference.mode = "copy" without '
             "reference.name, or remove it"),
            (reference.sync is not None and reference.mode == "copy"
             and (reference.dtype not in ("auto", "float32") or reference.quantization not in ("auto", "none")),
             "reference.sync: a copy in fewer bits would round small moves off; remove reference.dtype and "
             "reference.quantization, or sync"),
            (model.quantization != "none" and self.lora is None,
             f'model.quantization: "{model.quantization}" weights cannot be trained themselves; add a [lora] table'),
            (model.streaming is True and self.lora is None,
             "model.streaming: only frozen weights can stay in host memory; add a [lora] table"),
            (model.streaming is True and reference.mode == "copy" and self.loss.uses_reference,
             'model.streaming: a frozen copy (reference.mode = "copy") would lie on the GPU as a whole; set '
             'reference.mode to "adapter", or model.streaming to false'),
            *((wrong and bool(self.tokens.add), f"tokens.add: {message}") for wrong, message in _new_tokens(self)),
            (bool(train.freeze) and self.lora is not None,
             "train.freeze: with a [lora] table all weights but the adapters are frozen; remove one of the two"),
            (self.lora is not None and self.lora.init == "loftq" and model.quantization != "nf4",
             'lora.init: "loftq" makes up for the rounding to 4 bits; set model.quantization = "nf4", or leave it out'),
            (self.lora is not None and self.lora.init == "loftq" and self.lora.start is not None,
             "lora.init: what rounding has lost is no start for an adapter on another one; remove lora.from or init"),
            (self.lora is not None and self.lora.init == "loftq" and model.quantization == "nf4"
             and self.loss.uses_reference and reference.name is None
             and (reference.mode != "copy" or (reference.dtype, reference.quantization) != ("auto", "auto")),
             'lora.init: "loftq" adapters are a part of the model at the start, so a reference without them would be '
             'another model; set reference.mode = "copy" without dtype and quantization, or take a loss without a '
             "reference"),
            (model.attention in ("flex", "varlen") and train.layout == "padded",
             f'model.attention: "{model.attention}" computes tree and packed rows only; set train.layout = "auto", or '
             "remove it"),
            (isinstance(self.loss, KTO) and self.loss.kl == "batch" and train.batch == 1,
             "train.batch: KTO compares each row with the next one of its batch, so a batch needs two rows; "
             'set train.batch to 2 or more, or loss.kl = "none"'),
            (train.offload_activations and train.checkpointing is False,
             "train.offload_activations: only gradient checkpointing has inputs to move; set "
             'train.checkpointing to true or "auto"'),
            (not isinstance(self.eval.every, str) and not self.eval.wanted,
             "eval.every: there is nothing to evaluate on; set eval.fraction or add [[eval.data]]"),
        ]  # fmt: skip
        mistakes = [message for wrong, message in checks if wrong]
        mistakes += _unused_options(self.loss) if isinstance(self.loss, DPO) else []
        mistakes += [*optimization_mistakes(self), *stop_mistakes(self)]
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
        """The highest learning rate."""
        usual = 1e-4 if self.lora is not None else 1e-5 if self.loss.supervised else 1e-6
        return self.train.learning_rate or usual * OPTIMIZERS[self.train.optimizer].rate

    @property
    def schedule(self) -> str:
        """The name of the schedule, which "auto" leaves to the optimizer."""
        if self.train.schedule != "auto":
            return self.train.schedule
        return "cosine" if OPTIMIZERS[self.train.optimizer].scheduled else "constant"

    @property
    def warmup(self) -> float:
        """The steps of warm-up, or a share of all steps if it is below 1."""
        usual = 0.1 if SCHEDULES[self.schedule].warms_up else 0.0
        return usual if self.train.warmup is None else self.train.warmup

    @property
    def precomputes(self) -> bool:
        """Whether reference log-probabilities are computed before training, which saves a copy of the weights."""
        return self.reference.mode == "precompute" or (self.reference.mode == "auto" and self.lora is None)

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
                value = {**(current if isinstance(current, Mapping) else values_set(current)), name: value}
            tables[table] = value
        return self.model_copy(update={t: _table(type(self), t).validate_python(v) for t, v in tables.items()})


def _new_tokens(config: "Config") -> Iterator[tuple[bool, str]]:
    """Yield whether something in a config excludes new tokens, and what the message says about it."""
    lora, start = config.lora, config.lora is not None and config.lora.start is not None
    continued = (
        "an adapter that is continued, or that lies below another, has no rows for new tokens; remove lora.from, or "
        "merge that adapter and name the result as model.name"
    )
    other = "another model or adapter knows no new tokens, so it is no reference for them; remove reference.name"
    streamed = "the trained rows and the tables that they belong to lie on the GPU; set model.streaming to false"
    yield start, continued
    yield config.reference.name is not None and config.loss.uses_reference, other
    yield lora is not None and config.model.streaming is True, streamed


def _unused_options(loss: DPO) -> Iterator[str]:
    """Yield messages about the options of variants that are not there."""
    if loss.label_smoothing and not set(loss.variants) & {*SMOOTHED_VARIANTS, "ipo"}:
        yield f"loss.label_smoothing: only {', '.join(SMOOTHED_VARIANTS)} have it; set it to 0"
    if loss.f_alpha != DPO.f_alpha and loss.f_divergence != "alpha":
        yield f'loss.f_alpha: only f_divergence = "alpha" has it, not {loss.f_divergence!r}; leave it out'
    if loss.discopop_tau != DPO.discopop_tau and "discopop" not in loss.variants:
        yield "loss.discopop_tau: only the variant discopop has it; leave it out"


def _unused(data: DataConfig, loss: LossOptions) -> Iterator[str]:
    """Yield messages about keys of a source, each with its key, that the loss or the format has no use for."""
    for key in ("pairs", "min_difference"):
        if getattr(data, key) == DataConfig.model_fields[key].default:
            continue
        if loss.supervised:
            yield f"{key}: {loss.type} takes the chosen or the best completion of each row; remove this key"
        elif loss.listwise:
            yield f"{key}: {loss.type} takes lists of completions whole; remove this key"
        elif not loss.paired and key == "pairs":
            reason = f"{loss.type} takes the best completion of a list as a good one and the worst as a bad one"
            yield f"{key}: {reason}; remove this key, or use a loss of pairs"
    form, _ = parse_format(data.format)
    if data.chat is True and writes_text(form):
        yield f'chat: the format {form} writes the text itself; remove this key, or take format = "auto" or a table'
    if data.chat is False and form.startswith(CHATS):
        yield f"chat: the format {form} makes chats; remove this key, or name the columns of text by a table"


def values_set(table: Any) -> dict[str, Any]:
    """Return the values of a table by their keys in TOML: those that were set, or of a loss all."""
    if not isinstance(table, BaseModel):
        return dict(vars(table))
    fields = type(table).model_fields
    return {fields[name].alias or name: getattr(table, name) for name in fields if name in table.model_fields_set}


@cache
def _table(schema: type[Config], name: str) -> TypeAdapter[Any]:
    return TypeAdapter(get_type_hints(schema, include_extras=True)[name])
