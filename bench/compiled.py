"""Compiles of every kernel for every card, without a card, as `compile_report.py` tabulates and checks them.

Triton's wheel carries the assembler and disassembler of CUDA, so registers, spills, shared memory, tensor-core
instructions and the widths of stores are those that the card would use.
"""

import multiprocessing
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.sass import Code, disassembled
from fastpref.kernels import linear_logprob_launch as launch
from fastpref.kernels import linear_logprob_triton as walk
from fastpref.kernels import preference_loss_launch as loss
from fastpref.kernels.launch import COMPILE_OPTIONS
from fastpref.kernels.tiles import TILES, Tile

# Bytes of shared memory that a block may use: CUDA programming guide, and 64 KiB of LDS on the AMD cards.
SHARED_LIMIT = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99, "gfx942": 64, "gfx1100": 64}
TENSOR_CORE = {80: ("HMMA",), 86: ("HMMA",), 89: ("HMMA",), 90: ("HGMMA",), 100: ("UTCHMMA", "UTCMMA"), 120: ("HMMA",)}
_SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}
_MODES = {"forward": walk.FORWARD.value, "exp": walk.EXP.value, "gradient": walk.GRADIENT.value}
_OUTPUTS = ("HAS_SPREAD", "HAS_MEAN", "HAS_TOP1")
_FLAGS = ("HAS_BIAS", "HAS_SOFTCAP", *_OUTPUTS)
_EXTRAS = {"": (), "bias": ("HAS_BIAS",), "outputs": _OUTPUTS, "softcap": ("HAS_SOFTCAP",), "all": _FLAGS}
# The epilogues that are compiled: those without extras; what a run may ask for often, in bfloat16; and the fullest.
_ALL_DTYPES = tuple((mode, extras) for mode in _MODES for extras in ("", "all"))
_ONE_DTYPE = (("exp", "bias"), ("exp", "outputs"), ("exp", "softcap"), ("forward", "outputs"), ("forward", "softcap"))


@dataclass(frozen=True)
class Variant:
    """A compilation of a kernel."""

    architecture: int | str
    name: str  # the name of the kernel
    what: str  # the configuration of the kernel
    dtype: str  # the dtype of the tensors that are not always float32
    kernel: Any = field(repr=False)
    constants: dict[str, Any] = field(repr=False)
    types: dict[str, str] = field(repr=False, default_factory=dict)  # argument → type, if `_type` guesses wrong
    tile: Tile | None = None  # the tile of the main loop

    @property
    def multiplies(self) -> bool:
        return self.tile is not None and self.tile.fused

    @property
    def reads_product(self) -> bool:
        return self.tile is not None and not self.tile.fused

    @property
    def stored(self) -> int:
        """The bytes of a tile that a thread stores."""
        if self.tile is None or self.constants["MODE"] == _MODES["forward"]:
            return 0
        return self.tile.n * self.tile.v * _SIZES[self.dtype] // (32 * self.tile.warps)


@dataclass(frozen=True)
class Compiled:
    variant: Variant
    registers: int
    spills: int  # bytes of local memory a thread, with those of a stack
    shared: int  # bytes of shared memory
    products: int  # tensor-core instructions
    copies: int = 0  # asynchronous copies from global to shared memory
    spills_inside: int = 0  # bytes that a thread spills in a pass of the loop that multiplies
    instructions: int = 0  # outside that loop, which is the epilogue for the most part
    shapes: tuple[str, ...] = ()  # of the matrix products of a warp or warp group
    loads: dict[int, int] = field(default_factory=dict)  # from global memory: width in bits → number
    stores: dict[int, int] = field(default_factory=dict)


def variants() -> Iterator[Variant]:
    for architecture in TILES:
        yield from _walk_variants(architecture)
        yield from _helper_variants(architecture)
        yield from _loss_variants(architecture)


def _walk_variants(architecture: int | str) -> Iterator[Variant]:
    """Yield the main loop of every mode with the tiles that the launcher may choose.

    float16 differs from bfloat16 only by the names of its instructions, so it is compiled once per card. On Turing,
    which has no bfloat16, all variants use it.
    """
    turing = architecture == 75
    sixteen = "fp16" if turing else "bf16"
    for dtype in (sixteen, "fp32"):
        for case in _ALL_DTYPES if dtype == "fp32" else sorted({*_ALL_DTYPES, *_ONE_DTYPE}):
            yield walk_variant(architecture, dtype, *case)
    if not turing:
        yield walk_variant(architecture, "fp16", "exp", "all")


def walk_variant(
    architecture: int | str, dtype: str, mode: str, extras: str, tile: Tile | None = None, *, fused: bool = True
) -> Variant:
    """Return the main loop for an epilogue, with the tile of the table or another."""
    flags = dict.fromkeys(_FLAGS, False) | dict.fromkeys(_EXTRAS[extras], True)
    if mode == "gradient":
        flags |= dict.fromkeys(_OUTPUTS, False)
    tile = tile or TILES[architecture][_SIZES[dtype]].choose(
        bias=flags["HAS_BIAS"], softcap=flags["HAS_SOFTCAP"], outputs=flags["HAS_SPREAD"], stored=mode != "forward"
    )
    tile = tile if fused else replace(tile, fused=False)
    constants = flags | {"MODE": _MODES[mode], "FUSED": tile.fused, "GROUP": launch.GROUP, "UPCAST": False}
    constants |= {"BLOCK_N": tile.n, "BLOCK_V": tile.v, "BLOCK_H": tile.h, "PRECISION": tile.precision}
    types: dict[str, str] = dict.fromkeys(("p_hidden", "p_weight", "p_bias", "p_tile"), f"*{dtype}")
    return Variant(architecture, f"walk, {mode}", extras, dtype, walk._walk_kernel, constants, types, tile)


