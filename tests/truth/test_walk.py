"""The laws of the vocabulary walk's kernels, as tests/kernels states them, for compiled kernels."""

from dataclasses import astuple, fields

import pytest
import torch

from fastpref.kernels import linear_logprob_launch, tiles
from tests.kernels.test_linear_logprob_triton import *  # noqa: F403
from tests.support.problems import CASES, DTYPES, MODES, check_accuracy, ordinary

del test_outputs_are_written_whole  # noqa: F821  new memory is always full of NaN here


def _tiles_of_gpus() -> list:
    """List every tile of the table, with a dtype of its element size."""
    found = {}
    for by_size in tiles.TILES.values():
        for size, of_size in by_size.items():
            for field in fields(of_size):
                tile = getattr(of_size, field.name)
                found |= {(str(dtype), tile): (dtype, tile) for dtype in DTYPES if dtype.itemsize == size}
    return [
        pytest.param(dtype, tile, id=f"{dtype}-{'-'.join(map(str, astuple(tile)))}") for dtype, tile in found.values()
    ]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("dtype", "tile"), _tiles_of_gpus())
def test_accuracy_in_the_tiles_of_gpus(
    dtype: torch.dtype, tile: tiles.Tile, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results are as accurate in the tiles that GPUs take, with a partial tile of rows, columns and hidden units."""
    of_one = tiles.Tiles(*[tile] * len(fields(tiles.Tiles)))
    monkeypatch.setattr(linear_logprob_launch, "choose_tiles", lambda hidden: of_one)
    problem = ordinary(tile.n + 3, tile.h + 9, tile.v + 5, CASES["all"])
    check_accuracy(problem.to(dtype), mode, backend="triton")
