"""Time of the head's passes with every tile of the GPU, beside the matrix products that none can avoid.

The traffic between L2 and the processors is not measured but inferred: a program of tile N × V reads N·H + V·H numbers,
and the time of the forward pass, which has nothing else to do, bounds the rate from below.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.first_card.numerics import LOGGED, make_head, triton_runs
from bench.first_card.outcome import Case, Outcome
from bench.first_card.sizes import Sizes
from bench.measure import median_ms
from bench.problems import Shape
from fastpref.kernels.head_weight import DenseWeight
from fastpref.kernels.linear_logprob_torch import LogitTransform
from fastpref.kernels.tiles import EPILOGUE, Tile, choose_tiles

BUDGET = 128 << 20  # bytes, the default workspace
SLICE = 8192  # columns of the plain products at once
MANY = 8192  # rows above which every case is repeated less


@dataclass(frozen=True)
class Timing:
    """The inputs of one head, and the milliseconds of the plain products, which the first case measures."""

    shape: Shape
    rows: int
    sizes: Sizes
    products: dict[int, float]

    @property
    def repeats(self) -> int:
        return min(self.sizes.repeats, 3) if self.rows > MANY else self.sizes.repeats

    @property
    def name(self) -> str:
        return f"{self.shape.model}, {self.rows:,} rows"

    def ms(self, step: Callable[[], object]) -> float:
        return median_ms(step, self.sizes.device, self.repeats)


def cases(sizes: Sizes) -> Iterator[Case]:
    if not triton_runs(sizes.device):
        yield "every tile", lambda: Outcome(note="left out: Triton's kernels do not run here")
        return
    for rows in sizes.rows:
        for shape in sizes.timed:
            timing = Timing(shape, rows, sizes, {})
            yield f"{timing.name}: plain products", lambda timing=timing: _products(timing)
            for tile in tiles_of(sizes):
                for passed in ("forward", "exp", "exp, logged", "gradient"):
                    what = f"{timing.name}: {passed}, {_described(tile)}"
                    yield what, lambda timing=timing, tile=tile, passed=passed: _time(timing, tile, passed)
            if rows <= MANY:
                yield f"{timing.name}: cut-cross-entropy", lambda timing=timing: _rival(timing)


def tiles_of(sizes: Sizes) -> list[Tile]:
    """Return the distinct tiles of a device for bfloat16, and one with which the library multiplies."""
    tiles = choose_tiles(torch.empty(1, 1, dtype=torch.bfloat16, device=sizes.device))
    assert tiles is not None
    return list(dict.fromkeys((tiles.lean, tiles.one, tiles.full, EPILOGUE)))


def _described(tile: Tile) -> str:
    return f"{tile.n}×{tile.v}×{tile.h}" if tile.fused else f"{tile.n}×{tile.v}, products by the library"


def _products(timing: Timing) -> Outcome:
    """Time one product, hidden·Wᵀ by slices, and two, with the product of the result and W."""
    head = make_head(timing.shape, timing.rows, torch.bfloat16, timing.sizes.device)
    hidden, weight = head.hidden.detach(), head.weight
    logits = hidden.new_empty(timing.rows, min(SLICE, len(weight)))
    total = torch.zeros_like(hidden)

    def step(count: int) -> None:
        for start in range(0, len(weight), SLICE):
            part = weight[start : start + SLICE]
            torch.mm(hidden, part.t(), out=logits[:, : len(part)])
            if count == 2:
                total.addmm_(logits[:, : len(part)], part)

    for count in (1, 2):
        timing.products[count] = timing.ms(lambda count=count: step(count))
    one, two = timing.products.values()
    operations = 2 * timing.rows * weight.numel()
    return Outcome({"ms of one": one, "ms of two": two, "TFLOP/s": operations / one / 1e9})


def _time(timing: Timing, tile: Tile, passed: str) -> Outcome:
    head = make_head(timing.shape, timing.rows, torch.bfloat16, timing.sizes.device)
    ms = timing.ms(_pass(head.hidden.detach(), head.weight, head.targets, head.softcap, tile, passed))
    count = 1 if passed == "forward" else 2
    numbers = {"ms": ms}
    if count in timing.products:
        numbers[f"× {count} products"] = ms / timing.products[count]
    if passed == "forward" and tile.fused:
        read = 2 * timing.rows * head.weight.numel() * (1 / tile.n + 1 / tile.v)  # bytes of bfloat16
        numbers["TB/s from L2 at least"] = read / ms / 1e9
    return Outcome(numbers)


def _pass(
    hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None, tile: Tile, passed: str
) -> Callable[[], object]:
    """Return one pass: the forward one, the one that stores exponentials, or that of a trained head's hidden states."""
    from fastpref.kernels.linear_logprob_launch import recompute_gradients, walk_vocabulary

    head, transform = DenseWeight(weight), LogitTransform(softcap)
    outputs: Sequence[str] = LOGGED if passed == "exp, logged" else ()
    if passed != "gradient":
        return lambda: walk_vocabulary(
            hidden, head, targets, None, transform,
            outputs=tuple(outputs), budget=BUDGET, with_grad=passed != "forward", tile=tile,
        )  # fmt: skip
    walk = walk_vocabulary(hidden, head, targets, None, transform, outputs=(), budget=BUDGET, with_grad=False)
    statistics = torch.stack([walk.z_target, walk.maximum, walk.sum_others])
    ones = torch.ones(len(targets), device=hidden.device)
    return lambda: recompute_gradients(
        ones, hidden, head, targets, None, transform, statistics,
        budget=BUDGET, wanted=(True, False, False), tile=tile,
    )  # fmt: skip


def _rival(timing: Timing) -> Outcome:
    """Time Cut Cross-Entropy's forward and backward pass of a frozen head, where it is installed."""
    if timing.sizes.device == "cpu":
        return Outcome(note="left out: its kernels need a GPU")
    from cut_cross_entropy import linear_cross_entropy

    head = make_head(timing.shape, timing.rows, torch.bfloat16, timing.sizes.device)

    def step() -> None:
        loss = linear_cross_entropy(head.hidden, head.weight, head.targets, softcap=head.softcap, reduction="sum")
        torch.autograd.grad(loss, head.hidden)

    ms = timing.ms(step)
    return Outcome({"ms": ms} | ({"× 2 products": ms / timing.products[2]} if 2 in timing.products else {}))
