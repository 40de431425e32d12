"""Lay examples out as the tensors of a micro-batch, in one of three layouts that give the same results.

    tree     P C₁ C₂ | P C₁ C₂ …      one row; a prompt is computed once, its completions are branches after it
    packed   P C₁ | P C₂ | P C₁ …     one row; every completion has its own copy of the prompt
    padded   one row per sequence, padded to the longest; for models whose attention cannot be given a layout

A sequence is one completion of one example. Of E examples with K completions each, sequence k·E + e is completion k
of example e: the first E are the chosen ones, the next the rejected ones.
"""

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from fastpref.data.example import Example, Spans

Layout = Literal["tree", "packed", "padded"]


@dataclass(frozen=True)
class Tree:
    """A prompt and its branches inside a packed row."""

    start: int
    prompt: int  # tokens
    completions: tuple[int, ...]  # tokens each


@dataclass(frozen=True)
class TreeLayout:
    """The trees of one packed row, which say what each token attends to. The attention gets it as a keyword."""

    trees: tuple[Tree, ...]
    made: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)
    """Values that the attention derives from it once, for all layers and passes of its micro-batch."""


@dataclass(frozen=True)
class PreferenceBatch:
    """One micro-batch of E examples with K completions each, S = K·E sequences (E more where prompts are scored).

    Scored token n is `targets[n]`, predicted at position `predictors[n]` of the flattened [B·T] hidden states. The last
    position of a prompt predicts the first token of each of its completions, so positions repeat. Turns of other
    speakers inside a completion are computed but not scored.
    """

    input_ids: Tensor  # [B, T] int64
    position_ids: Tensor  # [B, T] int64, restarting at the prompt's length for each completion
    attention_mask: Tensor | None  # [B, T] int64 for padded, else None
    tree: TreeLayout | None  # for tree and packed
    predictors: Tensor  # [N] int64
    targets: Tensor  # [N] int64
    segments: Tensor  # [N] int64, the sequence of each scored token
    offsets: Tensor  # [N] int64, its index in its completion
    lengths: Tensor  # [S] int64, scored tokens of each sequence
    labels: Tensor | None  # [E] bool, for single responses
    index: Tensor  # [E] int64, each example's index in its step
    completions: int  # K
    keys: tuple[bytes, ...]  # the `completion_key` of each completion, in the order of scoring

    @property
    def examples(self) -> int:
        return len(self.index)

    @property
    def tokens(self) -> int:
        """Tokens the model computes, padding included."""
        return self.input_ids.numel()

    def to(self, device: torch.device | str) -> "PreferenceBatch":
        tensors = {f.name: v for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}
        return replace(self, **{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()})


def collate(
    examples: Sequence[Example],
    layout: Layout,
    *,
    index: Sequence[int] | None = None,  # each example's index in its step; 0, 1, … if None
    pad_token_id: int = 0,
    score_prompts: bool = False,
) -> PreferenceBatch:
    """Lay examples out as one micro-batch. All must have the same number of completions.

    With `score_prompts`, E more segments, K·E + e, score all tokens of each prompt but the first.
    """
    count, completions = len(examples), len(examples[0].completions)
    if any(len(example.completions) != completions for example in examples):
        raise ValueError("collate: examples differ in their number of completions")
    scored = _Scored(score_prompts, count, completions)
    place = {"tree": _tree, "packed": _packed, "padded": _padded}[layout]
    input_ids, position_ids, attention_mask, trees = place(examples, scored, pad_token_id)
    labels = [example.label for example in examples]
    return PreferenceBatch(
        input_ids=input_ids,
        position_ids=position_ids,
        attention_mask=attention_mask,
        tree=trees,
        predictors=torch.tensor(scored.predictors, dtype=torch.int64),
        targets=torch.tensor(scored.targets, dtype=torch.int64),
        segments=torch.tensor(scored.segments, dtype=torch.int64),
        offsets=torch.tensor(scored.offsets, dtype=torch.int64),
        lengths=torch.tensor(scored.lengths, dtype=torch.int64),
        labels=None if None in labels else torch.tensor(labels, dtype=torch.bool),
        index=torch.tensor(range(count) if index is None else list(index), dtype=torch.int64),
        completions=completions,
        keys=tuple(scored.keys),
    )


