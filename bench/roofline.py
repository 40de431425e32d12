"""A model, not a measurement, of the shortest possible time of the head's kernels on a card.

For every launch, the multiplications and the bytes to and from memory are counted from its parameters. A launch takes
at least the longer of operations/peak and bytes/bandwidth. The model leaves out the time to start a
kernel, exponentials next to products (they run on another unit), and every miss of a cache.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from bench.problems import SHAPES, Shape
from fastpref.kernels.head_weight import DenseWeight
from fastpref.kernels.linear_logprob_launch import GROUP, plan_tile
from fastpref.kernels.tiles import TILES, cdiv

BUDGET = 128 * 2**20  # the default workspace, bytes
ROWS = 8192


@dataclass(frozen=True)
class Card:
    """The published limits of a card: dense bfloat16 products with float32 accumulation, and memory."""

    name: str
    architecture: int
    tflops: float
    gbytes: float  # gigabytes per second


# NVIDIA's data sheets: "Ada GPU architecture", "A100 80GB SXM", "H100 SXM".
CARDS = (Card("RTX 4090", 89, 165.2, 1008), Card("A100", 80, 312.0, 2039), Card("H100", 90, 989.4, 3350))
_SHAPES = {shape.model: shape for shape in SHAPES}
HEADS = tuple(_SHAPES[model] for model in ("Llama-3-8B", "Qwen2.5-7B", "Gemma-2-2B"))


@dataclass(frozen=True)
class Launch:
    kernel: str
    operations: float
    bytes: float

    def seconds(self, card: Card) -> float:
        return max(self.operations / (card.tflops * 1e12), self.bytes / (card.gbytes * 1e9))


def launches(head: Shape, architecture: int, *, mode: str) -> Iterator[Launch]:
    """List the launches of `linear_logprob` for 8,192 bfloat16 rows.

    The mode "no gradient" computes only the statistics, "frozen head" a forward and backward pass, and "trained head"
    also the gradient of the weight.
    """
    n, width, vocabulary = ROWS, head.hidden, head.vocab
    hidden = torch.empty((n, width), dtype=torch.bfloat16, device="meta")
    weight = DenseWeight(torch.empty((vocabulary, width), dtype=torch.bfloat16, device="meta"))
    tiles = TILES[architecture][2]
    if mode != "frozen head":
        blocks = cdiv(n, tiles.full.n)
        # Each group of row blocks reads the weight once, and its hidden states stay in L2.
        read = 2 * width * (n + cdiv(blocks, GROUP) * vocabulary)
        yield Launch("walk", 2.0 * n * vocabulary * width, read)
    if mode == "no gradient":
        return
    tile = tiles.full if head.softcap is not None else tiles.lean
    shape = plan_tile(hidden, weight, BUDGET, tile, stored=True)
    groups = cdiv(n, shape.rows) * cdiv(cdiv(shape.rows, tile.n), GROUP)
    for first in range(0, vocabulary, shape.columns):
        columns = min(shape.columns, vocabulary - first)
        product = 2.0 * n * columns * width
        yield Launch("walk", product, 2 * width * (n + groups * columns) + 2 * n * columns)
        accumulate = 2 * n * columns + 2 * columns * width + 8 * n * width  # O is read and written
        yield Launch("library product", product, accumulate)
        if mode == "trained head":
            yield Launch("library product", product, 2 * n * columns + 2 * n * width + 8 * columns * width)
        else:
            splits = cdiv(columns, tile.v)
            yield Launch("combine, rescale", 0, 4 * n * (3 * splits + 2 * splits))
    if mode == "frozen head":
        yield Launch("gradient, scale", 0, n * width * (4 + 2 + 2) + n * width * (2 + 2))


def bare_products(head: Shape, card: Card, *, count: int = 2) -> float:
    """Return the seconds of `count` matrix products of the head's size, with each operand read or written once."""
    n, width, vocabulary = ROWS, head.hidden, head.vocab
    moved = 2 * (n * width + vocabulary * width + n * vocabulary)
    return count * Launch("product", 2.0 * n * vocabulary * width, moved).seconds(card)


_MODES = {"no gradient": 1, "frozen head": 2, "trained head": 4}


def section() -> str:
    """Return the model as a section of the page."""
    lines = [
        "## A model of the time at best",
        f"Not measured. For {ROWS:,} scored rows in bfloat16 with the default workspace: the operations and bytes of "
        "every launch, counted from the launch parameters, over the card's published limits (dense bfloat16 products "
        "and memory: "
        + "; ".join(f"{c.name} {c.tflops:g} TFLOP/s, {c.gbytes:g} GB/s" for c in CARDS)
        + "), next to the bare matrix products of the same size. `bench/roofline.py` says what is left out.",
        "",
        "| head | card | pass | products | ms at best | of operations alone | of memory alone | bare products, ms | "
        "ratio |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for head in HEADS:
        for card in CARDS:
            for mode, count in _MODES.items():
                plan = list(launches(head, card.architecture, mode=mode))
                total = sum(launch.seconds(card) for launch in plan)
                operations = sum(launch.operations for launch in plan) / (card.tflops * 1e12)
                memory = sum(launch.bytes for launch in plan) / (card.gbytes * 1e9)
                bare = bare_products(head, card, count=count)
                lines.append(
                    f"| {head.model} ({head.vocab:,} × {head.hidden:,}) | {card.name} | {mode} | {count} | "
                    f"{1e3 * total:.1f} | {1e3 * operations:.1f} | {1e3 * memory:.1f} | {1e3 * bare:.1f} | "
                    f"{total / bare:.2f} |"
                )
    return "\n".join([lines[0], "", *lines[1:]])
