"""A model, not a measurement, of the time of the head's kernels on a card.

It adds up the launches of `linear_logprob` one by one, with the tiles that the launcher chooses and the instructions
that the compiler emitted (`compiled.py`):

- The main loop takes the longer of its multiplications, at a share of the card's peak, and of its operands' way from
  L2 to the processors. Every tile of rows × columns reads (rows + columns)·H elements.
- The epilogue follows it, as a processor holds one block at a time: its instructions, at a share of what the
  processor's four schedulers can issue.
- Blocks run in whole waves of one a processor.
- The library's product takes the longer of its multiplications and its way to memory, and a part of the shorter.
- A small kernel takes a constant time, and Python another for each launch, in parallel with the GPU.

The model leaves out clocks that fall under load, and misses of L2 in the main loop.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from bench.compiled import Compiled
from bench.problems import SHAPES, Shape
from fastpref.kernels.head_weight import DenseWeight
from fastpref.kernels.linear_logprob_plan import WIDE, blocks_per_split, plan_tile
from fastpref.kernels.tiles import Tile, cdiv

BUDGET = 128 * 2**20  # the default workspace, bytes
ROWS = (2048, 8192, 32768)


@dataclass(frozen=True)
class Card:
    """A card's published limits: dense bfloat16 products with float32 accumulation, memory, processors; and two that
    are assumed, as no data sheet has them."""

    name: str
    architecture: int
    tflops: float
    gbytes: float  # of memory, gigabytes per second
    processors: int
    ghz: float
    l2_mbytes: float
    l2_tbytes: float  # assumed: from L2 to all processors, terabytes per second
    reach: float  # assumed: the share of `tflops` that the library's product reaches


# NVIDIA's data sheets and white papers: "Ada GPU architecture", "Ampere GA102", "A100 80GB SXM", "H100 SXM". The speed
# of L2 is what microbenchmarks in the literature find, from 5.5 to 7 TB/s for an H100.
CARDS = (
    Card("RTX 4090", 89, 165.2, 1008, 128, 2.52, 72, 5.0, 0.92),
    Card("RTX 3090", 86, 71.0, 936, 82, 1.695, 6, 2.0, 0.92),
    Card("A100", 80, 312.0, 2039, 108, 1.41, 40, 4.8, 0.82),
    Card("H100", 90, 989.4, 3350, 132, 1.755, 50, 7.0, 0.70),
)
FUSED_SHARE = 0.92  # of the library's speed that the main loop reaches, if L2 does not limit it
ISSUED = 0.7  # instructions a scheduler and cycle in an epilogue
SHOWN = 0.35  # the part of the shorter of arithmetic and memory traffic that the longer does not hide
SMALL_KERNEL = 6e-6  # seconds
PYTHON = 35e-6  # seconds a launch on the host
_SHAPES = {shape.model: shape for shape in SHAPES}
HEADS = tuple(_SHAPES[model] for model in ("Llama-3-8B", "Qwen2.5-7B", "Gemma-2-2B"))
# Passes of the head: one of the reference, and a training step with the default log.every = 1, whose tokens'
# metrics are optional outputs; its gradient of the weight, too, if the head is trained.
PASSES = {"reference": 1, "training": 2, "trained head": 4}


@dataclass(frozen=True)
class Epilogue:
    """The figures of a compiled main loop that the model reads."""

    tile: Tile
    instructions: int  # of a warp, outside the main loop

    @classmethod
    def of(cls, c: Compiled) -> "Epilogue":
        assert c.variant.tile is not None
        return cls(c.variant.tile, c.instructions)


Epilogues = Mapping[str, Epilogue]  # by mode


def epilogues(compiled: list[Compiled], architecture: int, *, softcap: bool) -> dict[str, Epilogue]:
    """Choose the compiled main loops of a head's passes in bfloat16. With a softcap, take all extras."""
    extras = {"forward": "softcap", "exp": "all", "gradient": "all"} if softcap else {"exp": "outputs"}
    return {
        mode: Epilogue.of(c)
        for c in compiled
        for mode in ("forward", "exp", "gradient")
        if (c.variant.architecture, c.variant.name, c.variant.dtype, c.variant.what)
        == (architecture, f"walk, {mode}", "bf16", extras.get(mode, ""))
    }


