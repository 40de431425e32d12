"""Conversion of a padded batch, as TRL's collators make it, to a forest in one packed row, and back."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastpref.data.forest import Branch, Forest, beginning, encode, lay_out, places

IGNORED = -100  # the label of a token that is not scored


@dataclass(frozen=True)
class Row:
    """The tokens of one padded row. Its prompt is the part before the first token with a label."""

    first: int  # column of the first token
    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    whole: bool = True  # whether every token of the completion has a label

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)


def read_rows(
    input_ids: Tensor,  # [B, T]
    attention_mask: Tensor,  # [B, T]
    labels: Tensor,  # [B, T], IGNORED where not scored
) -> list[Row] | None:
    """Return the rows of a batch, or None if a row is empty or has padding between its tokens."""
    width = input_ids.shape[1]
    columns = torch.arange(width, device=input_ids.device)
    real = attention_mask.bool()
    first = torch.where(real, columns, width).amin(1)
    end = torch.where(real, columns + 1, 0).amax(1)
    scored = torch.where(real & (labels != IGNORED), columns, width).amin(1).minimum(end)
    labelled = (labels != IGNORED).sum(1)
    bounds = torch.stack([first, scored, end, real.sum(1), labelled], dim=1).tolist()
    if any(count == 0 or end - start != count for start, _, end, count, _ in bounds):
        return None
    return [
        Row(start, tuple(ids[start:middle]), tuple(ids[middle:end]), labelled == end - middle)
        for ids, (start, middle, end, _, labelled) in zip(input_ids.tolist(), bounds, strict=True)
    ]


@dataclass(frozen=True)
class HeadRows:
    """The distinct pairs of a predictor and a target among the tokens with labels, some of which rows share."""

    predictors: Tensor  # [N] int64, indices in the packed row
    targets: Tensor  # [N] int64
    rows: Tensor  # [M] int64, the pair of each token with a label, row by row of the batch


@dataclass(frozen=True)
class Packed:
    """The rows of a batch as a forest in one row, in which a beginning that rows share is computed once."""

    input_ids: Tensor  # [1, N]
    position_ids: Tensor  # [1, N]
    layout: Forest
    place: Tensor  # [B, T] each token's index in the packed row; 0 for padding
    rows: tuple[Row, ...]
    paths: tuple[tuple[slice, ...], ...]  # each row's positions in the packed row, in order
    shared: HeadRows | None  # None if rows share no token with a label, or if that is not known on the host

    @property
    def tokens(self) -> int:
        return self.input_ids.shape[1]


def pack(rows: Sequence[Row], width: int, device: torch.device) -> Packed:
    """Pack the rows of a batch with `width` columns as a forest."""
    laid = lay_out([encode(row.prompt + row.completion) for row in rows], [len(row.prompt) for row in rows])
    _, depths = laid.forest.by_token()
    return Packed(
        torch.from_numpy(laid.ids)[None].to(device),
        depths.long()[None].to(device),
        laid.forest,
        _places(rows, laid.paths, width, device),
        tuple(rows),
        laid.paths,
        _head_rows(rows, laid.paths, device),
    )


def _head_rows(rows: Sequence[Row], paths: Sequence[tuple[slice, ...]], device: torch.device) -> HeadRows | None:
    """Return the distinct rows of the head for all tokens with labels, or None as `Packed.shared` says."""
    if any(not row.whole or (row.completion and not row.prompt) for row in rows):
        return None
    predictors, tokens, targets = [], [], []
    for row, path in zip(rows, paths, strict=True):
        at = places(path)
        predictors += at[len(row.prompt) - 1 : -1] if row.completion else []
        tokens += at[len(row.prompt) :]
        targets += row.completion
    distinct, first, inverse = np.unique(tokens, return_index=True, return_inverse=True)
    if len(distinct) == len(tokens):
        return None
    columns = np.array(predictors)[first], np.array(targets)[first], inverse
    return HeadRows(*(torch.from_numpy(column).to(device) for column in columns))


def _places(rows: Sequence[Row], paths: Sequence[tuple[slice, ...]], width: int, device: torch.device) -> Tensor:
    """Return each token's index in the packed row, [B, T]."""
    place = torch.zeros((len(rows), width), dtype=torch.int64)
    for at, (row, path) in enumerate(zip(rows, paths, strict=True)):
        place[at, row.first : row.first + len(row)] = torch.tensor(places(path))
    return place.to(device)


@dataclass(frozen=True)
class Later:
    """Tokens that are computed after a packed row, with its stored keys and values."""

    input_ids: Tensor  # [1, N]
    position_ids: Tensor  # [1, N]
    branches: tuple[Branch, ...]
    place: Tensor  # [B, T] each token's index in the packed row followed by these tokens


def later_padding(packed: Packed, input_ids: Tensor) -> Later | None:
    """Return the padding on the right of every row, or None without any. It attends to its row's tokens only.

    Raises ValueError for padding on the left, which attends to nothing.
    """
    width = input_ids.shape[1]
    place = packed.place.clone()
    branches: list[Branch] = []
    ids: list[Tensor] = []
    positions: list[Tensor] = []
    total = 0
    for at, (row, path) in enumerate(zip(packed.rows, packed.paths, strict=True)):
        if row.first:
            raise ValueError("padding on the left sees nothing")
        missing = width - len(row)
        if missing == 0:
            continue
        branches.append(Branch(path, missing, sees_itself=False))
        ids.append(input_ids[at, len(row) :])
        positions.append(torch.arange(len(row), width, device=input_ids.device))
        place[at, len(row) :] = torch.arange(total, total + missing, device=place.device) + packed.tokens
        total += missing
    if not branches:
        return None
    return Later(torch.cat(ids)[None], torch.cat(positions)[None], tuple(branches), place)


def later_completions(packed: Packed, rows: Sequence[Row], width: int, device: torch.device) -> Later | None:
    """Return other completions of the packed row's prompts, or None if a row's prompt is not among them."""
    stems = {row.prompt: beginning(path, len(row.prompt)) for row, path in zip(packed.rows, packed.paths, strict=True)}
    if any(not row.prompt or not row.completion or row.prompt not in stems for row in rows):
        return None
    ids: list[int] = []
    positions: list[int] = []
    branches: list[Branch] = []
    paths: list[tuple[slice, ...]] = []
    for row in rows:
        stem, start = stems[row.prompt], packed.tokens + len(ids)
        branches.append(Branch(stem, len(row.completion)))
        paths.append((*stem, slice(start, start + len(row.completion))))
        ids += row.completion
        positions += range(len(row.prompt), len(row))
    return Later(
        torch.tensor([ids], device=device),
        torch.tensor([positions], device=device),
        tuple(branches),
        _places(rows, paths, width, device),
    )