def _helper_variants(architecture: int | str) -> Iterator[Variant]:
    """Yield the other kernels, with the block sizes of the launcher."""
    sixteen = "fp16" if architecture == 75 else "bf16"
    block_v = TILES[architecture][2].full.v
    block_n, block_h = launch.GRADIENT_BLOCK
    block_s, block_rows = launch.COMBINE_BLOCK
    for what, on in (("", False), ("all outputs", True)):
        constants = {**dict.fromkeys(_OUTPUTS, on), "BLOCK_S": block_s, "BLOCK_N": block_rows}
        yield Variant(architecture, "combine", what, "fp32", walk._combine_kernel, constants)
    for what, factor, dtype in (("E", False, sixteen), ("O", True, "fp32")):
        constants = {"IS_FACTOR": factor, "BLOCK_N": launch.RESCALE_ROWS, "BLOCK_V": block_v}
        types = {"p_matrix": f"*{dtype}"}
        yield Variant(architecture, "rescale", what, dtype, walk._rescale_kernel, constants, types)
    for dtype in (sixteen, "fp32"):
        constants = {"BLOCK_N": block_n, "BLOCK_H": block_h}
        types = {"p_weight": f"*{dtype}", "p_out": f"*{dtype}", "p_index": "*i64"}
        yield Variant(architecture, "gradient", "", dtype, walk._gradient_kernel, constants, types)
        types = {"p_grad": f"*{dtype}", "p_out": f"*{dtype}", "p_order": "*i64", "p_begin": "*i64"}
        yield Variant(architecture, "scale", "", dtype, walk._scale_kernel, {"BLOCK_H": launch.SCALE_BLOCK}, types)


def _loss_variants(architecture: int | str) -> Iterator[Variant]:
    """Yield the kernels of the preference losses."""
    for what, constants in loss.compile_cases():
        kernel = loss.kernel_of(constants)
        types = {name: loss.argument_type(name, constants) for name in kernel.arg_names}
        yield Variant(architecture, "preference loss", what, "fp32", kernel, constants, types)


def compile_variant(variant: Variant) -> Compiled:
    kernel = variant.kernel
    signature = {name: _type(name, variant) for name in kernel.arg_names}
    # Addresses, strides, H and the width of a tile, on which a launch specialises, are assumed to be multiples of 16.
    free = {*kernel.do_not_specialize, *kernel.do_not_specialize_on_alignment, *variant.constants}
    aligned = [name for name in kernel.arg_names if _type(name, variant)[0] in "*i" and name not in free]
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, signature, variant.constants, attributes)
    amd = isinstance(variant.architecture, str)
    target = GPUTarget("hip" if amd else "cuda", variant.architecture, 64 if variant.architecture == "gfx942" else 32)
    warps, stages = (4, 3) if variant.tile is None else (variant.tile.warps, variant.tile.stages)
    options = {"num_warps": warps, "num_stages": stages, **COMPILE_OPTIONS}
    binary = triton.compile(source, target=target, options=options)
    return _read_amd(variant, binary) if amd else _read_cuda(variant, binary)


def compile_all(wanted: list[Variant]) -> list[Compiled]:
    """Compile on all processors, in processes that are copies of this one: kernels cannot be sent to another."""
    _WANTED[:] = wanted
    with multiprocessing.get_context("fork").Pool() as pool:
        compiled = pool.map(_compile_wanted, range(len(wanted)), chunksize=1)
    return [replace(c, variant=variant) for c, variant in zip(compiled, wanted, strict=True)]


_WANTED: list[Variant] = []


def _compile_wanted(i: int) -> Compiled:
    return replace(compile_variant(_WANTED[i]), variant=replace(_WANTED[i], kernel=None, constants={}))


def _type(name: str, variant: Variant) -> str:
    if name in variant.constants:
        return "constexpr"
    if name in variant.types:
        return variant.types[name]
    if name == "p_targets":
        return "*i64"
    if name.startswith("p_"):
        return "*fp32"
    return "fp32" if name in ("gain", "cap", "lazy") else "i32"


def _read_cuda(variant: Variant, binary: Any) -> Compiled:
    report, machine_code = disassembled(binary.asm["cubin"])
    code = Code.parse(machine_code)
    return Compiled(
        variant,
        registers=_number(r"REG:(\d+)", report),
        spills=_number(r"STACK:(\d+)", report) + _number(r"LOCAL:(\d+)", report),
        shared=binary.metadata.shared,
        products=code.count(*TENSOR_CORE.get(int(variant.architecture), ())),
        copies=code.count("LDGSTS", "UTMALDG", "UBLKCP"),
        spills_inside=code.spilled(inside=True),
        instructions=code.count_outside(),
        shapes=tuple(code.product_shapes()),
        loads=code.widths("LDG"),
        stores=code.widths("STG"),
    )


def _read_amd(variant: Variant, binary: Any) -> Compiled:
    assembly = binary.asm["amdgcn"]
    return Compiled(
        variant,
        registers=_number(r"\.vgpr_count:\s+(\d+)", assembly),
        spills=4 * _number(r"\.vgpr_spill_count:\s+(\d+)", assembly),
        shared=binary.metadata.shared,
        products=len(re.findall(r"\bv_(w?mfma|wmma)", assembly)),
    )


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    return int(match.group(1)) if match else 0