class Model:
    """The times of launches for a head of H hidden units on a card, in seconds."""

    def __init__(self, card: Card, head: Shape):
        self.card, self.width, self.vocabulary = card, head.hidden, head.vocab
        self.reach = card.reach * card.tflops * 1e12  # operations a second

    def product(self, n: int, columns: int, bytes_moved: float) -> float:
        """Return the time of a product of n × H × columns by the library."""
        return self._both(2.0 * n * columns * self.width / self.reach, bytes_moved)

    def _both(self, busy: float, bytes_moved: float) -> float:
        memory = bytes_moved / (self.card.gbytes * 1e9)
        return max(busy, memory) + SHOWN * min(busy, memory)

    def in_l2(self, n: int, columns: int, size: int = 2) -> bool:
        """Return whether a tile of E is still in L2 when the next kernel reads it."""
        return size * n * columns <= 0.8e6 * self.card.l2_mbytes

    def walk(self, n: int, columns: int, epilogue: Epilogue, *, blocks: int = 1, bytes_moved: float = 0.0) -> float:
        """Return the time of the main loop over n rows; a program computes `blocks` blocks of columns."""
        card, tile = self.card, epilogue.tile
        waves = cdiv(cdiv(n, tile.n) * cdiv(cdiv(columns, tile.v), blocks), card.processors) * blocks
        busy = waves * epilogue.instructions * tile.warps / 4 / ISSUED / (card.ghz * 1e9)
        if tile.fused:
            operations = waves * card.processors * 2.0 * tile.n * tile.v * self.width
            operands = waves * card.processors * 2.0 * (tile.n + tile.v) * self.width
            busy += max(operations / (FUSED_SHARE * self.reach), operands / (card.l2_tbytes * 1e12))
            return busy + SHOWN * bytes_moved / (card.gbytes * 1e9)
        # The library writes a product of float32, which the epilogue reads.
        trip = 0 if self.in_l2(n, columns, 4) else 4.0 * n * columns
        library = self.product(n, columns, 2 * self.width * (n + columns) + trip)
        return library + self._both(busy, bytes_moved + trip)


def seconds(card: Card, head: Shape, n: int, kernels: Epilogues, *, what: str, budget: int = BUDGET) -> float:
    """Return the time of one of PASSES over n rows of bfloat16."""
    model = Model(card, head)
    if what == "reference":
        return _reference(model, n, kernels["forward"], budget)
    if what == "training":
        return _frozen(model, n, kernels["exp"], budget)
    return _reference(model, n, kernels["forward"], budget) + _trained(model, n, kernels["gradient"], budget)


def _spans(model: Model, n: int, tile: Tile, budget: int, *, stored: bool, widest: int | None = None) -> Iterator:
    """Yield the rows and columns of every tile."""
    hidden = torch.empty((n, model.width), dtype=torch.bfloat16, device="meta")
    weight = DenseWeight(torch.empty((model.vocabulary, model.width), dtype=torch.bfloat16, device="meta"))
    rows, columns = plan_tile(hidden, weight, budget, tile, stored=stored, widest=widest)
    for a in range(0, n, rows):
        for first in range(0, model.vocabulary, columns):
            yield first == 0, min(rows, n - a), min(columns, model.vocabulary - first)


def _reference(model: Model, n: int, epilogue: Epilogue, budget: int) -> float:
    total, tile = 0.0, epilogue.tile
    for _, rows, columns in _spans(model, n, tile, budget, stored=False):
        blocks = blocks_per_split(cdiv(rows, tile.n), cdiv(columns, tile.v), model.card.processors)
        total += model.walk(rows, columns, epilogue, blocks=blocks) + SMALL_KERNEL
    return total


def _frozen(model: Model, n: int, epilogue: Epilogue, budget: int) -> float:
    """E is written, read by the product and, in the first tile, rescaled; O is read and written once a tile."""
    gpu, launches = 0.0, 0
    for at_start, rows, columns in _spans(model, n, epilogue.tile, budget, stored=True):
        e = 0 if model.in_l2(rows, columns) else 2.0 * rows * columns
        gpu += model.walk(rows, columns, epilogue, bytes_moved=e) + 3 * SMALL_KERNEL
        gpu += 2 * e * at_start / (model.card.gbytes * 1e9)
        gpu += model.product(rows, columns, e + 2.0 * columns * model.width + 8.0 * rows * model.width)
        launches += 5 + (not epilogue.tile.fused)
    return max(gpu, launches * PYTHON)


