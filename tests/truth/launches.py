"""Launches of every kernel with the tiles of a GPU, recorded while ttsem executes them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from triton.runtime.jit import JITFunction
from ttsem import harness  # pyright: ignore[reportMissingImports]

from fastpref.kernels import linear_logprob_launch, tiles
from fastpref.kernels.linear_logprob_torch import TileShape
from tests.kernels.test_preference_loss_triton import LOSSES
from tests.support.problems import CASES, ordinary, ours
from tests.support.token_batches import ordinary as ordinary_batch
from tests.support.token_batches import run, with_extras

WALK = ("walk, forward", "walk, exp", "walk, gradient", "combine", "rescale, E", "rescale, O", "gradient", "scale")
STRUCTURES = ("dpo all at once", "orpo, prompts", "kto")
KERNELS = (*WALK, *(f"loss, {name}" for name in STRUCTURES))


def every_kernel(architecture: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, harness.LaunchRecord]:
    """Execute each kernel once, in each mode, with the tiles of this GPU; return the launches by name.

    Call it while `executed_launches` is open.
    """
    walk = ordinary(9, 80, 300, CASES["all"]).to(dtype)
    found: dict[str, harness.LaunchRecord] = {}
    with _tiles_of(architecture):
        for mode in ("no_grad", "frozen", "trainable"):
            for record in _recorded(lambda mode=mode: ours(walk, mode, backend="triton")):
                found.setdefault(_name(record), record)
        for name in STRUCTURES:
            batch = with_extras(ordinary_batch(LOSSES[name], ((1, 1), (7, 40))), LOSSES[name])
            for record in _recorded(lambda name=name, batch=batch: run(batch, LOSSES[name], "triton")):
                found[f"loss, {name}"] = record
    assert set(found) == set(KERNELS)
    return found


def _one_block_of_columns(hidden: Tensor, weight: object, budget: int, tile: tiles.Tile, **_: object) -> TileShape:
    return TileShape(len(hidden), tile.v)


def _name(record: harness.LaunchRecord) -> str:
    name = record.fn_name.strip("_").removesuffix("_kernel")
    if name == "walk":
        return f"walk, {('forward', 'exp', 'gradient')[record.kwargs['MODE']]}"
    if name == "rescale":
        return f"rescale, {'O' if record.kwargs['IS_FACTOR'] else 'E'}"
    return name


def _recorded(run: Callable[[], object]) -> list[harness.LaunchRecord]:
    records: list[harness.LaunchRecord] = []
    execute = JITFunction.run

    def recorded(self: JITFunction, *arguments, grid, warmup, **options) -> None:
        records.append(harness.record_launch(self, arguments, options, grid, execute, "").record)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", recorded)
        run()
    return records


@contextmanager
def _tiles_of(architecture: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module in (tiles, linear_logprob_launch):
            patch.setattr(module, "choose_tiles", lambda hidden: tiles.TILES[architecture][hidden.element_size()])
        patch.setattr(linear_logprob_launch, "plan_tile", _one_block_of_columns)
        yield
