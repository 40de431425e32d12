"""The tables [[data]], [eval] and [tokens] of a config. Nothing here imports torch."""

from typing import Annotated, Any, Literal

from pydantic import Field, Strict, field_validator, model_validator

from fastpref.config.formats import Format
from fastpref.config.keywords import check_keywords
from fastpref.config.losses import NonNegative, Positive
from fastpref.config.paths import ReadPath
from fastpref.config.section import Count, Names, Section, Share, steps_or_share

Pairing = Literal["best-worst", "best-rest", "all", "adjacent"]


class DataConfig(Section):
    path: ReadPath
    """Names the data: a .json, .jsonl, .csv, .tsv, .parquet or .arrow file, a folder of such files, a pattern such as
    "shards/*.parquet", a folder that `save_to_disk` wrote, or a data set of the hub."""
    split: str = "train"
    """Selects the split of a data set on the hub, or of a folder: the split of a file follows from its name."""
    name: str | None = None
    """Selects the configuration of a data set on the hub, or of a folder whose README lists several."""
    revision: str | None = None
    """Selects a branch, tag or commit of the data set on the hub."""
    format: Format = "auto"
    """Tells how rows are read: the name of a format, a table of its type and options, or "module:function"; "auto"
    recognizes the columns."""
    chat: Literal["auto"] | bool = "auto"
    """Decides about rows of plain text: true makes them chats, which the model's chat template writes, false trains
    the text as it is, and so does "auto", with a note if the model has a chat template."""
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


class EvalConfig(Section):
    fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Holds out this share of the prompts of [[data]], chosen by a hash of the prompt."""
    data: Annotated[tuple[DataConfig, ...], Strict(False)] = ()
    """Holds out other data instead: [[eval.data]] has the keys of [[data]]."""
    every: Annotated[Count | Share | Literal["auto", "end"], steps_or_share("auto", "end")] = "auto"
    """Evaluates every so many steps (below 1: every such share of all steps), in addition to the start and the end;
    "auto" is every tenth of the run, or less often if evaluations would take more than about a quarter of the time of
    the training. "end" evaluates at the start and the end only."""
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


class TokensConfig(Section):
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
    add: Names = ()
    """Adds tokens to the vocabulary, such as ["<think>", "</think>"]; with a [lora] table their rows of the embeddings
    and the head are trained in addition to the adapters, and no others."""

    @field_validator("add")
    @classmethod
    def _different_tokens(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for at, name in enumerate(names):
            if not name or name != name.strip():
                raise ValueError(f"{name!r} cannot be a token: it is empty, or begins or ends with space")
            if name in names[:at]:
                raise ValueError(f"{name!r} is named twice")
        return names

    @field_validator("chat_template_kwargs")
    @classmethod
    def _known_keywords(cls, given: dict[str, Any] | None) -> dict[str, Any] | None:
        check_keywords(given or {})
        return given or None
