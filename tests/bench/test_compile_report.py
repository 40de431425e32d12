"""The gate of the compile report: each thing that makes a kernel slow or unfit is a fault of its own."""

from dataclasses import replace
from typing import Any

import pytest

from bench.compile_report import EPILOGUE_LIMIT, OTHER_LIMIT, faults
from bench.compiled import Compiled, Variant, variants, walk_variant
from fastpref.kernels.tiles import TILES

SQUARE = TILES[89][2].full


def compiled(variant: Variant, **changes: Any) -> Compiled:
    """Return a result without faults, apart from the changes."""
    good = Compiled(
        variant, registers=200, spills=0, shared=65536, products=64, copies=24,
        loads={128: 4, 32: 2}, stores={128: variant.stored // 16, 32: 3},
    )  # fmt: skip
    return replace(good, **changes)


WALK = walk_variant(89, "bf16", "exp", "", SQUARE)
EPILOGUE = walk_variant(89, "bf16", "exp", "", SQUARE, fused=False)
RESCALE = next(v for v in variants() if (v.architecture, v.name) == (89, "rescale"))
CASES: dict[str, tuple[Variant, dict[str, Any], str]] = {
    "good": (WALK, {}, ""),
    "an epilogue that spills a little": (WALK, {"spills": EPILOGUE_LIMIT}, ""),
    "an epilogue that spills much": (WALK, {"spills": EPILOGUE_LIMIT + 4}, "bytes spilled"),
    "one spill in the main loop": (WALK, {"spills": 8, "spills_inside": 4}, "in the loop that multiplies"),
    "two bytes at a time": (WALK, {"stores": {32: 3, 16: 64}}, "0 of 128 bytes stored 16"),
    "half of E two bytes at a time": (WALK, {"stores": {128: 4, 16: 32}}, "64 of 128 bytes stored 16"),
    "too much shared memory": (WALK, {"shared": 2**20}, "shared memory"),
    "no tensor cores": (WALK, {"products": 0}, "tensor-core"),
    "no asynchronous copies": (WALK, {"copies": 0}, "asynchronous"),
    "a product that is read four bytes at a time": (EPILOGUE, {"loads": {32: 64}}, "loads of 32 to 32"),
    "another kernel that spills": (RESCALE, {"spills": OTHER_LIMIT + 4}, "bytes spilled"),
    "a matrix that is read two bytes at a time": (RESCALE, {"loads": {128: 1, 16: 8}}, "loads of 16 to 128"),
}


@pytest.mark.parametrize("case", CASES)
def test_faults(case: str) -> None:
    """The gate names this fault, and only this one."""
    variant, changes, expected = CASES[case]
    found = faults(compiled(variant, **changes))
    assert len(found) == bool(expected)
    assert expected in "".join(found)


def test_every_tile_of_the_table_is_compiled() -> None:
    """For every card and dtype: the lean tile, the one for one extra, and the full one."""
    compiled_tiles = {(v.architecture, v.dtype, v.tile) for v in variants() if v.tile is not None}
    for architecture, sizes in TILES.items():
        for dtype, size in (("fp16" if architecture == 75 else "bf16", 2), ("fp32", 4)):
            three = sizes[size]
            assert {(architecture, dtype, tile) for tile in (three.lean, three.one, three.full)} <= compiled_tiles