def completion_key(prompt: Sequence[int], completion: Sequence[int], context: Spans = ()) -> bytes:
    """Return a 16-byte digest of a prompt's tokens, a completion's tokens, and the completion's unscored spans."""
    numbers = array("q", [len(prompt), *prompt, *completion])
    if context:  # -1 separates them, because token ids are never negative
        numbers.extend([-1, *(place for span in context for place in span)])
    return hashlib.blake2b(numbers.tobytes(), digest_size=16).digest()


class _Scored:
    """Collects the scored tokens while sequences are laid out."""

    def __init__(self, prompts: bool, examples: int, completions: int):
        self._prompts, self._examples, self._completions = prompts, examples, completions
        self.predictors: list[int] = []
        self.targets: list[int] = []
        self.segments: list[int] = []
        self.lengths = [0] * ((completions + prompts) * examples)  # of each sequence
        self.offsets: list[int] = []
        self.keys: list[bytes] = []

    def _add(self, tokens: Sequence[int], first: int, start: int, segment: int, context: Spans = ()) -> None:
        """Add the scored tokens of `tokens`, which begin at `start`. Position `first` predicts the first one."""
        begin = 0
        for stop, resume in (*context, (len(tokens), len(tokens))):  # a scored run, then an unscored span
            if begin < stop:
                self.predictors += [start + begin - 1 if begin else first, *range(start + begin, start + stop - 1)]
                self.targets += tokens[begin:stop]
                self.segments += [segment] * (stop - begin)
                self.lengths[segment] += stop - begin
                self.offsets += range(begin, stop)
            begin = resume

    def prompt(self, example: int, tokens: Sequence[int], start: int) -> None:
        if self._prompts and len(tokens) > 1:
            self._add(tokens[1:], start, start + 1, self._completions * self._examples + example)

    def completion(self, number: int, which: int, example: Example, prompt_last: int, start: int) -> None:
        tokens, context = example.completions[which], example.context(which)
        self._add(tokens, prompt_last, start, which * self._examples + number, context)
        self.keys.append(completion_key(example.prompt, tokens, context))


_Placed = tuple[Tensor, Tensor, Tensor | None, TreeLayout | None]


def _tree(examples: Sequence[Example], scored: _Scored, _pad: int) -> _Placed:
    return _pack([(e, example, range(len(example.completions))) for e, example in enumerate(examples)], scored)


def _packed(examples: Sequence[Example], scored: _Scored, _pad: int) -> _Placed:
    single = [(e, example, [k]) for e, example in enumerate(examples) for k in range(len(example.completions))]
    return _pack(single, scored)


def _pack(parts: Sequence[tuple[int, Example, Sequence[int]]], scored: _Scored) -> _Placed:
    """Pack trees one after another into a batch of one row.

    Each part is an example's number, the example, and which of its completions the tree has.
    """
    ids: list[int] = []
    positions: list[int] = []
    trees = []
    for e, example, which in parts:
        start, prompt = len(ids), example.prompt
        ids += prompt
        positions += range(len(prompt))
        if which[0] == 0:  # a repeated prompt is scored once
            scored.prompt(e, prompt, start)
        for k in which:
            completion = example.completions[k]
            scored.completion(e, k, example, start + len(prompt) - 1, len(ids))
            ids += completion
            positions += range(len(prompt), len(prompt) + len(completion))
        trees.append(Tree(start, len(prompt), tuple(len(example.completions[k]) for k in which)))
    return torch.tensor([ids]), torch.tensor([positions]), None, TreeLayout(tuple(trees))


def _padded(examples: Sequence[Example], scored: _Scored, pad: int) -> _Placed:
    completions = len(examples[0].completions)
    rows = [(e, k, example) for k in range(completions) for e, example in enumerate(examples)]
    width = max(len(example.prompt) + len(example.completions[k]) for _, k, example in rows)
    input_ids = torch.full((len(rows), width), pad, dtype=torch.int64)
    attention_mask = torch.zeros((len(rows), width), dtype=torch.int64)
    for row, (e, k, example) in enumerate(rows):
        sequence = example.prompt + example.completions[k]
        input_ids[row, : len(sequence)] = torch.tensor(sequence)
        attention_mask[row, : len(sequence)] = 1
        start, prompt = row * width, len(example.prompt)
        if k == 0:
            scored.prompt(e, example.prompt, start)
        scored.completion(e, k, example, start + prompt - 1, start + prompt)
    position_ids = torch.arange(width).expand(len(rows), width).contiguous()
    return input_ids, position_ids, attention_mask, None


