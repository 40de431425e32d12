"""How the launcher divides a walk: into tiles of rows and columns, and into programs; and how statistics are added."""

import math

import pytest
import torch

from fastpref.kernels import linear_logprob_launch as launch
from fastpref.kernels import tiles
from fastpref.kernels.head_weight import DenseWeight, HeadWeight
from fastpref.kernels.launch import launch as launch_kernel
from fastpref.kernels.linear_logprob_plan import WIDE, blocks_per_split, plan_tile
from fastpref.kernels.tiles import TILES, Tile, cdiv

BUDGET = 128 * 2**20
H100, ADA, TURING = TILES[90][2].lean, TILES[89][2].lean, TILES[75][2].lean
LLAMA, GEMMA, SMOLLM = (128256, 4096), (256000, 2304), (49152, 576)


def head(shape: tuple[int, int], copies: int = 0) -> HeadWeight:
    weight = DenseWeight(torch.empty(shape, dtype=torch.bfloat16, device="meta"))
    weight.copies = copies
    return weight


def plan(n: int, weight: HeadWeight, tile: Tile, budget: int = BUDGET, *, stored: bool = True, **options):
    hidden = torch.empty((n, weight.shape[1]), dtype=torch.bfloat16, device="meta")
    return plan_tile(hidden, weight, budget, tile, stored=stored, **options)


def test_rows_are_cut_before_columns_narrow() -> None:
    """With 32,768 rows of Llama 3, O is read and written 16 times: 17.2 GB. Tiles of all rows would move 67.6 GB."""
    rows, columns = plan(32768, head(LLAMA), H100)
    assert (rows, columns) == (8192, 8192)
    moved = 8 * 32768 * 4096 * cdiv(LLAMA[0], columns)
    assert moved < 17.3e9


@pytest.mark.parametrize(
    ("n", "shape", "most"), [(100, LLAMA, 1), (600, LLAMA, 2), (2048, LLAMA, 4), (4096, SMOLLM, 3)]
)
def test_few_rows_take_wide_tiles(n: int, shape: tuple[int, int], most: int) -> None:
    """Python takes some time a tile, so few rows must not make many: columns grow with what the budget leaves."""
    assert cdiv(shape[0], plan(n, head(shape), ADA).columns) <= most


@pytest.mark.parametrize("budget", [1, 4000, 2**20, 2**24, BUDGET, 2**31])
@pytest.mark.parametrize("tile", [H100, ADA, TURING], ids=["wide", "square", "of the library"])
@pytest.mark.parametrize("copies", [0, 1, 3])
@pytest.mark.parametrize("stored", [True, False])
def test_a_tile_fits_the_budget(budget: int, tile: Tile, copies: int, stored: bool) -> None:
    """A tile takes no more than the budget, unless it is one block. Its sizes are whole blocks, its rows even."""
    for shape in (LLAMA, GEMMA, (100, 64)):
        weight = head(shape, copies)
        for n in (1, 127, 129, 4096, 12289, 70000):
            rows, columns = plan(n, weight, tile, budget, stored=stored)
            logit, column = 2 * stored + 4 * (not tile.fused), 2 * copies * shape[1]
            assert columns % tile.v == 0
            assert rows == n or rows % tile.n == 0
            least = columns == tile.v and rows <= tile.n
            assert rows * columns * logit + columns * column <= budget or least or (not logit and columns == tile.v)
            if n > rows:
                blocks = cdiv(n, rows)
                assert rows - math.ceil(n / blocks) < tile.n


def test_a_trained_head_keeps_the_slice_of_its_gradient_small() -> None:
    """The float32 slice of the weight's gradient has a tile's columns, so they do not grow for few rows."""
    assert plan(64, head(LLAMA), ADA, widest=WIDE).columns == WIDE


@pytest.mark.parametrize("processors", [82, 108, 128, 132, 170])
def test_programs_fill_whole_waves(processors: int) -> None:
    """Programs of one a processor run in waves, which take at most 7% and one block longer than without them."""
    for tile in (H100, ADA, Tile(64, 128, 64, 8, 3)):
        for shape in (LLAMA, GEMMA):
            for n in (128, 700, 2048, 8192, 32768):
                row_blocks, column_blocks = cdiv(n, tile.n), cdiv(shape[0], tile.v)
                blocks = blocks_per_split(row_blocks, column_blocks, processors)
                splits = cdiv(column_blocks, blocks)
                waves = cdiv(row_blocks * splits, processors)
                assert waves * blocks <= 1.07 * row_blocks * column_blocks / processors + 1
                # Their statistics take less than a tile does.
                assert splits * n * 4 * 8 <= BUDGET / 4


