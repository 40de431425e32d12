"""Compile every kernel for every card, without a card, and report the compiler's results.

    python -m bench.compile_report docs/kernels.md

Triton's wheel carries the assembler and disassembler of CUDA, so registers, spills, shared memory and tensor-core
instructions are those that the card would use. The same page has `roofline.py`'s model of the shortest possible time.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench import roofline
from fastpref.kernels import linear_logprob_launch as launch
from fastpref.kernels import linear_logprob_triton as walk
from fastpref.kernels import preference_loss_launch as loss
from fastpref.kernels.tiles import TILES, Tile

# Bytes of shared memory that a block may use: CUDA programming guide, and 64 KiB of LDS on the AMD cards.
SHARED_LIMIT = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99, "gfx942": 64, "gfx1100": 64}
TENSOR_CORE = {75: "HMMA", 80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA|UTCMMA", 120: "HMMA"}
_SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}
_MODES = {"forward": walk.FORWARD.value, "exp": walk.EXP.value, "gradient": walk.GRADIENT.value}
_FLAGS = ("HAS_BIAS", "HAS_SOFTCAP", "HAS_SPREAD", "HAS_MEAN", "HAS_TOP1")


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


@dataclass(frozen=True)
class Compiled:
    variant: Variant
    registers: int
    spills: int  # bytes of local memory per thread
    shared: int  # bytes of shared memory
    products: int  # tensor-core instructions
    copies: int  # asynchronous copies from global to shared memory


def variants() -> Iterator[Variant]:
    for architecture in TILES:
        yield from _walk_variants(architecture)
        yield from _helper_variants(architecture)
        yield from _loss_variants(architecture)


def _walk_variants(architecture: int | str) -> Iterator[Variant]:
    """Yield the simplest and the most complex main loop of every mode that the launcher may choose.

    float16 differs from bfloat16 only by the names of its instructions, so it is compiled once per card. On Turing,
    which has no bfloat16, all variants use it.
    """
    turing = architecture == 75
    for dtype, size in _SIZES.items():
        if turing and dtype == "bf16":
            continue
        once = dtype == "fp16" and not turing
        for mode in ("exp",) if once else _MODES:
            for full in (True,) if once else (False, True):
                tiles = TILES[architecture][size]
                tile = tiles.full if full or mode == "forward" else tiles.lean
                flags = {flag: full and (mode != "gradient" or flag in _FLAGS[:2]) for flag in _FLAGS}
                constants = flags | {"MODE": _MODES[mode], "FUSED": tile.fused, "GROUP": launch.GROUP, "UPCAST": False}
                constants |= {"BLOCK_N": tile.n, "BLOCK_V": tile.v, "BLOCK_H": tile.h, "PRECISION": tile.precision}
                types: dict[str, str] = dict.fromkeys(("p_hidden", "p_weight", "p_bias", "p_tile"), f"*{dtype}")
                name, what = f"walk, {mode}", "all" if full else ""
                yield Variant(architecture, name, what, dtype, walk._walk_kernel, constants, types, tile)


def _helper_variants(architecture: int | str) -> Iterator[Variant]:
    """Yield the other kernels, with the block sizes of the launcher."""
    sixteen = "fp16" if architecture == 75 else "bf16"
    block_v = TILES[architecture][2].full.v
    block_n, block_h = launch.GRADIENT_BLOCK
    for what, on in (("", False), ("all outputs", True)):
        constants = {**dict.fromkeys(_FLAGS[2:], on), "BLOCK_N": launch.COMBINE_BLOCK}
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
    aligned = [name for name in kernel.arg_names if name.startswith(("p_", "stride_")) or name == "width"]
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, signature, variant.constants, attributes)
    amd = isinstance(variant.architecture, str)
    target = GPUTarget("hip" if amd else "cuda", variant.architecture, 64 if variant.architecture == "gfx942" else 32)
    warps, stages = (4, 3) if variant.tile is None else (variant.tile.warps, variant.tile.stages)
    binary = triton.compile(source, target=target, options={"num_warps": warps, "num_stages": stages})
    return _read_amd(variant, binary) if amd else _read_cuda(variant, binary)


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
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        run = partial(subprocess.run, capture_output=True, text=True, check=True)
        usage = run([tools / "cuobjdump", "-res-usage", file.name])
        sass = run([tools / "nvdisasm", "-c", file.name]).stdout
    report = usage.stdout + usage.stderr
    return Compiled(
        variant,
        registers=_number(r"REG:(\d+)", report),
        spills=_number(r"STACK:(\d+)", report) + _number(r"LOCAL:(\d+)", report),
        shared=binary.metadata.shared,
        products=len(re.findall(rf"\b({TENSOR_CORE[int(variant.architecture)]})", sass)),
        copies=len(re.findall(r"\b(LDGSTS|UTMALDG|UBLKCP)", sass)),
    )


def _read_amd(variant: Variant, binary: Any) -> Compiled:
    assembly = binary.asm["amdgcn"]
    return Compiled(
        variant,
        registers=_number(r"\.vgpr_count:\s+(\d+)", assembly),
        spills=4 * _number(r"\.vgpr_spill_count:\s+(\d+)", assembly),
        shared=binary.metadata.shared,
        products=len(re.findall(r"\bv_(w?mfma|wmma)", assembly)),
        copies=0,
    )


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    return int(match.group(1)) if match else 0


def faults(c: Compiled) -> list[str]:
    """List the reasons why a kernel does not fit its card.

    These are too much shared memory, and spills on NVIDIA cards (those on AMD cards are in the table). A kernel that
    multiplies also needs tensor cores and, on NVIDIA cards, asynchronous copies.
    """
    architecture, limit = c.variant.architecture, SHARED_LIMIT[c.variant.architecture]
    reasons = []
    if c.spills and isinstance(architecture, int):
        reasons.append(f"{c.spills} bytes spilled")
    if c.shared > limit * 1024:
        reasons.append(f"{c.shared} bytes of shared memory, the card has {limit} KiB")
    if not c.variant.multiplies:
        return reasons
    if not c.products and not (architecture == "gfx1100" and c.variant.dtype == "fp32"):  # RDNA 3 has none for float32
        reasons.append("no tensor-core instruction")
    if not c.copies and isinstance(architecture, int):
        reasons.append("no asynchronous copy")
    return reasons


def page(compiled: list[Compiled]) -> str:
    """Return the Markdown page."""
    parts = [
        "# Kernels, compiled",
        "Written by `python -m bench.compile_report docs/kernels.md` with Triton "
        f"{triton.__version__}; no card was used. None of these kernels spills a register or uses a stack on an NVIDIA "
        "card, all fit its shared memory, and every one that multiplies does so on tensor cores with asynchronous "
        "copies: the command fails otherwise.",
        "## The main loop",
        "`_walk_kernel` in all its modes, the plainest and the fullest of each. On Turing the library multiplies, and "
        "the kernel is the epilogue alone.",
        _walk_table([c for c in compiled if c.variant.tile is not None]),
        "## The other kernels",
        "Registers a thread; bytes spilled in brackets, if any.",
        _helper_table([c for c in compiled if c.variant.tile is None]),
        roofline.section(),
    ]
    return "\n\n".join(parts) + "\n"


def _card(architecture: int | str) -> str:
    return architecture if isinstance(architecture, str) else f"sm_{architecture}"


def _walk_table(compiled: list[Compiled]) -> str:
    lines = [
        "| card | dtype | mode | bias, softcap, outputs | tile N×V×H, warps, stages | registers | spilled bytes | "
        "shared KiB (limit) | tensor-core instructions | asynchronous copies |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for c in compiled:
        v, t = c.variant, c.variant.tile
        assert t is not None
        tile = f"{t.n}×{t.v}×{t.h}, {t.warps}, {t.stages}" if t.fused else f"{t.n}×{t.v}, {t.warps}"
        lines.append(
            f"| {_card(v.architecture)} | {v.dtype} | {v.name.removeprefix('walk, ')} | {v.what} | {tile} | "
            f"{c.registers} | {c.spills} | {c.shared / 1024:.0f} ({SHARED_LIMIT[v.architecture]}) | {c.products} | "
            f"{c.copies} |"
        )
    return "\n".join(lines)


def _helper_table(compiled: list[Compiled]) -> str:
    cards = list(dict.fromkeys(c.variant.architecture for c in compiled))
    lines = [
        "| kernel | configuration | elements | " + " | ".join(map(_card, cards)) + " |",
        "|---|---|---|" + "---|" * len(cards),
    ]

    def row(c: Compiled) -> tuple[str, str, str]:
        dtype = c.variant.dtype
        return c.variant.name, c.variant.what, "32 bits" if dtype == "fp32" else "16 bits"

    for (name, what, dtype), group in groupby(sorted(compiled, key=row), key=row):
        cells = {c.variant.architecture: f"{c.registers}" + (f" ({c.spills})" if c.spills else "") for c in group}
        lines.append(f"| {name} | {what} | {dtype} | " + " | ".join(cells[card] for card in cards) + " |")
    return "\n".join(lines)


def main() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("compile_report: unset TRITON_INTERPRET, which replaces the kernels by an interpreter")
    compiled = [compile_variant(variant) for variant in variants()]
    wrong = [f"{c.variant}: {', '.join(faults(c))}" for c in compiled if faults(c)]
    if wrong:
        raise SystemExit("\n".join(wrong))
    Path(sys.argv[1]).write_text(page(compiled), encoding="utf-8")


if __name__ == "__main__":
    main()