def plan_microbatches(examples: Sequence[Example], layout: Layout, budget: int, processes: int = 1) -> list[list[int]]:
    """Divide a step into micro-batches of at most `budget` computed tokens. A larger example gets one of its own.

    Examples are placed by first fit in order of decreasing length, so that micro-batches are few and padded rows have
    similar lengths. Returns the examples' indices in the step. For several processes, the largest micro-batches are
    halved until each process gets equally many, if there are enough examples, and the largest come first.
    """
    sizes = [_size(example, layout) for example in examples]
    open_: list[list[int]] = []
    for at in sorted(range(len(examples)), key=lambda i: -sizes[i]):
        for batch in open_:
            if _cost([*batch, at], sizes, examples, layout) <= budget:
                batch.append(at)
                break
        else:
            open_.append([at])

    def cost(batch: Sequence[int]) -> int:
        return _cost(batch, sizes, examples, layout)

    while len(open_) % processes and (divisible := [batch for batch in open_ if len(batch) > 1]):
        largest = max(divisible, key=cost)
        open_.remove(largest)
        open_ += [largest[::2], largest[1::2]]
    if processes > 1:
        open_.sort(key=cost, reverse=True)
    return [sorted(batch) for batch in open_]


def with_mismatched(examples: Sequence[Example]) -> list[Example]:
    """Return every prompt with its own completion and a mismatched one, which KTO's KL estimate needs.

    The mismatched completion is that of the next example, cyclically, that has another prompt, or of the next one if
    all prompts are equal.
    """
    mates = []
    for at, example in enumerate(examples):
        following = [*range(at + 1, len(examples)), *range(at)] or [at]
        mates.append(next((i for i in following if examples[i].prompt != example.prompt), following[0]))
    return [e.with_completions([(e, 0), (examples[mate], 0)]) for e, mate in zip(examples, mates)]


def mismatched(examples: Sequence[Example]) -> Iterator[Example]:
    """Yield every prompt with the completion of an example of another prompt, if there is one, in the examples' order.

    The choice does not depend on the order of the examples: prompts form a ring sorted by the digests of their tokens,
    and each takes the completions of the next, in the order of their digests.
    """
    prompts: dict[bytes, list[tuple[bytes, int]]] = {}
    places = []
    for at, example in enumerate(examples):
        prompt = completion_key(example.prompt, ())
        own = completion_key(example.prompt, example.completions[0], example.context(0))
        prompts.setdefault(prompt, []).append((own + bytes([bool(example.label)]), at))
        places.append(prompt)
    ring = sorted(prompts)
    mates = [0] * len(places)
    for number, prompt in enumerate(ring):
        own, following = sorted(prompts[prompt]), sorted(prompts[ring[(number + 1) % len(ring)]])
        for turn, (_, at) in enumerate(own):
            mates[at] = following[(turn + (len(ring) == 1)) % len(following)][1]
    for at, mate in enumerate(mates):
        example = examples[at]
        yield example.with_completions([(examples[mate], 0)])


def computed_tokens(examples: Sequence[Example], layout: Layout) -> int:
    """Return how many tokens a micro-batch of these examples computes, padding included."""
    return _cost(range(len(examples)), [_size(example, layout) for example in examples], examples, layout)


def _size(example: Example, layout: Layout) -> int:
    branches = [len(ids) for ids in example.completions]
    if layout == "padded":
        return len(example.prompt) + max(branches)
    return len(example.prompt) * (1 if layout == "tree" else len(branches)) + sum(branches)


def _cost(batch: Sequence[int], sizes: Sequence[int], examples: Sequence[Example], layout: Layout) -> int:
    if layout == "padded":
        return max(sizes[i] for i in batch) * sum(len(examples[i].completions) for i in batch)
    return sum(sizes[i] for i in batch)
