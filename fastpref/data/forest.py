"""Lay token sequences out in one row as a forest, in which a beginning that several sequences share is computed once.

    P A C          row        P A C D B        A node is a run of tokens: P, A, C, D and B. A sequence is a path from
    P A D    →     parents    P: none; A, B: P; C, D: A        a root; nodes lie depth first, so a subtree is one range.
    P B

With `end[k]`, the position after the last token of the subtree of k's node, and `depth[k]`, the number of tokens
before k in its sequence, token q attends to token k exactly if k ≤ q < end[k]; and within a sliding window if in
addition depth[q] − depth[k] < window. `depth` is the position id.

Sequences part at the end of a common prompt, however short it is, and elsewhere only where they have shared at least
`MIN_SHARED` tokens since they last parted, so that chance agreements make no nodes. Identical sequences, and a sequence
that is the beginning of another one, are computed once.
"""

from array import array
from bisect import bisect_right
from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

MIN_SHARED = 16  # tokens

Tokens = bytes
"""A sequence of token ids as big-endian uint32, so that bytes sort as tokens do and are compared without a loop."""


def encode(ids: Sequence[int]) -> Tokens:
    return np.frombuffer(array("I", ids), np.uint32).byteswap().tobytes()


class Node(NamedTuple):
    """A run of tokens that the same sequences share."""

    start: int  # position of its first token in the row
    length: int
    depth: int  # tokens before it in its sequences
    parent: int | None  # the index of the node before it in its sequences
    end: int  # position after the last token of its subtree

    @property
    def stop(self) -> int:
        return self.start + self.length


class Chain(NamedTuple):
    """A node that is not its parent's first child, its first child, the first child of that, and so on."""

    start: int
    stop: int
    before: tuple[slice, ...]  # positions of the tokens before it in its sequences


@dataclass(frozen=True)
class Forest:
    """The nodes of one row, depth first, which say what each token attends to. The attention gets it as a keyword."""

    nodes: tuple[Node, ...]
    made: MutableMapping[Any, Any] = field(default_factory=dict, compare=False, repr=False)
    """Values that the attention derives from it once, for all layers and passes of its micro-batch."""

    @property
    def tokens(self) -> int:
        return self.nodes[-1].stop if self.nodes else 0

    def by_token(self) -> tuple[Tensor, Tensor]:
        """Return `end` and `depth`, [T] int32 each."""
        lengths = [node.length for node in self.nodes]
        end = np.repeat(np.array([node.end for node in self.nodes], np.int32), lengths)
        before = np.repeat(np.array([node.start - node.depth for node in self.nodes], np.int32), lengths)
        return torch.from_numpy(end), torch.from_numpy(np.arange(self.tokens, dtype=np.int32) - before)

    def longest(self) -> Tensor:
        """Return the tokens of the longest sequence that each token belongs to, [T] float32."""
        longest = [node.depth + node.length for node in self.nodes]
        for at in range(len(self.nodes) - 1, 0, -1):  # children come after their parents
            if (parent := self.nodes[at].parent) is not None:
                longest[parent] = max(longest[parent], longest[at])
        return torch.from_numpy(np.repeat(np.array(longest, np.float32), [node.length for node in self.nodes]))

    def path(self, node: int | None) -> tuple[slice, ...]:
        """Return the positions of a node's tokens and of those before it in its sequences, in order."""
        runs: list[slice] = []
        while node is not None:
            start, stop = self.nodes[node].start, self.nodes[node].stop
            if runs and runs[-1].start == stop:  # a first child lies next to its parent
                stop = runs.pop().stop
            runs.append(slice(start, stop))
            node = self.nodes[node].parent
        return tuple(reversed(runs))

    def chains(self) -> list[Chain]:
        """Return the chains in the order of the row, which they fill. Each is causal attention after its prefix."""
        heads = [at for at, node in enumerate(self.nodes) if node.parent is None or node.parent != at - 1]
        stops = [self.nodes[at].start for at in heads[1:]] + [self.tokens]
        return [Chain(self.nodes[at].start, stop, self.path(self.nodes[at].parent)) for at, stop in zip(heads, stops)]


