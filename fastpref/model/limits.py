"""A model's limits: its numbers of token ids and of positions, compared with the data before anything is computed.

A token id without an embedding, or a position after the last learned one, raises an index error in the middle of a step
on a CPU, and fails a device-side assertion on a GPU. Neither names the row of the data. Importing this module does not
import torch, because `fastpref check` only reads a config.json.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastpref.config import Config, ModelConfig
from fastpref.config.losses import compares_neighbours
from fastpref.data.order import chunks, data_order
from fastpref.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fastpref.data.table import Examples

# Model types with a table of learned positions: the key of its size in config.json, and whether the positions up to the
# padding token's id are unused, as in RoBERTa and models derived from it.
_TABLES: dict[str, tuple[str, bool]] = {
    **dict.fromkeys(("gpt2", "gpt_bigcode", "openai-gpt", "gptj", "codegen", "ctrl"), ("n_positions", False)),
    **dict.fromkeys(
        ("gpt_neo", "opt", "biogpt", "bart", "mbart", "plbart", "mvp", "blenderbot", "blenderbot-small", "pegasus",
         "marian", "trocr", "bigbird_pegasus", "bert", "bert-generation", "big_bird", "electra", "ernie",
         "megatron-bert", "rembert", "roc_bert", "roformer"),
        ("max_position_embeddings", False),
    ),
    **dict.fromkeys(
        ("roberta", "camembert", "xlm-roberta", "xlm-roberta-xl", "data2vec-text", "roberta-prelayernorm", "xmod"),
        ("max_position_embeddings", True),
    ),
    "mpt": ("max_seq_len", False),
}  # fmt: skip
_POSITIONS = ("wpe", "embed_positions", "position_embeddings", "position_embedding", "positions_embed")  # of modules
_NOT_TEXT = ("vision", "visual", "image", "audio", "encoder")  # in the path of a module
# RoPE scalings that multiply a model's length by a factor. "dynamic" adapts to any length.
_STRETCHED = ("linear", "yarn", "longrope", "su", "llama3")


@dataclass(frozen=True)
class Limits:
    """A model's limits. None means that a limit is not known or does not exist."""

    model: str  # its type, for messages
    embeddings: int | None = None  # rows: the ids 0 … embeddings − 1 can be read
    outputs: int | None = None  # rows of the head: ids that can be predicted
    positions: int | None = None  # the most tokens of a sequence that can be computed
    made_for: int | None = None  # the most tokens of a sequence that its RoPE was made for, including scaling

    def room(self, tokens: int, wanted: int) -> int:
        """Return how many of the `wanted` tokens can follow a prompt of `tokens` tokens."""
        return wanted if self.positions is None else max(0, min(wanted, self.positions - tokens))


def limits_of_config(config: Mapping[str, Any]) -> Limits:
    """Return the limits by a config.json, or by `PretrainedConfig.to_dict()`."""
    text = config.get("text_config")
    config = text if isinstance(text, Mapping) else config
    kind = str(config.get("model_type", "this model"))
    vocabulary = _count(config.get("vocab_size"))
    if kind in _TABLES:
        key, skips = _TABLES[kind]
        positions = _count(config.get(key))
        if positions is not None and skips:
            positions -= (_count(config.get("pad_token_id")) or 0) + 1
        return Limits(kind, vocabulary, vocabulary, positions)
    return Limits(kind, vocabulary, vocabulary, made_for=_made_for(config))


def limits_of(options: ModelConfig) -> Limits:
    """Return the limits by the config.json of a model that is not loaded. Raises UserError if there is none."""
    from fastpref.model.files import model_config

    return limits_of_config(model_config(options).get_text_config().to_dict())


def limits_of_model(model: "PreTrainedModel") -> Limits:
    """Return the limits by the tensors of a loaded model, which are more reliable than its config."""
    limits = limits_of_config(model.config.get_text_config().to_dict())
    embeddings: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    tables = [count for name, module in model.named_modules() if (count := _table(name, module)) is not None]
    return Limits(
        limits.model,
        limits.embeddings if embeddings is None else len(embeddings.weight),
        limits.outputs if head is None else getattr(head, "out_features", None) or len(head.weight),
        min(tables) if tables else limits.positions,
        None if tables else limits.made_for,
    )


def compare(
    limits: Limits, parts: Mapping[str, "Examples"], tokenizer: "PreTrainedTokenizerBase", config: Config
) -> list[str]:
    """Compare the data with the limits. Return notes on rows that are longer than the model's RoPE was trained for.

    Args:
        parts: examples by their name in messages: "training", "held-out".

    Raises UserError, which locates a row, for tokens and lengths that the model cannot compute.
    """
    if config.tokens.add:  # a model's own files do not have their rows yet
        limits = _with_new(limits, max(tokenizer.get_vocab()[name] for name in config.tokens.add) + 1)
    for name, examples in parts.items():
        _compare_tokens(limits, name, examples, tokenizer)
        _compare_lengths(limits, name, examples, config)
    return [note for name, examples in parts.items() if (note := _beyond(limits, name, examples)) is not None]


