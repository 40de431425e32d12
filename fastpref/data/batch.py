"""Lay examples out as the tensors of a micro-batch, in one of three layouts that give the same results.

    tree     P C₁ C₂ …            one row; a beginning that several sequences share is computed once (`forest.py`)
    packed   P C₁ | P C₂ | …      one row; every sequence has its own copy of its prompt
    padded   one row per sequence, padded to the longest; for models whose attention cannot be given a layout

A sequence is a prompt and one of its completions. Of E examples with up to K completions each, sequence k·E + e is
completion k of example e: of pairs, the first E are the chosen ones, the next the rejected ones. Lists with scores may
have fewer than K completions; the sequences of the absent ones have no tokens.
"""

import hashlib
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fastpref.data.example import Example, Spans
from fastpref.data.forest import (
    Branch,
    Forest,
    Kept,
    LaterForest,
    Tokens,
    beginning,
    encode,
    forest_tokens,
    lay_apart,
    lay_out,
    places,
    roots,
)

Layout = Literal["tree", "packed", "padded"]
_COPIED_FROM = "_fastpref_copied_from"


@dataclass(frozen=True)
class PreferenceBatch:
    """One micro-batch of E examples with K completions, S = K·E sequences (E more where prompts are scored).

    The head computes N distinct rows: `targets[n]`, predicted at position `predictors[n]` of the flattened [B·T] hidden
    states. Scored token m of M is row `rows[m]`, which several sequences may share. Turns of other speakers inside a
    completion are computed but not scored.
    """

    input_ids: Tensor  # [B, T] int64
    position_ids: Tensor  # [B, T] int64, the number of tokens before each one in its sequence
    attention_mask: Tensor | None  # [B, T] int64 for padded, else None
    tree: Forest | None  # for tree and packed
    predictors: Tensor  # [N] int64
    targets: Tensor  # [N] int64
    rows: Tensor | None  # [M] int64, the head's row of each scored token; None if each has its own, in this order
    segments: Tensor  # [M] int64, the sequence of each scored token
    offsets: Tensor  # [M] int64, its index in its completion
    lengths: Tensor  # [S] int64, scored tokens of each sequence
    labels: Tensor | None  # [E] bool, for single completions
    scores: Tensor | None  # [E, K] float32 of lists, NaN where a completion is absent; None for pairs and labels
    weights: Tensor | None  # [E] float32, the factor of each example's loss; None if all are 1
    margins: Tensor | None  # [E] float32, NaN where an example has none; None if no example has one
    index: Tensor  # [E] int64, each example's index in its step
    completions: int  # K, the most of an example
    keys: tuple[bytes, ...]  # the `completion_key` of each completion, in the order of scoring
    scored: tuple[int, ...]  # scored tokens of each completion, in the same order
    prompts: tuple[int, ...]  # tokens of each example's prompt
    paths: tuple[tuple[slice, ...], ...]  # of each of the K·E sequences: its places in the flattened [B·T] tokens

    @property
    def examples(self) -> int:
        return len(self.index)

    @property
    def ranking(self) -> Tensor:
        """The scores [E, K] of lists; a pair is a list of two, in which the chosen completion has 1, the other 0."""
        pair = torch.arange(1, -1, -1, dtype=torch.float32, device=self.index.device)
        return pair.expand(self.examples, 2) if self.scores is None else self.scores

    @property
    def tokens(self) -> int:
        """Tokens the model computes, padding included."""
        return self.input_ids.numel()

    def of_tokens(self, values: Tensor) -> Tensor:
        """Return the values [M, …] of the scored tokens from those [N, …] of the head's rows."""
        return values if self.rows is None else values[self.rows]

    def to(self, device: torch.device | str) -> "PreferenceBatch":
        tensors = {f.name: v for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
        if moved["input_ids"] is not self.input_ids:
            setattr(moved["input_ids"], _COPIED_FROM, self.input_ids)
        return replace(self, **moved)


def copied_from(tensor: Tensor) -> Tensor | None:
    """Return the token ids on the host of which a batch's `input_ids` on a device are a copy, or None."""
    return getattr(tensor, _COPIED_FROM, None)


def collate(
    examples: Sequence[Example],
    layout: Layout,
    *,
    index: Sequence[int] | None = None,  # each example's index in its step; 0, 1, … if None
    pad_token_id: int = 0,
    score_prompts: bool = False,
) -> PreferenceBatch:
    """Lay examples out as one micro-batch. All must have the same number of completions, except lists with scores.

    With `score_prompts`, E more segments, K·E + e, score all tokens of each prompt but the first.
    """
    count, completions = len(examples), max(len(example.completions) for example in examples)
    if not (scores := _scores(examples, completions)) and any(len(e.completions) != completions for e in examples):
        raise ValueError("collate: examples without scores differ in their number of completions")
    placed = _padded(examples, pad_token_id) if layout == "padded" else _one_row(examples, layout)
    scored = _Scored([0] * ((completions + score_prompts) * count))
    for e, example in enumerate(examples):
        for k, completion in enumerate(example.completions):
            at = places(placed.paths[e, k])
            prompt, context = len(example.prompt), example.context(k)
            if k == 0 and score_prompts:
                scored.add(example.prompt, at, 1, completions * count + e)
            scored.add(example.prompt + completion, at, prompt, k * count + e, context)
            scored.name(k * count + e, completion_key(example.prompt, completion, context))
    predictors, targets, rows = scored.head_rows()
    labels = [example.label for example in examples]
    weights = [example.weight for example in examples]
    margins = [math.nan if example.margin is None else example.margin for example in examples]
    return PreferenceBatch(
        input_ids=placed.input_ids,
        position_ids=placed.position_ids,
        attention_mask=placed.attention_mask,
        tree=placed.forest,
        predictors=predictors,
        targets=targets,
        rows=rows,
        segments=torch.tensor(scored.segments, dtype=torch.int64),
        offsets=torch.tensor(scored.offsets, dtype=torch.int64),
        lengths=torch.tensor(scored.lengths, dtype=torch.int64),
        labels=None if None in labels else torch.tensor(labels, dtype=torch.bool),
        scores=torch.tensor(scores) if scores else None,
        weights=torch.tensor(weights) if any(weight != 1 for weight in weights) else None,
        margins=None if all(map(math.isnan, margins)) else torch.tensor(margins),
        index=torch.tensor(range(count) if index is None else list(index), dtype=torch.int64),
        completions=completions,
        keys=tuple(scored.keys),
        scored=tuple(scored.counts),
        prompts=tuple(len(example.prompt) for example in examples),
        paths=tuple(placed.paths.get((e, k), ()) for k in range(completions) for e in range(count)),
    )


def _scores(examples: Sequence[Example], completions: int) -> list[list[float]]:
    """Return the scores of lists, E lists of K, NaN where a completion is absent; [] if no example is a list."""
    if not any(example.scores for example in examples):
        return []
    rows = [example.scores or (1.0, 0.0) for example in examples]  # a pair is a list of two
    for row, example in zip(rows, examples):
        if len(row) != len(example.completions):
            raise ValueError(
                f"collate: {example.row.place}: {len(row)} scores of {len(example.completions)} completions"
            )
    return [[*row, *[math.nan] * (completions - len(row))] for row in rows]


def collate_after(batch: PreferenceBatch, examples: Sequence[Example]) -> PreferenceBatch:
    """Lay out other completions of a forest's prompts, one for each of its examples, as a row that follows it.

    Its `tree` lacks the keys and values of the batch's row, which `following` adds. The last token of each prompt is
    computed again, because it predicts the first token of the completion.
    """
    ids: list[int] = []
    positions: list[int] = []
    branches: list[Branch] = []
    scored = _Scored([0] * len(examples))
    for e, example in enumerate(examples):
        tokens, before = [example.prompt[-1], *example.completions[0]], len(example.prompt) - 1
        branches.append(Branch(beginning(batch.paths[e], before) if before else (), len(tokens)))
        scored.add(tokens, range(len(ids), len(ids) + len(tokens)), 1, e, example.context(0))
        scored.name(e, completion_key(example.prompt, example.completions[0], example.context(0)))
        ids += tokens
        positions += range(before, before + len(tokens))
    return replace(
        batch,
        input_ids=torch.tensor([ids]),
        position_ids=torch.tensor([positions]),
        tree=LaterForest((), branches=tuple(branches)),
        predictors=torch.tensor(scored.predictors),
        targets=torch.tensor(scored.targets),
        rows=None,
        segments=torch.tensor(scored.segments),
        offsets=torch.tensor(scored.offsets),
        lengths=torch.tensor(scored.lengths),
        keys=tuple(scored.keys),
        scored=tuple(scored.counts),
        paths=(),
    )


def following(batch: PreferenceBatch, kept: Kept) -> PreferenceBatch:
    """Return a batch of `collate_after` with the keys and values of the row that it follows."""
    assert isinstance(batch.tree, LaterForest)
    return replace(batch, tree=replace(batch.tree, kept=kept))


def completion_key(prompt: Sequence[int], completion: Sequence[int], context: Spans = ()) -> bytes:
    """Return a 16-byte digest of a prompt's tokens, a completion's tokens, and the completion's unscored spans."""
    numbers = array("q", [len(prompt), *prompt, *completion])
    if context:  # -1 separates them, because token ids are never negative
        numbers.extend([-1, *(place for span in context for place in span)])
    return hashlib.blake2b(numbers.tobytes(), digest_size=16).digest()


@dataclass
class _Scored:
    """The scored tokens, collected sequence by sequence."""

    lengths: list[int]  # of each sequence
    places: list[int] = field(default_factory=list)
    predictors: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    segments: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    def name(self, segment: int, key: bytes) -> None:
        """Give the sequence that was added last the key of its completion."""
        self.keys.append(key)
        self.counts.append(self.lengths[segment])

    def add(self, ids: Sequence[int], at: Sequence[int], first: int, segment: int, context: Spans = ()) -> None:
        """Score the tokens of a sequence from number `first` on, but not `context`, which counts from there."""
        begin = first
        for stop, resume in (*context, (len(ids) - first, len(ids))):  # a scored run, then an unscored span
            stop += first
            self.places += at[begin:stop]
            self.predictors += at[begin - 1 : stop - 1]
            self.targets += ids[begin:stop]
            self.segments += [segment] * (stop - begin)
            self.offsets += range(begin - first, stop - first)
            self.lengths[segment] += stop - begin
            begin = resume + first

    def head_rows(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the distinct rows of the head, and which one each scored token is; None if no two tokens share one."""
        predictors, targets = np.array(self.predictors), np.array(self.targets)
        distinct, first, rows = np.unique(self.places, return_index=True, return_inverse=True)
        if len(distinct) == len(self.places):
            return torch.from_numpy(predictors), torch.from_numpy(targets), None
        return torch.from_numpy(predictors[first]), torch.from_numpy(targets[first]), torch.from_numpy(rows)


@dataclass(frozen=True)
class _Placed:
    """The tokens of a micro-batch, and where each sequence lies in them."""

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    forest: Forest | None
    paths: dict[tuple[int, int], tuple[slice, ...]]  # of completion k of example e, by (e, k)


def _one_row(examples: Sequence[Example], layout: Layout) -> _Placed:
    """Lay sequences out in one row: as a forest in the order of the examples, or each with its own prompt."""
    present = [(e, k) for e, example in enumerate(examples) for k in range(len(example.completions))]
    sequences = [_tokens(examples[e], k) for e, k in present]
    prompts = [len(examples[e].prompt) for e, _ in present]
    laid = lay_out(sequences, prompts) if layout == "tree" else lay_apart(sequences)
    _, depths = laid.forest.by_token()
    paths = dict(zip(present, laid.paths))
    return _Placed(torch.from_numpy(laid.ids)[None], depths.long()[None], None, laid.forest, paths)


def _padded(examples: Sequence[Example], pad: int) -> _Placed:
    most = max(len(example.completions) for example in examples)
    present = [(e, k) for k in range(most) for e, example in enumerate(examples) if k < len(example.completions)]
    rows = [examples[e].prompt + examples[e].completions[k] for e, k in present]
    width = max(map(len, rows))
    input_ids = torch.full((len(rows), width), pad, dtype=torch.int64)
    attention_mask = torch.zeros((len(rows), width), dtype=torch.int64)
    for row, ids in enumerate(rows):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        attention_mask[row, : len(ids)] = 1
    paths = {at: (slice(row * width, row * width + len(rows[row])),) for row, at in enumerate(present)}
    position_ids = torch.arange(width).expand(len(rows), width).contiguous()
    return _Placed(input_ids, position_ids, attention_mask, None, paths)


def plan_microbatches(examples: Sequence[Example], layout: Layout, budget: int, processes: int = 1) -> list[list[int]]:
    """Divide a step into micro-batches of at most `budget` computed tokens. A larger example gets one of its own.

    Examples that share a beginning stay together as far as the budget allows. These groups are placed by first fit in
    order of decreasing size, so that micro-batches are few and padded rows have similar lengths. Returns the examples'
    indices in the step. For several processes, the largest micro-batches are halved until each process gets equally
    many, if there are enough examples, and the largest come first.
    """
    costs = _Costs(examples, layout)
    groups = costs.groups(budget)
    sizes = [costs(group) for group in groups]
    open_: list[list[int]] = []
    filled: list[int] = []
    for at in sorted(range(len(groups)), key=lambda i: -sizes[i]):
        for place, batch in enumerate(open_):
            together = costs([*batch, *groups[at]]) if layout == "padded" else filled[place] + sizes[at]
            if together <= budget:
                batch += groups[at]
                filled[place] = together
                break
        else:
            open_.append(list(groups[at]))
            filled.append(sizes[at])
    while len(open_) % processes and (divisible := [batch for batch in open_ if len(batch) > 1]):
        largest = max(divisible, key=costs)
        open_.remove(largest)
        half = len(largest) // 2
        open_ += [largest[::2], largest[1::2]] if layout == "padded" else [largest[:half], largest[half:]]
    if processes > 1:
        open_.sort(key=costs, reverse=True)
    return [sorted(batch) for batch in open_]


class _Costs:
    """The tokens that micro-batches of some examples compute, padding included. Call it with the examples' indices."""

    def __init__(self, examples: Sequence[Example], layout: Layout):
        self._examples, self._layout = examples, layout
        self._sequences: list[list[Tokens]] = []
        if layout == "tree":
            self._sequences = [[_tokens(example, k) for k in range(len(example.completions))] for example in examples]

    def __call__(self, batch: Sequence[int]) -> int:
        if self._layout == "tree":
            return forest_tokens(*self._flat(batch))
        lengths = [[len(self._examples[i].prompt) + len(ids) for ids in self._examples[i].completions] for i in batch]
        rows = [tokens for row in lengths for tokens in row]
        return max(rows) * len(rows) if self._layout == "padded" else sum(rows)

    def groups(self, budget: int) -> list[list[int]]:
        """Return the examples in groups that share no beginning, or as much of one group as the budget takes."""
        if self._layout != "tree":
            return [[at] for at in range(len(self._examples))]
        trees: dict[int, list[int]] = {}
        first = roots(*self._flat(range(len(self._examples))))
        for at, sequences in enumerate(self._sequences):
            trees.setdefault(first[0], []).append(at)
            first = first[len(sequences) :]
        groups = []
        for members in trees.values():
            if len(members) == 1 or self(members) <= budget:
                groups.append(members)
                continue
            group: list[int] = []
            for at in sorted(members, key=lambda at: self._sequences[at][0]):
                if group and self([*group, at]) > budget:
                    groups.append(group)
                    group = []
                group.append(at)
            groups.append(group)
        return groups

    def _flat(self, batch: Sequence[int]) -> tuple[list[Tokens], list[int]]:
        sequences = [tokens for i in batch for tokens in self._sequences[i]]
        return sequences, [len(self._examples[i].prompt) for i in batch for _ in self._sequences[i]]


def _tokens(example: Example, which: int) -> Tokens:
    return encode(example.prompt + example.completions[which])


def computed_tokens(examples: Sequence[Example], layout: Layout) -> int:
    """Return how many tokens a micro-batch of these examples computes, padding included."""
    return _Costs(examples, layout)(range(len(examples)))
