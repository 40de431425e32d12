"""The tiles of the main loop for each GPU, as one table without autotuning.

Every entry is compiled in a test (`tests/kernels/test_compile.py`): all fit the GPU's shared memory, and on NVIDIA GPUs
none spills a register inside the loop that multiplies. Lengths are never compile-time constants, so a GPU uses one
kernel for all batches.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from triton import knobs


def cdiv(a: int, b: int) -> int:
    """Return ⌈a/b⌉ as an int. The type that Triton declares for its own `cdiv` changes between versions."""
    return -(-a // b)


@dataclass(frozen=True)
class Tile:
    """A tile of rows × columns × hidden units, its number of warps and pipeline stages, and its product's precision."""

    n: int
    v: int
    h: int
    warps: int
    stages: int
    precision: str = "ieee"  # of float32 operands: "ieee", or "tf32x3" on tensor cores; never plain tf32
    fused: bool = True  # whether the kernel multiplies; otherwise the library does, into a tile of float32


@dataclass(frozen=True)
class Tiles:
    """A GPU's tiles for one element size. What an epilogue does takes registers, and these limit the tile.

    The extras of an epilogue are a bias, optional outputs, statistics alone (carried from block to block, where
    exponentials are stored), and a softcap, which counts twice.
    """

    lean: Tile  # for no extra
    one: Tile  # for one: a training step that logs metrics of tokens, or a pass of the reference
    full: Tile  # for two and more

    def choose(self, *, bias: bool, softcap: bool, outputs: bool, stored: bool) -> Tile:
        """Return the tile for an epilogue."""
        return (self.lean, self.one, self.full)[min(bias + 2 * softcap + outputs + (not stored), 2)]


# The wider a tile, the fewer times an operand moves from L2 to a processor: a 128×256 tile reads half of what a 64×128
# tile reads. On an H100 the speed of L2 limits tiles of 128×128, and on an A100 nearly (`bench/roofline.py`).
_SQUARE, _WIDE = Tile(128, 128, 64, 8, 3), Tile(128, 256, 64, 8, 3)
_SINGLE = Tile(64, 64, 32, 8, 3, "tf32x3")
_ADA = {2: Tiles(_SQUARE, _SQUARE, _SQUARE), 4: Tiles(_SINGLE, _SINGLE, _SINGLE)}  # and consumer cards of Ampere
_A100_SQUARE = Tile(128, 128, 64, 8, 4)  # with three stages it spills
_A100 = {2: Tiles(_WIDE, _A100_SQUARE, _A100_SQUARE), 4: _ADA[4]}
# With a softcap a 128×256 tile spills too much. By the model the library's product and the epilogue alone are faster
# than a fused 128×128 tile, by 12 to 16% for Gemma 2. For other epilogues they are equal.
EPILOGUE = Tile(32, 256, 64, 8, 1, fused=False)  # the library multiplies
_HOPPER = {2: Tiles(_WIDE, _WIDE, EPILOGUE), 4: _ADA[4]}
_NARROW_SINGLE = Tile(64, 32, 32, 8, 3, "tf32x3")
_BLACKWELL = {2: _ADA[2], 4: Tiles(_SINGLE, _NARROW_SINGLE, _NARROW_SINGLE)}
_CDNA = {
    2: Tiles(Tile(128, 128, 32, 8, 2), Tile(128, 128, 32, 8, 2), Tile(64, 128, 32, 8, 2)),
    4: Tiles(*[Tile(64, 64, 32, 8, 2)] * 3),
}
_RDNA = {2: Tiles(*[Tile(64, 64, 32, 8, 2)] * 3), 4: Tiles(*[Tile(32, 64, 32, 8, 2)] * 3)}
# For GPUs that fused tiles do not fit: Turing, for which Triton 3.9 has no tensor cores, and GPUs not in the table.
_UNFUSED = {size: Tiles(*[Tile(16, 256, 16, 8, 1, fused=False)] * 3) for size in (2, 4)}
# By architecture (CUDA: compute capability, ROCm: name), then by bytes per element.
TILES: dict[int | str, dict[int, Tiles]] = {
    75: _UNFUSED, 80: _A100, 86: _ADA, 89: _ADA, 90: _HOPPER, 100: _BLACKWELL, 120: _BLACKWELL,
    "gfx942": _CDNA, "gfx1100": _RDNA,
}  # fmt: skip
_INTERPRETER = Tiles(*[Tile(32, 32, 32, 4, 1)] * 3)


def interpreted() -> bool:
    """Return whether kernels run in Triton's interpreter, on the CPU."""
    return bool(knobs.runtime.interpret)


def choose_tiles(hidden: Tensor) -> Tiles | None:
    """Return the tiles for the tensor's device and dtype, or None if the kernels do not run there."""
    if hidden.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return None
    if hidden.device.type != "cuda":
        return _INTERPRETER if interpreted() else None
    architecture = _architecture(hidden.device)
    if hidden.dtype == torch.bfloat16 and isinstance(architecture, int) and architecture < 80:
        return None  # GPUs before Ampere have no bfloat16 product
    return TILES.get(architecture, _UNFUSED).get(hidden.element_size())


def _architecture(device: torch.device) -> int | str:
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.partition(":")[0]
    capability = properties.major * 10 + properties.minor
    return capability if capability in TILES else capability // 10 * 10  # 10.3 runs what 10.0 runs
