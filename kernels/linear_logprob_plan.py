"""How a walk over the vocabulary is divided: into tiles of rows and columns, and a tile into programs."""

from functools import lru_cache

from torch import Tensor

from fastpref.kernels.head_weight import HeadWeight
from fastpref.kernels.linear_logprob_torch import TileShape
from fastpref.kernels.tiles import Tile, cdiv

# Columns that a tile has at least, within the budget: then O's traffic takes less time than the products.
WIDE = 8192
# Programs that share a row's columns in FORWARD at most, and their waves. Each leaves statistics, which take memory.
MOST_SPLITS, MOST_WAVES = 256, 16


def plan_tile(
    hidden: Tensor, weight: HeadWeight, budget: int, tile: Tile, *, stored: bool, widest: int | None = None
) -> TileShape:
    """Choose how many rows and columns are computed at once; `widest` limits the columns.

    A logit takes memory for its exponential, if that is stored, and for the product, if the library computes it. A
    column takes memory for the copies of its weights. If neither takes any, everything is computed at once.

    A pass over the vocabulary reads and writes O, float32, once a tile, so wide tiles take precedence: rows are cut
    into equal blocks until a tile has WIDE columns within the budget. What is left of the budget widens it. Only a
    tile of one block of the kernel may exceed the budget.
    """
    n, vocabulary = hidden.shape[0], weight.shape[0]
    logit = hidden.element_size() * stored + 4 * (not tile.fused)  # bytes
    column = weight.copies * weight.shape[1] * weight.dtype.itemsize
    widest = vocabulary if widest is None else min(widest, vocabulary)
    if column:
        widest = min(widest, budget // 2 // column)
    widest = cdiv(max(widest, 1), tile.v) * tile.v
    rows = n
    if logit:
        columns = min(WIDE, widest)
        most = max(1, (budget - columns * column) // (columns * logit) // tile.n) * tile.n
        rows = min(n, whole_blocks(cdiv(n, cdiv(n, most)), tile.n))
    columns = budget // (rows * logit + column) // tile.v * tile.v if logit or column else widest
    return TileShape(rows, max(tile.v, min(columns, widest)))


def whole_blocks(length: int, block: int) -> int:
    """Round a length up to whole blocks."""
    return cdiv(length, block) * block


@lru_cache
def blocks_per_split(row_blocks: int, column_blocks: int, processors: int) -> int:
    """Return how many blocks of columns a program of FORWARD walks over, one after the other.

    A processor runs one program at a time, so they run in waves, and the last wave should be full. Choose the shortest
    time: waves × (blocks + a quarter, for what a program does once), and of equal ones the fewest programs.
    """
    most = max(1, min(column_blocks, MOST_SPLITS, MOST_WAVES * processors // row_blocks))
    candidates = {cdiv(column_blocks, splits) for splits in range(1, most + 1)}

    def time(blocks: int) -> tuple[int, int]:
        waves = cdiv(row_blocks * cdiv(column_blocks, blocks), processors)
        return waves * (4 * blocks + 1), -blocks

    return min(candidates, key=time)
