"""The smallest problems that cover every kernel, and the laws that their results obey.

Tiles, groups and slices are made small, so that a few rows have several of each, and partial ones at the end. Results
are compared with their definition in float64, by the bounds of tests/kernels.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpref import linear_logprob
from fastpref.config.losses import LossOptions
from fastpref.kernels import linear_logprob_launch, preference_loss_launch
from fastpref.kernels.linear_logprob_naive import linear_logprob_naive
from fastpref.kernels.linear_logprob_torch import TileShape
from fastpref.kernels.tiles import Tile, Tiles
from tests.kernels.test_preference_loss_triton import LOSSES, STRUCTURES, bounds, check, ours
from tests.support.problems import CASES, Case, Problem, answer, check_accuracy, ordinary
from tests.support.token_batches import Batch, with_extras
from tests.support.token_batches import ordinary as ordinary_batch

FUSED, UNFUSED = Tile(16, 16, 16, 4, 1), Tile(16, 16, 16, 4, 1, fused=False)
WIDE = Tile(16, 512, 16, 4, 1)
ROWS, WIDTH, VOCABULARY = 41, 21, 90  # three blocks of rows in two groups, and two slices of three blocks of columns


def _plan(hidden: Tensor, weight: object, budget: int, tile: Tile, **_: object) -> TileShape:
    return TileShape(len(hidden), (65 if tile is WIDE else 3) * tile.v)


SMALL: dict[str, Any] = {
    "plan_tile": _plan, "blocks_per_split": lambda *_: 2, "GROUP": 2, "COMBINE_BLOCK": (2, 16), "RESCALE_ROWS": 16,
    "GRADIENT_BLOCK": (16, 16), "SCALE_BLOCK": 16,
}  # fmt: skip
LENGTHS = ((1, 1), (7, 40), (33, 5))
LONG = ((2051, 3), (1, 2053))  # numbers that float16 does not have
Run = Callable[[], None]


def of_walk() -> dict[str, Run]:
    """Return the problems of the vocabulary walk by name."""
    every = ordinary(ROWS, WIDTH, VOCABULARY, CASES["all"])
    half = ordinary(ROWS, WIDTH, VOCABULARY, CASES["plain"]).to(torch.bfloat16)
    runs: dict[str, tuple[Tile, Problem, str]] = {
        "frozen head": (FUSED, every, "frozen"),
        "trained head": (FUSED, every, "trainable"),
        "product of the library": (UNFUSED, every, "frozen"),
        "half precision": (FUSED, half, "frozen"),
        "rising logits": (FUSED, sloping(600), "frozen"),
        "rising logits, no gradient": (FUSED, sloping(600), "no_grad"),
        "falling logits": (FUSED, sloping(-600), "no_grad"),
        "equal logits": (FUSED, repeating(), "frozen"),
        "equal logits, no gradient": (FUSED, repeating(), "no_grad"),
        "a larger logit elsewhere": (FUSED, larger_elsewhere(), "frozen"),
        "large vocabulary": (WIDE, ordinary(3, 5, 33_000, Case()), "frozen"),
    }
    checks = {
        name: partial(_in_small_tiles, tile, partial(check_accuracy, problem, mode, backend="triton"))
        for name, (tile, problem, mode) in runs.items()
    }
    return checks | {"rows that are read twice": partial(_in_small_tiles, FUSED, check_positions)}


def sloping(nats: float) -> Problem:
    """Return logits that rise along the vocabulary, so that offsets move from block to block."""
    problem = ordinary(ROWS, WIDTH, VOCABULARY, Case())
    slope = torch.linspace(0, nats / WIDTH, VOCABULARY)[:, None]
    return replace(problem, hidden=0.2 * problem.hidden + 1, weight=0.1 * problem.weight + slope)


def repeating() -> Problem:
    """Return columns that repeat beside each other and in other blocks; a target is the largest logit or its equal.

    Logits are whole numbers, so that they are equal in every order of the sums.
    """
    problem = ordinary(ROWS, WIDTH, VOCABULARY, Case())
    hidden, distinct = problem.hidden.round(), (2 * problem.weight[: VOCABULARY // 6]).round()
    best = 2 * (hidden @ distinct.T).argmax(1)
    place = torch.tensor([0, 1, 30, 31, 60, 61])[torch.arange(ROWS) % 6]
    weight = distinct.repeat_interleave(2, 0).repeat(3, 1)
    return replace(problem, hidden=hidden, weight=weight, targets=best + place)


def larger_elsewhere() -> Problem:
    """Return targets with no larger logit in their slice (every other row) or in a later slice and before them."""
    problem = ordinary(ROWS, WIDTH, VOCABULARY, Case())
    weight = torch.cat([2 * problem.weight[:48], 0.5 * problem.weight[48:]])
    logits, columns = problem.hidden @ weight.T, torch.arange(VOCABULARY)
    before = logits.masked_fill(columns >= logits.argmax(1)[:, None], float("-inf")).argmax(1)
    second = 48 + logits[:, 48:].argmax(1)
    return replace(problem, weight=weight, targets=torch.where(torch.arange(ROWS) % 2 == 0, second, before))


def check_positions() -> None:
    """Check the gradient of hidden states of which some predict two targets, and some none."""
    problem, positions = ordinary(7, 21, 50, Case()), torch.tensor([5, 0, 0, 3, 6, 3, 0])
    naive = partial(_naive_at, positions)
    truth, yardstick = answer(naive, problem.to(torch.float64), "frozen"), answer(naive, problem, "frozen")
    result = answer(linear_logprob, problem, "frozen", positions=positions, backend="triton")
    exact = truth.grads["hidden"]
    margin = 2 * float((yardstick.grads["hidden"] - exact).abs().max()) + 1e-6
    torch.testing.assert_close(result.grads["hidden"].double(), exact, rtol=0, atol=margin)


def _naive_at(positions: Tensor, hidden: Tensor, **given: Any) -> Any:
    return linear_logprob_naive(hidden[positions], **given)


def of_losses() -> dict[str, Run]:
    """Return the problems of the preference losses by name: each structure that is compiled in, and what it needs."""
    lengths = dict.fromkeys((*STRUCTURES, "kto, weighted"), LENGTHS) | {"simpo": LONG}
    runs = {}
    for name, of_pairs in lengths.items():
        loss = LOSSES[name]
        batch = with_extras(ordinary_batch(loss, of_pairs, prompts=(3, 0, 20)), loss)
        runs[name] = partial(_in_small_blocks, batch, loss, bounds(batch, loss))
    return runs


def _in_small_tiles(tile: Tile, run: Run) -> None:
    tiles = Tiles(*[tile] * len(fields(Tiles)))
    with _patched(linear_logprob_launch, choose_tiles=lambda _: tiles, **SMALL):
        run()


def _in_small_blocks(batch: Batch, loss: LossOptions, allowed: dict[str, tuple[Tensor, Tensor]]) -> None:
    with _patched(preference_loss_launch, BLOCK=16):
        check(ours(batch, loss), allowed)


@contextmanager
def _patched(module: object, **values: object) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setattr(module, name, value)
        yield