@dataclass(frozen=True)
class Branch:
    """Tokens that follow the beginning of a sequence in a row that is computed already."""

    prefix: tuple[slice, ...]  # positions in the computed row, in order
    length: int
    sees_itself: bool = True  # whether its tokens attend, causally, to each other and not only to the prefix


Kept = dict[int, tuple[Tensor, Tensor]]  # the computed row's keys and values, by attention module: [1, kv_heads, N, D]


@dataclass(frozen=True)
class LaterForest(Forest):
    """A separate row of branches, one after the other."""

    branches: tuple[Branch, ...] = ()
    kept: Kept | None = None
    eager: bool = False  # a token that may attend to nothing gets the mean of all values, as in eager attention

    def longest(self) -> Tensor:
        """Return the tokens of each token's sequence, with those before its branch, [T] float32."""
        own = [branch.length for branch in self.branches]
        before = [sum(run.stop - run.start for run in branch.prefix) for branch in self.branches]
        return torch.from_numpy(np.repeat(np.add(own, before).astype(np.float32), own))


@dataclass(frozen=True)
class Laid:
    """A forest with its tokens, and the path of each of its sequences."""

    forest: Forest
    ids: np.ndarray  # [T] int64
    paths: tuple[tuple[slice, ...], ...]  # of each sequence: its positions in the row, in order


