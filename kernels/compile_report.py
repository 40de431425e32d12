"""Compile the main loop for every card, without one, and say what the compiler made of it.

    python -m fastpref.kernels.compile_report docs/kernels.md

Triton's wheel carries the assembler and disassembler of CUDA, so registers, spills, shared memory and tensor-core
instructions are those the card would run.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastpref.kernels import linear_logprob_triton as walk
from fastpref.kernels.tiles import TILES, Tile

# Bytes of shared memory a block may have: CUDA programming guide, and 64 KiB of LDS on the AMD cards.
SHARED_LIMIT = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99, "gfx942": 64, "gfx1100": 64}
TENSOR_CORE = {80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA|UTCMMA", 120: "HMMA"}
_TYPES = {"bf16": 2, "fp16": 2, "fp32": 4}
MODES = {"forward": walk.FORWARD.value, "exp": walk.EXP.value, "gradient": walk.GRADIENT.value}


@dataclass(frozen=True)
class Variant:
    """One compilation of the main loop."""

    architecture: int | str
    dtype: str
    mode: str
    full: bool  # bias, softcap and every optional output, or none of them

    @property
    def tile(self) -> Tile:
        tiles = TILES[self.architecture][_TYPES[self.dtype]]
        return tiles.full if self.full or self.mode == "forward" else tiles.lean


@dataclass(frozen=True)
class Compiled:
    variant: Variant
    registers: int
    spills: int  # bytes of local memory a thread
    shared: int  # bytes
    products: int  # tensor-core instructions
    copies: int  # asynchronous copies from global to shared memory


def variants() -> Iterator[Variant]:
    """The plainest and the fullest kernel of every mode the launcher may choose. float16 differs from bfloat16 by the
    name of its instructions alone, so it is compiled once a card."""
    for architecture in TILES:
        for dtype in _TYPES:
            for mode in MODES if dtype != "fp16" else ("exp",):
                for full in (False, True) if dtype != "fp16" else (True,):
                    yield Variant(architecture, dtype, mode, full)


def compile_variant(variant: Variant) -> Compiled:
    tile = variant.tile
    constants: dict[str, Any] = {
        "MODE": MODES[variant.mode],
        "HAS_BIAS": variant.full,
        "HAS_SOFTCAP": variant.full,
        "HAS_SPREAD": variant.full and variant.mode != "gradient",
        "HAS_MEAN": variant.full and variant.mode != "gradient",
        "HAS_TOP1": variant.full and variant.mode != "gradient",
        "BLOCK_N": tile.n,
        "BLOCK_V": tile.v,
        "BLOCK_H": tile.h,
        "PRECISION": tile.precision,
        "UPCAST": False,
    }
    kernel: Any = walk._walk_kernel
    element = f"*{variant.dtype}"
    signature = {name: _type(name, element, constants) for name in kernel.arg_names}
    aligned = [
        name for name in kernel.arg_names if name.startswith("p_") or name.startswith("stride_") or name == "width"
    ]
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, signature, constants, attributes)
    amd = isinstance(variant.architecture, str)
    warp = 64 if variant.architecture == "gfx942" else 32
    target = GPUTarget("hip" if amd else "cuda", variant.architecture, warp)
    made = triton.compile(source, target=target, options={"num_warps": tile.warps, "num_stages": tile.stages})
    if amd:
        return _read_amd(variant, made)
    return _read_cuda(variant, made)


def _type(name: str, element: str, constants: dict[str, Any]) -> str:
    if name in constants:
        return "constexpr"
    if name == "p_targets":
        return "*i64"
    if name in ("p_hidden", "p_weight", "p_bias", "p_tile"):
        return element
    if name.startswith("p_"):
        return "*fp32"
    return "fp32" if name in ("gain", "cap", "lazy") else "i32"


def _read_cuda(variant: Variant, made: Any) -> Compiled:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        )
        sass = subprocess.run([tools / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
    said = usage.stdout + usage.stderr
    return Compiled(
        variant,
        registers=_number(r"REG:(\d+)", said),
        spills=_number(r"STACK:(\d+)", said) + _number(r"LOCAL:(\d+)", said),
        shared=made.metadata.shared,
        products=len(re.findall(rf"\b({TENSOR_CORE[int(variant.architecture)]})", sass)),
        copies=len(re.findall(r"\b(LDGSTS|UTMALDG|UBLKCP)", sass)),
    )


def _read_amd(variant: Variant, made: Any) -> Compiled:
    assembly = made.asm["amdgcn"]
    return Compiled(
        variant,
        registers=_number(r"\.vgpr_count:\s+(\d+)", assembly),
        spills=4 * _number(r"\.vgpr_spill_count:\s+(\d+)", assembly),
        shared=made.metadata.shared,
        products=len(re.findall(r"\bv_(w?mfma|wmma)", assembly)),
        copies=0,
    )


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found.group(1)) if found else 0


def faults(c: Compiled) -> list[str]:
    """What keeps a kernel from its card: too much shared memory, no tensor cores; on NVIDIA's also spills, and no
    asynchronous copies (AMD's are in the table)."""
    architecture, limit = c.variant.architecture, SHARED_LIMIT[c.variant.architecture]
    found = []
    if c.spills and isinstance(architecture, int):
        found.append(f"{c.spills} bytes spilled")
    if c.shared > limit * 1024:
        found.append(f"{c.shared} bytes of shared memory, the card has {limit} KiB")
    if not c.products and not (architecture == "gfx1100" and c.variant.dtype == "fp32"):  # RDNA 3 has none for float32
        found.append("no tensor-core instruction")
    if not c.copies and isinstance(architecture, int):
        found.append("no asynchronous copy")
    return found


def table(found: list[Compiled]) -> str:
    """The Markdown page."""
    lines = [
        "# Kernels, compiled",
        "",
        "Written by `python -m fastpref.kernels.compile_report docs/kernels.md` with Triton "
        f"{triton.__version__}; no card was used. The main loop `_walk_kernel` in all its modes.",
        "",
        "| card | dtype | mode | bias, softcap, outputs | tile N×V×H, warps, stages | registers | spilled bytes | "
        "shared KiB (limit) | tensor-core instructions | asynchronous copies |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for c in found:
        v, t = c.variant, c.variant.tile
        card = v.architecture if isinstance(v.architecture, str) else f"sm_{v.architecture}"
        lines.append(
            f"| {card} | {v.dtype} | {v.mode} | {'all' if v.full else ''} | "
            f"{t.n}×{t.v}×{t.h}, {t.warps}, {t.stages} | {c.registers} | {c.spills} | {c.shared / 1024:.0f} "
            f"({SHARED_LIMIT[v.architecture]}) | {c.products} | {c.copies} |"
        )
    return "\n".join([*lines, ""])


def main() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("compile_report: unset TRITON_INTERPRET, which replaces the kernels by an interpreter")
    found = [compile_variant(variant) for variant in variants()]
    wrong = [f"{c.variant}: {', '.join(faults(c))}" for c in found if faults(c)]
    if wrong:
        raise SystemExit("\n".join(wrong))
    Path(sys.argv[1]).write_text(table(found), encoding="utf-8")


if __name__ == "__main__":
    main()