def _with_new(limits: Limits, rows: int) -> Limits:
    """Return the limits of the model with as many token ids, or more if it has more."""
    embeddings, outputs = (count and max(count, rows) for count in (limits.embeddings, limits.outputs))
    return replace(limits, embeddings=embeddings, outputs=outputs)


def pad_token(tokenizer: "PreTrainedTokenizerBase", limits: Limits) -> tuple[int, str | None]:
    """Return the token id for padding, and a note if it is not the tokenizer's.

    Padding is masked, so any id with an embedding will do. So a pad token that was added to the tokenizer but not to
    the model, as is common with Llama 2, does no harm.
    """
    pad = tokenizer.pad_token_id
    if not isinstance(pad, int):
        return 0, None
    if limits.embeddings is None or pad < limits.embeddings:
        return pad, None
    return 0, (
        f"the tokenizer's pad token, {pad:,} ({tokenizer.pad_token!r}), has no embedding: {limits.model} has "
        f"{limits.embeddings:,}. Padding is masked, so token 0 is taken instead; to generate in batches it needs one"
    )


def foresee(config: Config) -> list[str]:
    """Return notes on a config, also by the files of a model on this machine, before any row is read."""
    notes = [note] if (note := trained_dtype(config)) else []
    notes += [note] if (note := long_warmup(config)) else []
    content = _json(config.model, "config.json")
    if content is None:
        return notes
    limits, highest = limits_of_config(content), _highest_id(config.model)
    notes += [note] if (note := beyond_positions(limits, config)) else []
    if limits.embeddings is not None and highest is not None and highest >= limits.embeddings:
        notes.append(
            f"the tokenizer of {config.model.name} has ids up to {highest:,}, and vocab_size of its config.json is "
            f"{limits.embeddings:,}: rows that have tokens from {limits.embeddings:,} on are refused. {_RESIZE}"
        )
    return notes


def trained_dtype(config: Config) -> str | None:
    """Return a note if all weights are trained, and therefore not in `model.dtype`; else None."""
    if config.lora is not None or config.model.dtype != "bfloat16":
        return None
    return (
        'model.dtype = "bfloat16": without a [lora] table all weights are trained, so they are float32; a GPU '
        "multiplies them in bfloat16"
    )


def long_warmup(config: Config) -> str | None:
    """Return a note if the learning rate never reaches train.learning_rate, or None. Epochs are not counted."""
    warmup, steps = config.train.warmup, config.train.steps
    if warmup is None or steps is None or warmup < 1 or warmup < steps:
        return None
    return (
        f"train.warmup = {warmup:g} is no less than the {steps:,} steps, so the learning rate never reaches "
        "train.learning_rate; a number below 1 is a share of all steps"
    )


def beyond_positions(limits: Limits, config: Config) -> str | None:
    """Return a note if `tokens.max_length` exceeds a limit, or None. The data need not be known."""
    longest = config.tokens.max_length
    if limits.positions is not None and longest > limits.positions:
        return (
            f"tokens.max_length = {longest:,} is more than the {limits.positions:,} positions of {limits.model}: "
            f"longer rows are refused. Set tokens.max_length={limits.positions}"
        )
    if limits.made_for is not None and longest > limits.made_for:
        return (
            f"tokens.max_length = {longest:,} is more than the {limits.made_for:,} tokens that {limits.model} was made "
            f"for (max_position_embeddings): longer rows are computed, but not as the model has learnt"
        )
    return None


_RESIZE = (
    "Take the tokenizer without the tokens that were added to it, or give the model rows for them "
    "(resize_token_embeddings of transformers) and save both in one folder"
)


# --- Limits --------------------------------------------------------------------------------------------------------


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _made_for(config: Mapping[str, Any]) -> int | None:
    """Return the length that RoPE was made for, in tokens, or None if its scaling adapts to any length."""
    longest = _count(config.get("max_position_embeddings"))
    if longest is None:
        return None
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    scalings = [rope, *(value for value in rope.values() if isinstance(value, Mapping))]  # one per kind of layer
    for scaling in scalings:
        kind, factor = scaling.get("rope_type", scaling.get("type")), scaling.get("factor")
        if kind == "dynamic":
            return None
        if kind in _STRETCHED and isinstance(factor, int | float):
            began = scaling.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
            longest = max(longest, int(factor * (_count(began) or longest)))
    return longest


def _table(name: str, module: Any) -> int | None:
    """Return the number of positions of a module that is a table of learned positions, or None."""
    from torch import nn

    path = name.removesuffix(".base_layer").split(".")
    if path[-1] not in _POSITIONS or not isinstance(module, nn.Embedding):
        return None
    if any(word in part for part in path for word in _NOT_TEXT):
        return None
    kept = 0 if module.padding_idx is None else module.padding_idx + 1
    return module.weight.shape[0] - int(getattr(module, "offset", 0)) - kept


