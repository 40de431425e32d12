"""Rows for new tokens in a model's embeddings and head.

A model may have more rows than its tokenizer has tokens; new tokens take these first, as they are. Further rows are the
mean of all others. That is where transformers' `resize_token_embeddings` puts them too, but for noise of 0.003 % of the
spread of a row, which would not be the same on a GPU, on a CPU, and when the model is loaded again.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastpref.config import Config
from fastpref.errors import UserError
from fastpref.model.tables import mean_row
from fastpref.model.tokenizer import add_tokens, load_tokenizer


def make_room(config: Config, model: PreTrainedModel) -> list[str]:
    """Give a model the rows that the config's new tokens need. Returns a note. Raises UserError, as `grow`."""
    if not config.tokens.add:
        return []
    tokenizer, before = load_tokenizer(config.model), rows_of(model)
    known = set(tokenizer.get_vocab())
    ids = add_tokens(tokenizer, config.tokens.add)
    more = grow(model, max(ids) + 1, "tokens.add")
    if known.issuperset(config.tokens.add):  # the trained model itself
        return []
    found = sum(number < before for number in ids)
    takes = [f"{found} take rows that no other token has"] if found else []
    takes += [f"the vocabulary grows by {more} to {before + more:,}"] if more else []
    numbers = f"number {ids[0]:,}" if len(ids) == 1 else f"numbers {min(ids):,} to {max(ids):,}"
    return [f"tokens.add: {len(ids)} new ({numbers}); {', '.join(takes)}"]


def rows_of(model: PreTrainedModel) -> int:
    """Return the rows of a model's embeddings."""
    embeddings: Any = model.get_input_embeddings()
    return embeddings.weight.shape[0]


@torch.no_grad()
def grow(model: PreTrainedModel, rows: int, place: str) -> int:
    """Give the embeddings and the head of a model this many rows at least, and return how many are new.

    Raises UserError, which begins with `place`, for a model whose tables are of a kind that does not grow.
    """
    before = rows_of(model)
    if rows <= before:
        return 0
    ends: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    kind = model.config.model_type
    plain = isinstance(ends[0], nn.Embedding) and type(ends[1]) is nn.Linear
    if not plain or ends[1].out_features != before:
        raise UserError(
            f"{place}: the embeddings and the head of this {kind} model are no two plain tables of one size"
        )
    others = [m for m in model.modules() if isinstance(m, nn.Embedding) and m is not ends[0]]
    if any(len(module.weight) == before for module in others):
        raise UserError(f"{place}: this {kind} model has further tables of its tokens, which cannot grow here")
    device = ends[0].weight.device
    means = [[mean_row(tensor) for tensor in _tables(end)] for end in ends]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        model.resize_token_embeddings(rows, mean_resizing=False)
    for end, values in zip((model.get_input_embeddings(), model.get_output_embeddings()), means, strict=True):
        for tensor, mean in zip(_tables(end), values, strict=True):
            tensor[before:] = mean.to(tensor.dtype)
    return rows - before


def _tables(end: Any) -> list[Tensor]:
    return [tensor for tensor in (end.weight, getattr(end, "bias", None)) if tensor is not None]
