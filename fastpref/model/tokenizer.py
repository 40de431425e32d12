"""Tokenizers from a folder or the hub, and the new tokens of a config: `tokens.add`."""

from collections.abc import Iterable
from typing import Any

from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerBase

from fastpref.config import Config, ModelConfig
from fastpref.errors import UserError
from fastpref.model.adapters.source import find_adapter, read_adapter
from fastpref.model.files import explained, hub_options


def load_tokenizer(options: ModelConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model. Raises UserError if there is none."""
    load = hub_options(options)
    try:
        tokenizer = AutoTokenizer.from_pretrained(options.name, **load)
    except Exception as error:  # transformers and the hub raise many kinds
        reason = explained(options, error, tokenizer=True)
        raise UserError(f"model.name = {options.name!r}: no tokenizer there: {reason}") from None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:  # calls of the tokenizer set these; saved files must not depend on the cache of tokens
        backend.no_padding()
        backend.no_truncation()
    return tokenizer


def run_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a run: that of the adapter it continues if one is saved there, or else that of the model.

    Supervised training saves the tokenizer with the adapter, often with the chat template that a base model lacks. The
    tokenizer gets the new tokens of the config. Raises UserError, also for a token that exists.
    """
    start = None if config.lora is None or config.lora.start is None else find_adapter(config.lora.start)
    saved = start is not None and any(start.glob("tokenizer*"))
    if saved:
        read_adapter(str(start), "lora.from")  # raises for one that cannot be continued, before its tokens are missed
    place = {"model.name": str(start), "model.revision": None}
    tokenizer = load_tokenizer(config.but(place).model if saved else config.model)
    if known := [name for name in config.tokens.add if name in tokenizer.get_vocab()]:
        number = tokenizer.get_vocab()[known[0]]
        raise UserError(f"tokens.add: {known[0]!r} is a token already, number {number:,}; leave it out")
    add_tokens(tokenizer, config.tokens.add)
    return tokenizer


def add_tokens(tokenizer: Any, names: Iterable[str]) -> tuple[int, ...]:
    """Add tokens that the tokenizer lacks, and return the ids of all names.

    They are no special tokens: decoded text shows them. Raises UserError for a token that text would not become.
    """
    names = tuple(names)
    lacking = [name for name in names if name not in tokenizer.get_vocab()]
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in lacking])
    ids = tuple(tokenizer.convert_tokens_to_ids(name) for name in names)
    for name, number in zip(names, ids, strict=True):
        made = tokenizer.encode(name, add_special_tokens=False)
        if made != [number]:
            parts = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(made)))
            raise UserError(
                f"tokens.add: this tokenizer makes {parts} of {name!r} instead of one token; take another name"
            )
    return ids


def new_tokens(config: Config) -> tuple[int, ...]:
    """Return the ids of the config's new tokens in the vocabulary of its model, whose files may have them already."""
    return add_tokens(load_tokenizer(config.model), config.tokens.add) if config.tokens.add else ()