# --- Rows ----------------------------------------------------------------------------------------------------------


def _compare_tokens(limits: Limits, name: str, examples: "Examples", tokenizer: "PreTrainedTokenizerBase") -> None:
    if limits.embeddings is None:
        return
    predicted = min(limits.embeddings, limits.outputs or limits.embeddings)
    sizes = {"prompt": limits.embeddings, "completion": predicted}
    for (what, rows), highest in zip(sizes.items(), examples.highest_ids, strict=True):
        if highest < rows:
            continue
        places, ids = examples.with_ids_from(rows, what == "prompt")
        token = int(ids[0])
        text = tokenizer.convert_ids_to_tokens(token)
        part = "the embeddings" if rows == limits.embeddings else "the head"
        raise UserError(
            f"{examples[int(places[0])].row.place}: token {token:,} ({text!r}) of its {what} is not in {part} of "
            f"{limits.model}, which have {rows:,} rows; {_some(len(np.unique(places)), len(examples), name)} such "
            f"tokens, and the tokenizer has {len(tokenizer):,}. {_RESIZE}"
        )


def _compare_lengths(limits: Limits, name: str, examples: "Examples", config: Config) -> None:
    if limits.positions is None or not len(examples):
        return
    positions, lengths = limits.positions, _lengths(examples)
    if lengths.max() > positions:
        at = int(np.argmax(lengths > positions))
        raise UserError(
            f"{examples[at].row.place}: {lengths[at]:,} tokens with its completion, and {limits.model} has "
            f"{positions:,} positions; {_some(int((lengths > positions).sum()), len(examples), name)} more. Set "
            f"tokens.max_length={positions}"
        )
    prompts, completions = examples.prompt_lengths, examples.completion_lengths
    if not compares_neighbours(config.loss, len(examples)) or prompts.max() + completions.max() <= positions:
        return
    for places in _steps(name, len(examples), config):
        both = prompts[places] + np.roll(completions[places, 0], -1)
        if both.max() > positions:
            at = int(np.argmax(both))
            raise UserError(
                f"{examples[int(places[at])].row.place}: its prompt with the completion of another row, which KTO "
                f"compares it with, has {both[at]:,} tokens, and {limits.model} has {positions:,} positions. Set "
                f'tokens.max_length={positions // 2}, or loss.kl="none"'
            )


def _beyond(limits: Limits, name: str, examples: "Examples") -> str | None:
    if limits.made_for is None or not len(examples):
        return None
    lengths = _lengths(examples)
    longer = lengths > limits.made_for
    if not longer.any():
        return None
    place = examples[int(np.argmax(longer))].row.place
    return (
        f"{_some(int(longer.sum()), len(examples), name)} more tokens than the {limits.made_for:,} that {limits.model} "
        f"was made for (max_position_embeddings), up to {lengths.max():,}; the first is {place}. They are computed, "
        f"but not as the model has learnt. Set tokens.max_length={limits.made_for}, or scale RoPE in its config.json"
    )


def _steps(name: str, count: int, config: Config) -> Iterator[np.ndarray]:
    """Yield the indices of the rows of each step, or of each chunk of an evaluation."""
    train = config.train
    steps = train.steps or ceil(train.epochs * count / train.batch)
    order = islice(data_order(count, train.batch, train.seed), steps)
    yield from map(np.asarray, order if name == "training" else chunks(range(count), train.batch))


def _lengths(examples: "Examples") -> np.ndarray:
    """Return the number of tokens of each row's longest sequence, [E], which is the number of positions it needs."""
    return examples.prompt_lengths + examples.completion_lengths.max(axis=1, initial=0)


def _some(count: int, of: int, name: str) -> str:
    return f"{count:,} of {of:,} {name} rows {'has' if count == 1 else 'have'}"


# --- Files ---------------------------------------------------------------------------------------------------------


def _json(options: ModelConfig, name: str) -> Any:
    """Return the content of a JSON file in a model's folder or the hub's cache, or None, without network access."""
    folder = Path(options.name).expanduser()
    path: Any = folder / name
    try:
        if not folder.is_dir():
            from huggingface_hub import try_to_load_from_cache

            path = try_to_load_from_cache(options.name, name, revision=options.revision)
        return json.loads(Path(path).read_text(encoding="utf-8")) if isinstance(path, str | Path) else None
    except (OSError, ValueError):  # missing or damaged; loading the model reports it
        return None


def _highest_id(options: ModelConfig) -> int | None:
    """Return the highest token id in a tokenizer's files, or None."""
    file = _json(options, "tokenizer.json")
    if not isinstance(file, dict):
        return None
    vocabulary = file.get("model", {}).get("vocab") or ()
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else [len(vocabulary) - 1]
    ids += [token["id"] for token in file.get("added_tokens") or ()]
    settings = _json(options, "tokenizer_config.json")
    added = settings.get("added_tokens_decoder") if isinstance(settings, dict) else None
    return max([*ids, *map(int, added or ())], default=None)
