"""Messages of a conversation, and rows to tokenize."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from fastpref.config import TokensConfig
from fastpref.data.example import Counts, Example
from fastpref.data.rows.content import Message, RowContent
from fastpref.data.sources import SourceRow
from fastpref.data.tokenize import tokenize_batches


def user(words: str) -> Message:
    return {"role": "user", "content": words}


def says(words: str, **more: Any) -> Message:
    return {"role": "assistant", "content": words, **more}


def system(words: str) -> Message:
    return {"role": "system", "content": words}


def tokenized(
    tokenizer: PreTrainedTokenizerBase, *contents: RowContent, **options: Any
) -> tuple[list[Example], Counts]:
    """Return the examples of these rows, and the counts. The options are those of [tokens]."""
    rows = [SourceRow(content, f"rows.jsonl, row {at}") for at, content in enumerate(contents)]
    return tokenize(rows, tokenizer, TokensConfig.model_validate(options))


def tokenize(
    rows: Sequence[SourceRow], tokenizer: PreTrainedTokenizerBase, options: TokensConfig
) -> tuple[list[Example], Counts]:
    """Return the examples of every usable row, and the counts."""
    counts = Counts()
    batches = tokenize_batches(rows, tokenizer, options, counts, None, set())
    return [example for batch in batches for example in batch], counts