def _trained(model: Model, n: int, epilogue: Epilogue, budget: int) -> float:
    """The gradient of the logits is written, and read by the products of hidden's and the weight's gradients."""
    gpu, launches = 0.0, 0
    for _, rows, columns in _spans(model, n, epilogue.tile, budget, stored=True, widest=WIDE):
        e = 0 if model.in_l2(rows, columns) else 2.0 * rows * columns
        gpu += model.walk(rows, columns, epilogue, bytes_moved=e)
        gpu += model.product(rows, columns, e + 2.0 * columns * model.width + 8.0 * rows * model.width)
        gpu += model.product(rows, columns, e + 2.0 * rows * model.width + 8.0 * columns * model.width)
        launches += 3
    return max(gpu, launches * PYTHON)


def bare_products(card: Card, head: Shape, n: int, *, count: int) -> float:
    """Return the seconds of `count` matrix products of the head's size at the speed of the library."""
    return count * 2.0 * n * head.hidden * head.vocab / (card.reach * card.tflops * 1e12)


def _table(compiled: list[Compiled], change: Mapping[str, float] = {}) -> dict[tuple[str, str, int, str], float]:
    """Return the seconds by card, head, rows and pass; `change` multiplies fields of the cards."""
    return {
        (card.name, head.model, n, what): seconds(
            replace(card, **{name: getattr(card, name) * factor for name, factor in change.items()}), head, n,
            epilogues(compiled, card.architecture, softcap=head.softcap is not None), what=what,
        )
        for card in CARDS for head in HEADS for n in ROWS for what in PASSES
    }  # fmt: skip


def section(compiled: list[Compiled]) -> str:
    """Return the model as a section of the page."""
    cards = "; ".join(
        f"{c.name} {c.tflops:g} TFLOP/s, {c.gbytes:g} GB/s, {c.processors} processors at {c.ghz:g} GHz" for c in CARDS
    )
    assumed = "; ".join(f"{c.name} {c.l2_tbytes:g} TB/s, {100 * c.reach:.0f}%" for c in CARDS)
    parts = [
        "## A model of the head's time",
        f"Not measured. Milliseconds of a pass over N scored rows in bfloat16, with the default workspace: *reference* "
        "is a pass without gradients; *training* a forward and backward pass with a frozen head and the metrics of "
        "tokens that `log.every = 1` logs, which is the default; *trained head* adds the gradient of its weight. "
        "Beside them stands the time of as many bare products of the library. `bench/roofline.py` explains the model. "
        f"Published limits: {cards}. Assumed: the speed of L2 and the share of the peak that the library reaches "
        f"({assumed}), a fused loop at {100 * FUSED_SHARE:.0f}% of the library's speed, {ISSUED:g} instructions a "
        "cycle and scheduler.",
        _times(compiled),
        _sensitivity(compiled),
    ]
    return "\n\n".join(parts)


def _times(compiled: list[Compiled]) -> str:
    table = _table(compiled)
    columns = [f"{what}, {count} × product" if count > 1 else f"{what}, product" for what, count in PASSES.items()]
    lines = [f"| card | head | N | {' | '.join(columns)} |", "|---" * (3 + len(columns)) + "|"]
    for card in CARDS:
        for head in HEADS:
            for n in ROWS:
                cells = []
                for what, count in PASSES.items():
                    time, bare = table[card.name, head.model, n, what], bare_products(card, head, n, count=count)
                    cells.append(f"{1e3 * time:.1f}, {1e3 * bare:.1f} ({time / bare:.2f} ×)")
                lines.append(f"| {card.name} | {head.model} | {n:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _sensitivity(compiled: list[Compiled]) -> str:
    """Say how the time of a training step changes with each assumption."""
    base = _table(compiled)
    changes = {"the speed of L2": {"l2_tbytes": 0.75}, "the share that the library reaches": {"reach": 0.75}}
    lines = [
        "The inputs that no data sheet has decide how much of it holds. What the library reaches changes the bare "
        "products as much. The speed of L2 changes only ours, on an H100 most: it is the model's weakest input. With "
        "three quarters of each, the training step of Llama-3-8B with 8,192 rows takes:",
        "",
        f"| three quarters of | {' | '.join(card.name for card in CARDS)} |",
        "|---" * (1 + len(CARDS)) + "|",
    ]
    for name, change in changes.items():
        other = _table(compiled, change)
        keys = [(card.name, "Llama-3-8B", 8192, "training") for card in CARDS]
        lines.append(
            f"| {name} | " + " | ".join(f"{1e3 * other[k]:.1f} ({other[k] / base[k]:.2f} ×)" for k in keys) + " |"
        )
    return "\n".join(lines)