def lay_out(sequences: Sequence[Tokens], prompts: Sequence[int]) -> Laid:
    """Lay sequences out as a forest. Children of a node come in the order in which the sequences need them.

    `prompts` holds the number of tokens of each sequence's prompt. No sequence may be empty.
    """
    trie = _Trie(sequences, prompts)
    nodes, parts, last = [], [], [0] * len(trie.leaves)
    start = 0
    for lo, hi, depth, shared, parent in trie.nodes():
        if hi - lo == 1:
            last[lo] = len(nodes)
        nodes.append([start, shared - depth, depth, parent, start + shared - depth])
        parts.append(trie.leaves[lo][4 * depth : 4 * shared])
        start += shared - depth
    for _, _, _, parent, end in reversed(nodes):
        if parent is not None:
            nodes[parent][4] = max(nodes[parent][4], end)
    forest = Forest(tuple(Node(*node) for node in nodes))
    whole = [forest.path(node) for node in last]
    paths = tuple(beginning(whole[leaf], len(ids) // 4) for leaf, ids in zip(trie.leaf_of, sequences))
    return Laid(forest, np.frombuffer(b"".join(parts), ">u4").astype(np.int64), paths)


def lay_apart(sequences: Sequence[Tokens]) -> Laid:
    """Lay sequences out one after the other, so that they share nothing."""
    lengths = [len(ids) // 4 for ids in sequences]
    starts = np.cumsum([0, *lengths]).tolist()
    nodes = tuple(Node(start, length, 0, None, start + length) for start, length in zip(starts, lengths))
    paths = tuple((slice(node.start, node.stop),) for node in nodes)
    return Laid(Forest(nodes), np.frombuffer(b"".join(sequences), ">u4").astype(np.int64), paths)


def forest_tokens(sequences: Sequence[Tokens], prompts: Sequence[int]) -> int:
    """Return the number of tokens of the forest of these sequences."""
    return sum(shared - depth for _, _, depth, shared, _ in _Trie(sequences, prompts).nodes())


def roots(sequences: Sequence[Tokens], prompts: Sequence[int]) -> list[int]:
    """Return, for each sequence, a number that it has in common with those of its tree."""
    trie = _Trie(sequences, prompts)
    tree_of = [0] * len(trie.leaves)
    for lo, hi in trie.trees():
        tree_of[lo:hi] = [lo] * (hi - lo)
    return [tree_of[leaf] for leaf in trie.leaf_of]


def beginning(path: Sequence[slice], tokens: int) -> tuple[slice, ...]:
    """Return the first `tokens` positions of a path."""
    runs = []
    for run in path:
        runs.append(slice(run.start, min(run.stop, run.start + tokens)))
        tokens -= run.stop - run.start
        if tokens <= 0:
            break
    return tuple(runs)


def places(path: Sequence[slice]) -> list[int]:
    """Return the positions of a path as numbers."""
    return [place for run in path for place in range(run.start, run.stop)]


def shared_tokens(a: Tokens, b: Tokens) -> int:
    """Return how many first tokens two sequences have in common."""
    size = min(len(a), len(b))
    if a[:size] == b[:size]:
        return size // 4
    differ = np.frombuffer(a, np.uint32, size // 4) != np.frombuffer(b, np.uint32, size // 4)
    return int(differ.argmax())


class _Trie:
    """The distinct sequences of a forest that are no beginning of another one, sorted, and where they part."""

    def __init__(self, sequences: Sequence[Tokens], prompts: Sequence[int]):
        order = sorted(range(len(sequences)), key=sequences.__getitem__)
        ordered = [sequences[at] for at in order]
        shared = [shared_tokens(a, b) for a, b in pairwise(ordered)]
        self.leaves: list[Tokens] = []
        self.leaf_of = [0] * len(sequences)
        self._shared: list[int] = []  # tokens that each leaf shares with the leaf before it
        self._first: list[int] = []  # the first of the sequences that need each leaf
        self._prompts: list[list[int]] = []  # the lengths of the prompts that end in each leaf
        common, first, ends = 0, len(sequences), set()
        for place, at in enumerate(order):
            self.leaf_of[at], first = len(self.leaves), min(first, at)
            ends.add(prompts[at])
            if place:
                common = min(common, shared[place - 1])
            if place < len(shared) and shared[place] == len(ordered[place]) // 4:
                continue  # it is the beginning of the next one
            self.leaves.append(ordered[place])
            self._shared.append(common)
            self._first.append(first)
            self._prompts.append(sorted(ends))
            common, first, ends = len(ordered[place]) // 4, len(sequences), set()

    def nodes(self) -> Iterator[tuple[int, int, int, int, int | None]]:
        """Yield the nodes depth first: its leaves [lo, hi), the depths where it begins and ends, its parent."""
        waiting = [(*part, 0, None) for part in reversed(self.trees())]
        number = 0
        while waiting:
            lo, hi, depth, parent = waiting.pop()
            shared = self._common(lo, hi)
            yield lo, hi, depth, shared, parent
            if hi - lo > 1:
                waiting += [(*part, shared, number) for part in reversed(self._parts(lo, hi, shared))]
            number += 1

    def trees(self) -> list[tuple[int, int]]:
        """Return the ranges of leaves that begin together."""
        return self._parts(0, len(self.leaves), 0) if self.leaves else []

    def _common(self, lo: int, hi: int) -> int:
        """Return how many tokens the leaves [lo, hi) share."""
        return len(self.leaves[lo]) // 4 if hi - lo == 1 else min(self._shared[lo + 1 : hi])

    def _parts(self, lo: int, hi: int, depth: int) -> list[tuple[int, int]]:
        """Return the ranges of leaves that become nodes at a depth, where all of [lo, hi) are laid out already."""
        parts, waiting = [], [(lo, hi)]
        while waiting:
            lo, hi = waiting.pop()
            shared = self._common(lo, hi)
            if hi - lo == 1 or shared - depth >= MIN_SHARED or self._prompt_ends(lo, hi, depth, shared):
                parts.append((lo, hi))
                continue
            cuts = [lo, *(at for at in range(lo + 1, hi) if self._shared[at] == shared), hi]
            waiting += pairwise(cuts)
        return sorted(parts, key=lambda part: min(self._first[part[0] : part[1]]))

    def _prompt_ends(self, lo: int, hi: int, depth: int, shared: int) -> bool:
        """Return whether the prompt of one of the leaves [lo, hi) ends in (depth, shared]."""
        return any(
            (at := bisect_right(ends, depth)) < len(ends) and ends[at] <= shared for ends in self._prompts[lo:hi]
        )