@pytest.mark.parametrize("splits", [1, 63, 64, 65, 200])
def test_statistics_of_any_number_of_splits_add_up(splits: int) -> None:
    """Sums to one offset, and maxima, are those of all splits, also past one block of splits, and repeat."""
    torch.manual_seed(0)
    n = 37
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parts = launch._Statistics(*torch.randn(8, splits, n, device=device).unbind(0))
    parts.sum_others.abs_()

    def combined() -> launch._Statistics:
        running = launch._Statistics.of_no_columns(n, device)
        block_s, block_n = launch.COMBINE_BLOCK
        launch_kernel(
            launch._combine_kernel, (cdiv(n, block_n),), *parts, *running, torch.empty(n, device=device), n, splits,
            HAS_SPREAD=True, HAS_MEAN=True, HAS_TOP1=True, BLOCK_S=block_s, BLOCK_N=block_n, num_warps=4,
        )  # fmt: skip
        return running

    running, again = combined(), combined()
    base = parts.base.amax(0)
    moved = (parts.base - base).double()
    sums = parts.sum_others.double()
    exact = {
        "base": base,
        "sum_others": (moved.exp() * sums).sum(0),
        "sum_ez": (moved.exp() * (parts.sum_ez.double() + moved * sums)).sum(0),
        "sum_ee": ((2 * moved).exp() * parts.sum_ee.double()).sum(0),
        "sum_z": parts.sum_z.double().sum(0),
        "z_target": parts.z_target.amax(0),
        "largest": parts.largest.amax(0),
        "ahead": parts.ahead.amax(0),
    }
    for name, value in exact.items():
        torch.testing.assert_close(getattr(running, name).double(), value.double(), rtol=1e-5, atol=1e-4)
        assert torch.equal(getattr(running, name), getattr(again, name))


def test_waves_of_a_reference_pass() -> None:
    """2,048 rows on an H100's 132 processors: with 128×128 tiles, four waves without a rest, or one of eight splits."""
    for tile in (ADA, H100):
        row_blocks, column_blocks = cdiv(2048, tile.n), cdiv(LLAMA[0], tile.v)
        blocks = blocks_per_split(row_blocks, column_blocks, 132)
        programs = row_blocks * cdiv(column_blocks, blocks)
        assert programs / (132 * cdiv(programs, 132)) > 0.96


def test_every_tile_of_the_table_can_be_chosen_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Comparisons run a walk with any tile, fused or with the library's product, and get the same numbers."""
    from fastpref.kernels.linear_logprob_torch import LogitTransform

    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(20, 16), torch.randn(70, 16), torch.randint(70, (20,))
    expected = (hidden @ weight.T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    for fused in (True, False):
        tile = Tile(16, 32, 16, 4, 1, fused=fused)
        monkeypatch.setattr(launch, "choose_tiles", lambda hidden: pytest.fail("the table was asked"))
        for with_grad in (True, False):
            result = launch.walk_vocabulary(
                hidden, DenseWeight(weight), targets, None, LogitTransform(),
                outputs=(), budget=2**20, with_grad=with_grad, tile=tile,
            )  # fmt: skip
            torch.testing.assert_close(result.logp, expected, rtol=1e-4, atol=1e-4)


def test_a_softcap_takes_the_tile_for_two_extras() -> None:
    """The extras of an epilogue choose its tile."""
    three = tiles.Tiles(*(Tile(16 * k, 32, 16, 4, 1) for k in (3, 2, 1)))
    extras = {"bias": False, "softcap": False, "outputs": False, "stored": True}
    assert three.choose(**extras) is three.lean
    for one in ({"bias": True}, {"outputs": True}, {"stored": False}):
        assert three.choose(**extras | one) is three.one
    for two in ({"softcap": True}, {"bias": True, "outputs": True}, {"stored": False, "outputs": True}):
        assert three.choose(**extras | two) is three.full
